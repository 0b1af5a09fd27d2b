#include "client/eval/report.h"

#include <algorithm>
#include <cmath>
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
                  const std::map<PromptKey, const TaskRecord*>& reference) {
  TaskCell cell;
  cell.n = static_cast<int>(records.size());
  std::vector<double> scores, paired, others, nll, nll_differences;
  double executed = 0, dense = 0;
  for (const TaskRecord* r : records) {
    scores.push_back(r->score);
    if (r->answer_nll_tokens > 0) nll.push_back(r->answer_nll);
    if (const auto found = reference.find(KeyOfPrompt(*r)); found != reference.end()) {
      paired.push_back(r->score);
      others.push_back(found->second->score);
      if (r->answer_nll_tokens > 0) {
        nll_differences.push_back(r->answer_nll - found->second->answer_nll);
      }
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
  cell.nll_n = static_cast<int>(nll.size());
  cell.nll = Mean(nll);
  cell.nll_pairs = static_cast<int>(nll_differences.size());
  cell.nll_difference = Mean(nll_differences);
  cell.nll_difference_interval = Bootstrap(nll_differences);
  cell.attention_share = dense > 0 ? executed / dense : 1;
  cell.kv_share /= cell.n;
  cell.prefill_seconds /= cell.n;
  return cell;
}

CompareCell::Part MakePart(const std::vector<const CompareRecord*>& records,
                           const ComparedPart CompareRecord::*member) {
  CompareCell::Part part;
  std::vector<double> kl, top1, nll_a, nll_b;
  for (const CompareRecord* r : records) {
    const ComparedPart& p = r->*member;
    if (p.n == 0) continue;
    part.positions += p.n;
    ++part.windows;
    kl.push_back(p.kl);
    top1.push_back(p.top1);
    nll_a.push_back(p.nll_a);
    nll_b.push_back(p.nll_b);
  }
  part.kl = Mean(kl);
  part.top1 = Mean(top1);
  part.kl_interval = Bootstrap(kl);
  part.top1_interval = Bootstrap(top1);
  part.perplexity_full = std::exp(Mean(nll_a));
  part.perplexity = std::exp(Mean(nll_b));
  return part;
}

CompareCell MakeCell(const std::vector<const CompareRecord*>& records) {
  CompareCell cell;
  cell.n = static_cast<int>(records.size());
  cell.prompt = MakePart(records, &CompareRecord::prompt);
  cell.decoded = MakePart(records, &CompareRecord::decoded);
  double executed = 0, dense = 0;
  for (const CompareRecord* r : records) {
    executed += r->flops_executed;
    dense += r->flops_dense;
    cell.kv_share += r->kv_bytes_full > 0
                         ? static_cast<double>(r->kv_bytes) / static_cast<double>(r->kv_bytes_full)
                         : 1;
    cell.prefill_seconds += r->prefill_seconds;
    cell.full_seconds += r->full_seconds;
  }
  cell.attention_share = dense > 0 ? executed / dense : 1;
  cell.kv_share /= cell.n;
  cell.prefill_seconds /= cell.n;
  cell.full_seconds /= cell.n;
  return cell;
}

// Of the cells that measured the same text alike.
void MarkFronts(std::vector<CompareCell>* cells) {
  std::map<std::pair<std::string, int64_t>, std::vector<CompareCell*>> groups;
  for (CompareCell& cell : *cells) groups[{cell.text, cell.length}].push_back(&cell);
  for (const auto& [key, group] : groups) {
    std::vector<Point> by_attention, by_seconds;
    for (const CompareCell* cell : group) {
      by_attention.push_back({cell->attention_share, cell->main().kl});
      by_seconds.push_back({cell->prefill_seconds, cell->main().kl});
    }
    const std::vector<bool> attention = ParetoFront(by_attention),
                            seconds = ParetoFront(by_seconds);
    for (size_t i = 0; i < group.size(); ++i) {
      group[i]->least_by_attention = attention[i];
      group[i]->least_by_seconds = seconds[i];
    }
  }
}

}  // namespace

std::vector<TaskCell> TaskCells(const std::vector<TaskRecord>& records) {
  std::map<PromptKey, const TaskRecord*> reference;
  for (const TaskRecord& r : records) {
    if (r.policy == kReferencePolicy) reference[KeyOfPrompt(r)] = &r;
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

std::vector<CompareCell> CompareCells(const std::vector<CompareRecord>& records) {
  using CellKey = std::tuple<std::string, int64_t, std::string>;
  std::vector<CellKey> order;
  std::map<CellKey, std::vector<const CompareRecord*>> groups;
  for (const CompareRecord& r : records) {
    const CellKey key = {
        absl::StrCat(r.text, ", ", r.windows, " windows, scored ", r.score, " + ", r.decode),
        r.length, r.policy};
    if (groups[key].empty()) order.push_back(key);
    groups[key].push_back(&r);
  }
  std::vector<CompareCell> cells;
  for (const CellKey& key : order) {
    cells.push_back(MakeCell(groups.at(key)));
    std::tie(cells.back().text, cells.back().length, cells.back().policy) = key;
  }
  MarkFronts(&cells);
  return cells;
}

std::string CompareTable(const std::vector<CompareCell>& cells) {
  std::vector<std::vector<std::string>> rows = {
      {"policy", "length", "n", "KL decoded", "top-1 decoded", "KL prompt", "top-1 prompt",
       "perplexity (full)", "attention", "kv", "prefill s (full)", "front", "text"}};
  const auto kl = [](const CompareCell::Part& p) {
    if (p.positions == 0) return std::string("-");
    if (p.windows < 2) return absl::StrFormat("%.4f", p.kl);  // one window has no interval
    return absl::StrFormat("%.4f [%.4f, %.4f]", p.kl, p.kl_interval.low, p.kl_interval.high);
  };
  const auto top1 = [](const CompareCell::Part& p) {
    if (p.positions == 0) return std::string("-");
    if (p.windows < 2) return absl::StrFormat("%.3f", p.top1);
    return absl::StrFormat("%.3f [%.3f, %.3f]", p.top1, p.top1_interval.low, p.top1_interval.high);
  };
  for (const CompareCell& c : cells) {
    rows.push_back({c.policy, absl::StrCat(c.length), absl::StrCat(c.n), kl(c.decoded),
                    top1(c.decoded), kl(c.prompt), top1(c.prompt),
                    absl::StrFormat("%.3f (%.3f)", c.main().perplexity, c.main().perplexity_full),
                    absl::StrFormat("%.1f %%", 100 * c.attention_share),
                    absl::StrFormat("%.1f %%", 100 * c.kv_share),
                    absl::StrFormat("%.3f (%.3f)", c.prefill_seconds, c.full_seconds),
                    absl::StrCat(c.least_by_attention ? "A" : "", c.least_by_seconds ? "S" : ""),
                    c.text});
  }
  return FormatTable(rows);
}

std::string WithInterval(double value, const Interval& interval) {
  return absl::StrFormat("%.2f [%.2f, %.2f]", value, interval.low, interval.high);
}

std::string TaskTable(const std::vector<TaskCell>& cells) {
  const bool given =
      std::any_of(cells.begin(), cells.end(), [](const TaskCell& c) { return c.nll_n > 0; });
  std::vector<std::vector<std::string>> rows = {
      {"task", "length", "policy", "n", "score", "minus full+full (pairs)"}};
  const std::vector<std::string> more = {"attention", "kv kept", "prefill s", "compressed", "text"};
  if (given) rows[0].insert(rows[0].end(), {"nats/token", "minus full+full"});
  rows[0].insert(rows[0].end(), more.begin(), more.end());
  for (const TaskCell& c : cells) {
    const bool is_reference = c.policy == kReferencePolicy;
    std::vector<std::string> row = {
        c.task,
        absl::StrCat(c.length),
        c.policy,
        absl::StrCat(c.n),
        WithInterval(c.score, c.interval),
        is_reference || c.pairs == 0
            ? "-"
            : absl::StrFormat("%+.2f [%+.2f, %+.2f] (%d)", c.difference, c.difference_interval.low,
                              c.difference_interval.high, c.pairs)};
    if (given) {
      row.push_back(c.nll_n == 0 ? "-" : absl::StrFormat("%.3f", c.nll));
      row.push_back(is_reference || c.nll_pairs < 2
                        ? "-"
                        : absl::StrFormat("%+.3f [%+.3f, %+.3f]", c.nll_difference,
                                          c.nll_difference_interval.low,
                                          c.nll_difference_interval.high));
    }
    row.insert(row.end(), {absl::StrFormat("%.1f %%", 100 * c.attention_share),
                           absl::StrFormat("%.1f %%", 100 * c.kv_share),
                           absl::StrFormat("%.3f", c.prefill_seconds),
                           absl::StrFormat("%d of %d", c.compressed, c.n), c.text});
    rows.push_back(std::move(row));
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
