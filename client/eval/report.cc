#include "client/eval/report.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace entropyserve {
namespace {

std::string TextOf(const TaskRecord& r) {
  return absl::StrCat(r.haystack, ", ", r.format,
                      r.answer_limit > 0 ? absl::StrCat(", ", r.answer_limit, " tokens") : "");
}

// What two policies were asked alike.
using PromptKey = std::tuple<std::string, std::string, int64_t, uint64_t, int>;
PromptKey KeyOfPrompt(const TaskRecord& r) {
  return {r.task, TextOf(r), r.length, r.seed, r.index};
}

TaskCell MakeCell(const std::vector<const TaskRecord*>& records,
                  const std::map<PromptKey, double>& reference) {
  TaskCell cell;
  cell.n = static_cast<int>(records.size());
  std::vector<double> scores, paired, others;
  double executed = 0, dense = 0;
  for (const TaskRecord* r : records) {
    scores.push_back(r->score);
    if (const auto found = reference.find(KeyOfPrompt(*r)); found != reference.end()) {
      paired.push_back(r->score);
      others.push_back(found->second);
    }
    executed += r->flops_executed;
    dense += r->flops_dense;
    cell.kv_share += r->kv_bytes_before > 0 ? static_cast<double>(r->kv_bytes_after) /
                                                  static_cast<double>(r->kv_bytes_before)
                                            : 1;
    cell.prefill_seconds += r->prefill_seconds;
    cell.compressed += r->compressed;
  }
  cell.score = Mean(scores);
  cell.interval = Wilson(cell.score, cell.n);
  cell.pairs = static_cast<int>(paired.size());
  cell.difference = Mean(paired) - Mean(others);
  cell.difference_interval = PairedDifference(paired, others);
  cell.attention_share = dense > 0 ? executed / dense : 1;
  cell.kv_share /= cell.n;
  cell.prefill_seconds /= cell.n;
  return cell;
}

}  // namespace

std::vector<TaskCell> TaskCells(const std::vector<TaskRecord>& records) {
  std::map<PromptKey, double> reference;
  for (const TaskRecord& r : records) {
    if (r.policy == kReferencePolicy) reference[KeyOfPrompt(r)] = r.score;
  }
  using CellKey = std::tuple<std::string, std::string, int64_t, std::string>;
  std::vector<CellKey> order, all_order;
  std::map<CellKey, std::vector<const TaskRecord*>> groups;
  std::set<std::string> names;
  for (const TaskRecord& r : records) {
    names.insert(r.task);
    const CellKey key = {r.task, TextOf(r), r.length, r.policy};
    const CellKey all = {kAllTasks, "", r.length, r.policy};
    if (groups[key].empty()) order.push_back(key);
    if (groups[all].empty()) all_order.push_back(all);
    groups[key].push_back(&r);
    groups[all].push_back(&r);
  }
  // A task's policies stand together, whatever order the records came in.
  std::map<std::pair<std::string, int64_t>, size_t> first;
  for (size_t i = 0; i < order.size(); ++i) {
    first.try_emplace({std::get<0>(order[i]), std::get<2>(order[i])}, i);
  }
  std::stable_sort(order.begin(), order.end(), [&first](const CellKey& a, const CellKey& b) {
    return first.at({std::get<0>(a), std::get<2>(a)}) < first.at({std::get<0>(b), std::get<2>(b)});
  });
  if (names.size() > 1) order.insert(order.end(), all_order.begin(), all_order.end());
  std::vector<TaskCell> cells;
  for (const CellKey& key : order) {
    cells.push_back(MakeCell(groups.at(key), reference));
    std::tie(cells.back().task, cells.back().text, cells.back().length, cells.back().policy) = key;
  }
  return cells;
}

std::string WithInterval(double value, const Interval& interval) {
  return absl::StrFormat("%.2f [%.2f, %.2f]", value, interval.low, interval.high);
}

std::string TaskTable(const std::vector<TaskCell>& cells) {
  std::vector<std::vector<std::string>> rows = {{"task", "length", "policy", "n", "score",
                                                 "minus full+full (pairs)", "attention", "kv kept",
                                                 "prefill s", "compressed", "text"}};
  for (const TaskCell& c : cells) {
    const bool is_reference = c.policy == kReferencePolicy;
    rows.push_back(
        {c.task, absl::StrCat(c.length), c.policy, absl::StrCat(c.n),
         WithInterval(c.score, c.interval),
         is_reference || c.pairs == 0
             ? "-"
             : absl::StrFormat("%+.2f [%+.2f, %+.2f] (%d)", c.difference, c.difference_interval.low,
                               c.difference_interval.high, c.pairs),
         absl::StrFormat("%.1f %%", 100 * c.attention_share),
         absl::StrFormat("%.1f %%", 100 * c.kv_share), absl::StrFormat("%.3f", c.prefill_seconds),
         absl::StrFormat("%d of %d", c.compressed, c.n), c.text});
  }
  return FormatTable(rows);
}

std::string FormatTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.empty() ? 0 : rows[0].size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      if (!line.empty()) line += "  ";
      line += row[i] + std::string(widths[i] - row[i].size(), ' ');
    }
    line.resize(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

}  // namespace entropyserve
