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
  // Of prompts whose answers were given: nats per token, mean over prompts; 0 of them: none were.
  int nll_n = 0, nll_pairs = 0;
  double nll = 0, nll_difference = 0;
  Interval nll_difference_interval;  // Bootstrap
  double attention_share = 0;        // executed of dense FLOPs of all prompts
  double kv_share = 0;               // mean of bytes kept
  double prefill_seconds = 0;        // mean
  int compressed = 0;                // prompts
};

// In the order of first appearance; seeds are pooled. Cells of kAllTasks come last, where there is
// more than one task.
std::vector<TaskCell> TaskCells(const std::vector<TaskRecord>& records);

std::string TaskTable(const std::vector<TaskCell>& cells);

// A policy against the reference on a text. Means over windows, intervals by Bootstrap.
struct CompareCell {
  std::string text, policy;  // text: with what was scored
  int64_t length = 0;
  int n = 0;  // windows
  struct Part {
    int64_t positions = 0;
    int windows = 0;
    double kl = 0, top1 = 0;
    Interval kl_interval, top1_interval;
    double perplexity_full = 0, perplexity = 0;
  };
  Part prompt, decoded;
  double attention_share = 0, kv_share = 0;
  double prefill_seconds = 0, full_seconds = 0;
  // Of the cells of its text and length: none has less divergence at no more attention, or at no
  // more seconds.
  bool least_by_attention = false, least_by_seconds = false;

  // What answers feel: the decoded tokens where there are any.
  const Part& main() const { return decoded.positions > 0 ? decoded : prompt; }
};

// In the order of first appearance.
std::vector<CompareCell> CompareCells(const std::vector<CompareRecord>& records);

std::string CompareTable(const std::vector<CompareCell>& cells);

// "0.90 [0.60, 0.98]".
std::string WithInterval(double value, const Interval& interval);

// Left-aligned columns, the first row the heads.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace entropyserve
