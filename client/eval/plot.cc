#include "client/eval/plot.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace entropyserve {
namespace {

constexpr int kColours = 8;  // of the page's style: classes c0 to c7

std::string Open(const std::string& title, double width, double height) {
  return absl::StrFormat(
      "<figure><figcaption>%s</figcaption><svg viewBox=\"0 0 %g %g\" style=\"max-width:%gpx\" "
      "role=\"img\" aria-label=\"%s\">\n",
      EscapeMarkup(title), width, height, width, EscapeMarkup(title));
}

std::string Text(double x, double y, const char* anchor, const std::string& text,
                 const char* style = "") {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" class=\"%s\">%s</text>\n",
                         x, y, anchor, style, EscapeMarkup(text));
}

std::string Line(double x1, double y1, double x2, double y2, const char* style) {
  return absl::StrFormat("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" class=\"%s\"/>\n",
                         x1, y1, x2, y2, style);
}

std::string Circle(double x, double y, double r, int series, const std::string& tip) {
  return absl::StrFormat(
      "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" class=\"c%d\"><title>%s</title></circle>\n", x, y,
      r, series % kColours, EscapeMarkup(tip));
}

// Maps values of an axis to [0, 1] and chooses its labels.
class Scale {
 public:
  Scale(const Axis& axis, std::vector<double> values) : axis_(axis) {
    if (axis.logarithmic) {
      std::erase_if(values, [](double v) { return !(v > 0); });
    }
    low_ = high_ = axis.logarithmic ? 1e-3 : 0;
    if (!values.empty()) {
      low_ = *std::min_element(values.begin(), values.end());
      high_ = *std::max_element(values.begin(), values.end());
    }
    if (axis.logarithmic) {
      low_ = std::floor(std::log10(low_));
      high_ = std::max(low_ + 1, std::ceil(std::log10(high_)));
      for (double t = low_; t <= high_; ++t) ticks_.push_back(std::pow(10, t));
      return;
    }
    constexpr double kBeyond = 0.01;  // of a step: 100.01 % belong at 100 %
    // With 0, and with about five labels.
    low_ = std::min(low_, 0.0);
    high_ = std::max(high_, 0.0);
    if (!(high_ > low_)) high_ = low_ + 1;
    const double raw = (high_ - low_) / 5, power = std::pow(10, std::floor(std::log10(raw)));
    double step = 10 * power;
    for (const double k : {5.0, 2.0, 1.0}) {
      if (k * power >= raw * (1 - kBeyond)) step = k * power;
    }
    // Whole steps, so that 0 is exact.
    const double first = std::floor(low_ / step + 1e-9), last = std::ceil(high_ / step - kBeyond);
    for (double t = first; t <= last; ++t) ticks_.push_back(t * step);
    low_ = first * step;
    high_ = last * step;
  }

  double At(double value) const {
    if (axis_.logarithmic) value = value > 0 ? std::log10(value) : low_;
    return std::clamp((value - low_) / (high_ - low_), 0.0, 1.0);
  }
  const std::vector<double>& ticks() const { return ticks_; }
  std::string Label(double tick) const {
    return axis_.percent ? absl::StrFormat("%g %%", 100 * tick) : absl::StrFormat("%g", tick);
  }

 private:
  const Axis axis_;
  double low_ = 0, high_ = 1;
  std::vector<double> ticks_;
};

// Letters of the style's font at 13 pixels are about so wide.
constexpr double kLetter = 7.8;

// Moves marks down until none covers another; in the order of `at`, from the top.
class MarkPlacer {
 public:
  // The height of a mark that lies between `begin` and `end` and would best be at `y`.
  double Place(double begin, double end, double y) {
    for (const Mark& other : marks_) {
      if (begin < other.end && other.begin < end) y = std::max(y, other.y + kHeight);
    }
    marks_.push_back({begin, end, y});
    return y;
  }

 private:
  static constexpr double kHeight = 14;
  struct Mark {
    double begin, end, y;
  };
  std::vector<Mark> marks_;
};

}  // namespace

