#include "client/eval/page.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/eval/plot.h"

namespace entropyserve {
namespace {

constexpr char kHead[] = R"(<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>What policies cost</title>
<style>
:root { color-scheme: light dark; --page: #f7f7f5; --panel: #fff; --ink: #1c1d20; --soft: #5d6068; --line: #d9dade; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131417; --panel: #1c1e22; --ink: #e9e9ec; --soft: #a0a4ad; --line: #34373d; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 90ch; color: var(--soft); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px; margin-top: 18px; }
figure { margin: 0 0 18px; } figcaption { font-weight: 600; margin-bottom: 6px; }
)";

constexpr char kHeadEnd[] =
    R"(.scroll { overflow-x: auto; } pre { font-size: 12.5px; line-height: 1.45; margin: 0; }
</style></head><body><main>
)";

// Colours in the order in which policies appear.
class Series {
 public:
  int Of(const std::string& policy) {
    return numbers_.try_emplace(policy, static_cast<int>(numbers_.size())).first->second;
  }

 private:
  std::map<std::string, int> numbers_;
};

std::string Section(const std::string& title, const std::string& content) {
  return absl::StrCat("<section><h2>", EscapeMarkup(title), "</h2>", content, "</section>\n");
}

std::string Table(const std::string& table) {
  return absl::StrCat("<div class=\"scroll\"><pre>", EscapeMarkup(table), "</pre></div>");
}

std::string TaskSections(const std::vector<TaskCell>& cells, Series* series) {
  std::vector<DotRow> rows;
  std::map<int64_t, std::vector<const TaskCell*>> lengths;  // cells that sum up a length
  const bool pooled = std::any_of(cells.begin(), cells.end(),
                                  [](const TaskCell& c) { return c.task == kAllTasks; });
  for (const TaskCell& c : cells) {
    rows.push_back({absl::StrCat(c.task, ", ", c.length, " tokens"), c.policy,
                    absl::StrCat("n = ", c.n), c.score, c.interval, series->Of(c.policy)});
    if (!pooled || c.task == kAllTasks) lengths[c.length].push_back(&c);
  }
  std::string out =
      Section("Scores by task and policy", DotPlot("Score, with Wilson's 95 % interval", rows));
  for (const auto& [length, group] : lengths) {
    std::vector<Dot> by_attention, by_seconds;
    for (const TaskCell* c : group) {
      Dot dot{absl::StrFormat("%s: score %s, attention %.1f %%, prefill %.3f s, n = %d", c->policy,
                              WithInterval(c->score, c->interval), 100 * c->attention_share,
                              c->prefill_seconds, c->n),
              c->policy.substr(0, c->policy.find(':')),
              c->attention_share,
              c->score,
              c->interval,
              series->Of(c->policy),
              "",
              false};
      by_attention.push_back(dot);
      dot.x = c->prefill_seconds;
      by_seconds.push_back(dot);
    }
    const Axis score = {"score"};
    out +=
        Section(absl::StrCat("What it costs at ", length, " tokens"),
                absl::StrCat(
                    ScatterPlot("Score against attention computed",
                                {"share of dense attention", true}, score, by_attention),
                    ScatterPlot("Score against seconds", {"prefill, seconds"}, score, by_seconds)));
  }
  if (const std::string plot = DifferencePlot(cells); !plot.empty()) {
    out += Section("What it buys", plot);
  }
  return out + Section("All numbers of the tasks", Table(TaskTable(cells)));
}

std::string CompareSections(const std::vector<CompareCell>& cells, Series* series) {
  std::map<std::pair<std::string, int64_t>, std::vector<const CompareCell*>> groups;
  for (const CompareCell& c : cells) groups[{c.text, c.length}].push_back(&c);
  std::string out;
  for (const auto& [key, group] : groups) {
    std::vector<Dot> by_attention, by_seconds;
    for (const CompareCell* c : group) {
      // One colour per preset: a sweep has too many policies.
      const std::string preset = c->policy.substr(0, c->policy.find_first_of(":+"));
      Dot dot{absl::StrFormat("%s: KL %.5f [%.5f, %.5f], top-1 %.3f, attention %.1f %%, prefill "
                              "%.3f s, n = %d windows",
                              c->policy, c->main().kl, c->main().kl_interval.low,
                              c->main().kl_interval.high, c->main().top1, 100 * c->attention_share,
                              c->prefill_seconds, c->n),
              "",
              c->attention_share,
              c->main().kl,
              c->main().kl_interval,
              series->Of(preset),
              preset,
              c->least_by_attention};
      by_attention.push_back(dot);
      dot.x = c->prefill_seconds;
      dot.front = c->least_by_seconds;
      by_seconds.push_back(dot);
    }
    const Axis kl = {group[0]->decoded.positions > 0 ? "KL to dense attention, decoded, nats"
                                                     : "KL to dense attention, prompt, nats",
                     false, true};
    out += Section(
        absl::StrCat("Divergence at ", key.second, " tokens of ", key.first),
        absl::StrCat(ScatterPlot("Divergence against attention computed; ringed: the Pareto front",
                                 {"share of dense attention", true}, kl, by_attention),
                     ScatterPlot("Divergence against seconds; ringed: the Pareto front",
                                 {"prefill, seconds"}, kl, by_seconds)));
  }
  return out + Section("All numbers of the text", Table(CompareTable(cells)));
}

}  // namespace

