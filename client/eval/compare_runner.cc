#include "client/eval/compare_runner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/eval/report.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// Sums first; Mean() at the end.
void Add(const v1::ComparedPosition& position, ComparedPart* part) {
  ++part->n;
  part->kl += position.kl();
  part->top1 += position.top1_equal() ? 1 : 0;
  part->nll_a -= position.logprob_a();
  part->nll_b -= position.logprob_b();
}

void DivideByCount(ComparedPart* part) {
  if (part->n == 0) return;
  for (double* sum : {&part->kl, &part->top1, &part->nll_a, &part->nll_b}) {
    *sum /= static_cast<double>(part->n);
  }
}

absl::Status Measure(Client* client, const CompareRun& run, const PolicySpec& reference,
                     const PolicySpec& policy, CompareRecord* record) {
  const std::vector<int32_t>& ids = run.windows[static_cast<size_t>(record->window)];
  const auto size = static_cast<int64_t>(ids.size());
  v1::CompareRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  *request.mutable_policy_a() = reference.policy;
  *request.mutable_policy_b() = policy.policy;
  const int64_t decode_from = size - run.decode;
  request.set_decode_from(run.decode > 0 ? decode_from : 0);
  // The last token of the window predicts nothing that is known.
  request.set_score_from(std::clamp<int64_t>(decode_from - run.score, 0, size - 2));
  v1::CompareSummary summary;
  RETURN_IF_ERROR(client->Compare(
      request,
      [&](const v1::CompareEvent& event) {
        for (const v1::ComparedPosition& position : event.positions()) {
          Add(position, position.position() < decode_from ? &record->prompt : &record->decoded);
        }
        if (event.has_summary()) summary = event.summary();
      },
      run.call));
  DivideByCount(&record->prompt);
  DivideByCount(&record->decoded);
  record->flops_executed = summary.attention_flops_b();
  record->flops_dense = summary.attention_flops_dense();
  record->prefill_seconds = summary.prefill_seconds_b();
  record->full_seconds = summary.prefill_seconds_a();
  record->kv_bytes = summary.kv_bytes_b();
  record->kv_bytes_full = summary.kv_bytes_a();
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<std::vector<int32_t>>> CutWindows(const std::vector<int32_t>& ids,
                                                             int32_t bos, int64_t length,
                                                             int64_t most) {
  const bool has_bos = bos >= 0 && !ids.empty() && ids[0] == bos;
  const int64_t own = length - has_bos;  // of a window, beside BOS
  const auto begin = ids.begin() + has_bos;
  const int64_t available = ids.end() - begin;
  const int64_t count = own > 0 ? std::min(most, available / own) : 0;
  if (count < 1) {
    return absl::InvalidArgumentError(absl::StrCat("--text: it has ", ids.size(),
                                                   " tokens, fewer than one window of ", length,
                                                   "; give a longer text or a smaller --lengths"));
  }
  std::vector<std::vector<int32_t>> windows;
  for (int64_t i = 0; i < count; ++i) {
    const auto from = begin + (available - own * count) * i / count + own * i;
    std::vector<int32_t> window;
    if (has_bos) window.push_back(bos);
    window.insert(window.end(), from, from + own);
    windows.push_back(std::move(window));
  }
  return windows;
}

absl::Status RunCompare(Client* client, const CompareRun& run, RecordFile* records) {
  ASSIGN_OR_RETURN(const PolicySpec reference, ParsePolicySpec(kReferencePolicy));
  std::vector<std::pair<const PolicySpec*, CompareRecord>> todo;
  for (size_t window = 0; window < run.windows.size(); ++window) {
    for (const PolicySpec& policy : run.policies) {
      if (policy.name == kReferencePolicy) continue;
      CompareRecord record;
      record.server = run.server;
      record.text = run.text;
      record.policy = policy.name;
      record.length = static_cast<int64_t>(run.windows[window].size());
      record.window = static_cast<int64_t>(window);
      record.windows = static_cast<int64_t>(run.windows.size());
      record.score = run.score;
      record.decode = run.decode;
      if (!records->Has(KeyOf(record))) todo.emplace_back(&policy, std::move(record));
    }
  }
  int done = 0;
  for (auto& [policy, record] : todo) {
    if (run.out_of_time && run.out_of_time()) break;
    RETURN_IF_ERROR(Measure(client, run, reference, *policy, &record));
    RETURN_IF_ERROR(records->Add(std::move(record)));
    if (run.on_window) run.on_window(++done, static_cast<int>(todo.size()));
  }
  return absl::OkStatus();
}

}  // namespace entropyserve
