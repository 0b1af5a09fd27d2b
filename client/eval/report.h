// Records summed up: one cell per task, length and policy, as a table of text.
#pragma once

#include <string>
#include <vector>

#include "client/eval/record.h"
#include "client/eval/statistics.h"

namespace entropyserve {

// What every policy is compared with.
inline constexpr char kReferencePolicy[] = "full+full";
// Name of the cells that pool all tasks of a length.
inline constexpr char kAllTasks[] = "all tasks";

struct TaskCell {
  std::string task, policy;
  std::string text;  // of which haystack, in which format
  int64_t length = 0;
  int n = 0;  // prompts
  double score = 0;
  Interval interval;             // Wilson
  int pairs = 0;                 // prompts that the reference answered, too
  double difference = 0;         // to the reference, over the pairs
  Interval difference_interval;  // PairedDifference
  double attention_share = 0;    // executed of dense FLOPs of all prompts
  double kv_share = 0;           // mean of bytes kept
  double prefill_seconds = 0;    // mean
  int compressed = 0;            // prompts
};

// In the order of first appearance; seeds are pooled. Cells of kAllTasks come last, where there is
// more than one task.
std::vector<TaskCell> TaskCells(const std::vector<TaskRecord>& records);

std::string TaskTable(const std::vector<TaskCell>& cells);

// "0.90 [0.60, 0.98]".
std::string WithInterval(double value, const Interval& interval);

// Left-aligned columns, the first row the heads.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace entropyserve