std::string DifferencePlot(const std::vector<TaskCell>& cells) {
  int64_t longest = 0;
  for (const TaskCell& c : cells) longest = std::max(longest, c.length);
  const bool pooled = std::any_of(cells.begin(), cells.end(),
                                  [](const TaskCell& c) { return c.task == kAllTasks; });
  Series series;
  std::vector<Dot> dots;
  int pairs = 0;
  for (const TaskCell& c : cells) {
    if (c.length != longest || c.pairs == 0 || (pooled && c.task != kAllTasks)) continue;
    const std::string prefill = c.policy.substr(0, c.policy.find_first_of(":+"));
    const bool is_reference = c.policy == kReferencePolicy;
    pairs = std::max(pairs, c.pairs);
    dots.push_back(
        {absl::StrFormat("%s: %+.3f [%+.3f, %+.3f], attention %.1f %%, cache %.1f %%", c.policy,
                         c.difference, c.difference_interval.low, c.difference_interval.high,
                         100 * c.attention_share, 100 * c.kv_share),
         absl::StrFormat("%s, %.0f %%", c.policy.substr(c.policy.find('+') + 1), 100 * c.kv_share),
         c.prefill_seconds, 100 * c.difference,
         is_reference ? Interval()
                      : Interval{100 * c.difference_interval.low, 100 * c.difference_interval.high},
         series.Of(prefill), absl::StrFormat("%s, %.0f %%", prefill, 100 * c.attention_share),
         false});
  }
  if (dots.size() < 2) return "";
  return ScatterPlot(
      absl::StrFormat("Score minus full+full at %d tokens, up to %d prompts a policy, 95 %% "
                      "intervals; marks: kv policy, cache kept; colours: prefill, attention read",
                      longest, pairs),
      {"prefill, seconds"}, {"score minus full+full, points"}, dots);
}

std::string EvalPage(const std::string& server, const std::vector<std::string>& notes,
                     const std::vector<TaskCell>& tasks, const std::vector<CompareCell>& compares) {
  Series series;
  std::string out =
      absl::StrCat(kHead, kPlotStyle, kHeadEnd, "<header><h1>What policies cost</h1><p>",
                   EscapeMarkup(server), "</p></header>\n");
  if (!tasks.empty()) out += TaskSections(tasks, &series);
  if (!compares.empty()) out += CompareSections(compares, &series);
  std::string text;
  for (const std::string& note : notes) absl::StrAppend(&text, "<p>", EscapeMarkup(note), "</p>");
  return absl::StrCat(out, Section("How to read it", text), "</main></body></html>\n");
}

}  // namespace entropyserve