const char kPlotStyle[] = R"(svg { width: 100%; height: auto; display: block; font-size: 13px; }
svg text { fill: var(--ink); } svg text.soft { fill: var(--soft); } svg text.strong { font-weight: 600; }
line { stroke: var(--soft); stroke-width: 2; } line.grid { stroke: var(--line); stroke-width: 1; }
line.front { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; } .ring { fill: none; stroke: var(--ink); }
.c0 { fill: #0072b2; } .c1 { fill: #d55e00; } .c2 { fill: #009e73; } .c3 { fill: #cc79a7; }
.c4 { fill: #56b4e9; } .c5 { fill: #e69f00; } .c6 { fill: #8c8c8c; } .c7 { fill: #b3a100; }
.s0 { stroke: #0072b2; } .s1 { stroke: #d55e00; } .s2 { stroke: #009e73; } .s3 { stroke: #cc79a7; }
.s4 { stroke: #56b4e9; } .s5 { stroke: #e69f00; } .s6 { stroke: #8c8c8c; } .s7 { stroke: #b3a100; }
)";

std::string PlotFile(const std::string& plot) {
  const size_t begin = plot.find("<svg"), tag = plot.find('>', begin) + 1;
  const size_t title = plot.find("<figcaption>") + std::string_view("<figcaption>").size();
  return absl::StrCat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\"", plot.substr(begin + 4, tag - begin - 4),
      "<style>svg { --ink: #1c1d20; --soft: #5d6068; --line: #d9dade; background: #fff; "
      "font-family: \"DejaVu Sans\", sans-serif; }\n",
      kPlotStyle, "</style><title>", plot.substr(title, plot.find("</figcaption>") - title),
      "</title>\n", plot.substr(tag, plot.find("</figure>") - tag), "\n");
}

std::string EscapeMarkup(const std::string& text) {
  return absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
}

std::string DotPlot(const std::string& title, const std::vector<DotRow>& rows) {
  constexpr double kWidth = 420, kRight = 110, kRow = 19, kTop = 8;
  double left = 330;
  for (const DotRow& row : rows) {
    left = std::max(left, kLetter * static_cast<double>(row.label.size()) + 20);
  }
  // Where every row lies; a group's name has a row of its own.
  double height = kTop;
  std::string body, group;
  const auto x = [left](double value) { return left + kWidth * value; };
  for (const DotRow& row : rows) {
    if (row.group != group) {
      group = row.group;
      height += kRow + 4;
      body += Text(4, height, "start", group, "strong");
    }
    height += kRow;
    const double y = height - 4;
    body += Text(left - 10, height, "end", row.label);
    body += Line(x(row.interval.low), y, x(row.interval.high), y,
                 absl::StrCat("s", row.series % kColours).c_str());
    body += Circle(x(row.value), y, 4.5, row.series,
                   absl::StrFormat("%s, %s: %.3f [%.3f, %.3f], %s", row.group, row.label, row.value,
                                   row.interval.low, row.interval.high, row.note));
    body += Text(left + kWidth + 10, height, "start",
                 absl::StrFormat("%.2f, %s", row.value, row.note), "soft");
  }
  std::string grid;
  for (int tick = 0; tick <= 4; ++tick) {
    grid += Line(x(tick / 4.0), kTop, x(tick / 4.0), height + 6, "grid");
    grid += Text(x(tick / 4.0), height + 20, "middle", absl::StrFormat("%g", tick / 4.0), "soft");
  }
  return absl::StrCat(Open(title, left + kWidth + kRight, height + 26), grid, body,
                      "</svg></figure>\n");
}

std::string ScatterPlot(const std::string& title, const Axis& x_axis, const Axis& y_axis,
                        const std::vector<Dot>& dots) {
  constexpr double kLeft = 84, kTop = 12, kWidth = 600, kHeight = 330, kRight = 240, kBottom = 48;
  std::vector<double> xs, ys;
  for (const Dot& dot : dots) {
    xs.push_back(dot.x);
    ys.insert(ys.end(), {dot.y, dot.y_interval.high});
    if (!y_axis.logarithmic || dot.y_interval.low > 0) ys.push_back(dot.y_interval.low);
  }
  const Scale sx(x_axis, xs), sy(y_axis, ys);
  const auto x = [&sx](double v) { return kLeft + kWidth * sx.At(v); };
  const auto y = [&sy](double v) { return kTop + kHeight * (1 - sy.At(v)); };
  std::string out = Open(title, kLeft + kWidth + kRight, kTop + kHeight + kBottom);
  for (const double tick : sx.ticks()) {
    out += Line(x(tick), kTop, x(tick), kTop + kHeight, "grid");
    out += Text(x(tick), kTop + kHeight + 17, "middle", sx.Label(tick), "soft");
  }
  for (const double tick : sy.ticks()) {
    out += Line(kLeft, y(tick), kLeft + kWidth, y(tick), "grid");
    out += Text(kLeft - 8, y(tick) + 4, "end", sy.Label(tick), "soft");
  }
  out += Text(kLeft + kWidth / 2, kTop + kHeight + 38, "middle", x_axis.name);
  absl::StrAppendFormat(
      &out, "<text transform=\"translate(16,%.1f) rotate(-90)\" text-anchor=\"middle\">%s</text>\n",
      kTop + kHeight / 2, EscapeMarkup(y_axis.name));
  // A front falls in steps: between two of its points only the left one is to be had.
  std::vector<const Dot*> front;
  for (const Dot& dot : dots) {
    if (dot.front) front.push_back(&dot);
  }
  std::sort(front.begin(), front.end(), [](const Dot* a, const Dot* b) { return a->x < b->x; });
  for (size_t i = 0; i + 1 < front.size(); ++i) {
    out += Line(x(front[i]->x), y(front[i]->y), x(front[i + 1]->x), y(front[i]->y), "front");
    out +=
        Line(x(front[i + 1]->x), y(front[i]->y), x(front[i + 1]->x), y(front[i + 1]->y), "front");
  }
  MarkPlacer marks;
  std::set<std::string> legends;
  for (const Dot& dot : dots) {
    if (dot.legend.empty() || !legends.insert(dot.legend).second) continue;
    const double at = kTop + 18 * static_cast<double>(legends.size());
    out += Circle(kLeft + kWidth + 20, at - 4, 5, dot.series, dot.legend);
    out += Text(kLeft + kWidth + 32, at, "start", dot.legend);
    marks.Place(kLeft + kWidth + 20, kLeft + kWidth + kRight, at);
  }
  std::vector<const Dot*> order;
  for (const Dot& dot : dots) order.push_back(&dot);
  std::stable_sort(order.begin(), order.end(),
                   [](const Dot* a, const Dot* b) { return a->y > b->y; });
  std::map<int, int> beside;  // dots that are there already, by their place
  for (const Dot* dot : order) {
    // To the left: marks stand on the right. Without marks there are many, and their places count.
    const double place = x(dot->x);
    const int others = dot->mark.empty() ? 0 : beside[static_cast<int>(place / 8)]++;
    const double at = place - 9 * others;
    out += Line(at, y(dot->y_interval.low), at, y(dot->y_interval.high),
                absl::StrCat("s", dot->series % kColours).c_str());
    if (dot->front) {
      absl::StrAppendFormat(&out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"8\" class=\"ring\"/>\n", at,
                            y(dot->y));
    }
    out += Circle(at, y(dot->y), 5, dot->series, dot->label);
    if (dot->mark.empty()) continue;
    const double width = kLetter * static_cast<double>(dot->mark.size());
    const bool fits = place + 10 + width < kLeft + kWidth + kRight;  // else it would be cut off
    const double begin = fits ? place + 10 : at - 10 - width;
    const double height = marks.Place(begin, begin + width, y(dot->y) - 6);
    out += Text(fits ? begin : at - 10, height, fits ? "start" : "end", dot->mark, "soft");
  }
  return out + "</svg></figure>\n";
}

}  // namespace entropyserve
