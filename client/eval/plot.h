// Plots as SVG elements of a page: no script; colours come from the page's style.
#pragma once

#include <string>
#include <vector>

#include "client/eval/statistics.h"

namespace entropyserve {

// Values of [0, 1] with intervals, one row each, rows of one group under its name.
struct DotRow {
  std::string group, label, note;  // note: right of the row, e.g. "n = 20"
  double value = 0;
  Interval interval;
  int series = 0;  // colour
};
std::string DotPlot(const std::string& title, const std::vector<DotRow>& rows);

struct Dot {
  std::string label;  // shown when pointed at; `mark` beside the dot
  std::string mark;
  double x = 0, y = 0;
  Interval y_interval;
  int series = 0;
  std::string legend;  // what the colour means, beside the plot; empty: `mark` says it
  bool front = false;  // ringed, and joined by a line with the others
};
struct Axis {
  std::string name;
  bool percent = false;
  bool logarithmic = false;  // values at or below 0 are drawn at its foot
};
// Dots of one x that have marks stand side by side, and marks make room for each other.
std::string ScatterPlot(const std::string& title, const Axis& x, const Axis& y,
                        const std::vector<Dot>& dots);

// A plot's picture as a file of its own, with its title.
std::string PlotFile(const std::string& plot);

// Colours of plots, for a page's style.
extern const char kPlotStyle[];

std::string EscapeMarkup(const std::string& text);

}  // namespace entropyserve
