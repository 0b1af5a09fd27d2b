#include "client/bench/summary.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/base/flag_set.h"

namespace entropyserve {

double Percentile(const std::vector<double>& sorted, double share) {
  if (sorted.empty()) return std::numeric_limits<double>::quiet_NaN();
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - std::floor(place)) * (sorted[above] - sorted[below]);
}

Stat::Stat(std::vector<double> samples) : sorted(std::move(samples)) {
  if (sorted.empty()) return;
  std::sort(sorted.begin(), sorted.end());
  for (const double value : sorted) mean += value;
  mean /= static_cast<double>(sorted.size());
  for (const double value : sorted) deviation += (value - mean) * (value - mean);
  deviation = std::sqrt(deviation / static_cast<double>(sorted.size()));
  median = Percentile(sorted, 0.5);
  p90 = Percentile(sorted, 0.9);
  p95 = Percentile(sorted, 0.95);
  p99 = Percentile(sorted, 0.99);
}

absl::StatusOr<Slo> ParseSlo(std::string_view text) {
  const absl::Status wrong = absl::InvalidArgumentError(
      "expected objectives in ms such as ttft:1000,tpot:50,e2el:30000, each name once");
  Slo slo;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const std::vector<std::string> pair = absl::StrSplit(part, ':');
    if (pair.size() != 2) return wrong;
    const auto value = ParseNumber(pair[1]);
    if (!value.ok() || !(*value >= 0) || !std::isfinite(*value)) return wrong;
    std::optional<double>* target = pair[0] == "ttft"   ? &slo.ttft
                                    : pair[0] == "tpot" ? &slo.tpot
                                    : pair[0] == "e2el" ? &slo.e2el
                                                        : nullptr;
    if (target == nullptr || target->has_value()) return wrong;
    *target = *value * 1e-3;
  }
  return slo;
}

std::string FormatSlo(const Slo& slo) {
  std::vector<std::string> parts;
  for (const auto& [name, value] :
       {std::pair("ttft", slo.ttft), std::pair("tpot", slo.tpot), std::pair("e2el", slo.e2el)}) {
    if (value.has_value()) parts.push_back(absl::StrFormat("%s %g ms", name, *value * 1e3));
  }
  return absl::StrJoin(parts, ", ");
}

bool Meets(const RequestRecord& record, const Slo& slo) {
  if (!record.IsSample()) return false;
  if (slo.ttft.has_value() &&
      (record.output_tokens == 0 || record.first_token - record.intended > *slo.ttft)) {
    return false;
  }
  // An answer of one token has no time per token, and meets any.
  if (slo.tpot.has_value() && record.output_tokens > 1 && record.Tpot() > *slo.tpot) return false;
  return !slo.e2el.has_value() || record.ended - record.intended <= *slo.e2el;
}

namespace {

// The most requests between being sent and ended at one time.
int64_t MaxConcurrent(const std::vector<std::pair<double, int>>& changes) {
  int64_t now = 0, most = 0;
  for (const auto& [at, change] : changes) most = std::max(most, now += change);
  return most;
}

struct Samples {
  std::vector<double> ttft, tpot, itl, e2el, intended_ttft, intended_e2el, client_queue, session;
  std::vector<double> attention_share, kv_share, queue, server_ttft;
};

void AddSample(const RequestRecord& record, Samples* samples) {
  samples->e2el.push_back(record.E2e());
  samples->intended_e2el.push_back(record.ended - record.intended);
  if (record.output_tokens > 0) {
    samples->ttft.push_back(record.Ttft());
    samples->intended_ttft.push_back(record.first_token - record.intended);
  }
  if (record.output_tokens > 1) samples->tpot.push_back(record.Tpot());
  samples->itl.insert(samples->itl.end(), record.gaps.begin(), record.gaps.end());
}

void AddReceipt(const v1::Receipt& receipt, Samples* samples) {
  samples->attention_share.push_back(receipt.attention_flops_ratio());
  if (receipt.kv_bytes_before() > 0) samples->kv_share.push_back(receipt.kv_bytes_ratio());
  samples->queue.push_back(receipt.queue_seconds());
  samples->server_ttft.push_back(receipt.ttft_seconds());
}

void Count(const RequestRecord& record, Summary* summary) {
  summary->cut += record.cut;
  switch (record.outcome) {
    case Outcome::kCompleted:
      ++summary->completed;
      summary->slow += record.slow;
      summary->input_tokens += record.input_tokens;
      summary->output_tokens += record.output_tokens;
      return;
    case Outcome::kCancelled:
      ++summary->cancelled;
      break;
    case Outcome::kUnfinished:
      ++summary->unfinished;
      break;
    case Outcome::kFailed: {
      ++summary->failed;
      const std::string code = absl::StatusCodeToString(record.status.code());
      ++summary->errors[code];
      summary->error_examples.try_emplace(code, std::string(record.status.message()));
      break;
    }
  }
  summary->partial_output_tokens += record.output_tokens;
}

}  // namespace

Summary Summarize(const std::vector<RequestRecord>& records, double seconds, const Slo& slo) {
  Summary summary;
  summary.seconds = seconds;
  summary.has_slo = slo.any();
  Samples samples;
  std::vector<std::pair<double, int>> changes;
  for (const RequestRecord& record : records) {
    Count(record, &summary);
    changes.emplace_back(record.sent, 1);
    changes.emplace_back(record.ended, -1);
    samples.client_queue.push_back(record.QueueSeconds());
    if (record.session_seconds > 0) samples.session.push_back(record.session_seconds);
    if (record.outcome != Outcome::kCompleted) continue;
    if (record.has_receipt) AddReceipt(record.receipt, &samples);
    if (record.IsSample()) AddSample(record, &samples);
    summary.good += slo.any() && Meets(record, slo);
  }
  std::sort(changes.begin(), changes.end());  // of one moment, ends come before starts
  summary.max_concurrent = MaxConcurrent(changes);
  for (const auto& [stat, from] : {std::pair(&summary.ttft, &samples.ttft),
                                   {&summary.tpot, &samples.tpot},
                                   {&summary.itl, &samples.itl},
                                   {&summary.e2el, &samples.e2el},
                                   {&summary.intended_ttft, &samples.intended_ttft},
                                   {&summary.intended_e2el, &samples.intended_e2el},
                                   {&summary.client_queue, &samples.client_queue},
                                   {&summary.session, &samples.session},
                                   {&summary.attention_share, &samples.attention_share},
                                   {&summary.kv_share, &samples.kv_share},
                                   {&summary.queue, &samples.queue},
                                   {&summary.server_ttft, &samples.server_ttft}}) {
    *stat = Stat(std::move(*from));
  }
  return summary;
}

}  // namespace entropyserve
