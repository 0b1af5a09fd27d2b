// All results as one HTML page that loads nothing and runs nothing.
#pragma once

#include <string>
#include <vector>

#include "client/eval/report.h"

namespace entropyserve {

// `server`: ServerName(). `notes`: how it was measured, a paragraph each. Whatever is given is
// escaped.
std::string EvalPage(const std::string& server, const std::vector<std::string>& notes,
                     const std::vector<TaskCell>& tasks, const std::vector<CompareCell>& compares);

// The difference to the reference against prefill seconds, of all tasks at the longest length; a
// plot of plot.h, empty where no policy is paired with the reference.
std::string DifferencePlot(const std::vector<TaskCell>& cells);

}  // namespace entropyserve
