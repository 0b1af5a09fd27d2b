// What a run's records amount to. Percentiles are numpy's (linear between neighbours), deviations
// those of the population, so that they equal what vLLM's bench computes from the same samples.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "client/bench/record.h"

namespace entropyserve {

// `sorted` ascending; share in [0, 1]. NaN of nothing.
double Percentile(const std::vector<double>& sorted, double share);

// A figure and the samples it is made of.
struct Stat {
  Stat() = default;
  explicit Stat(std::vector<double> samples);
  int64_t n() const { return static_cast<int64_t>(sorted.size()); }

  std::vector<double> sorted;
  double mean = 0, deviation = 0, median = 0, p90 = 0, p95 = 0, p99 = 0;  // 0 when n is 0
};

// Upper bounds in seconds; a request meets those that are given.
struct Slo {
  std::optional<double> ttft, tpot, e2el;
  bool any() const { return ttft.has_value() || tpot.has_value() || e2el.has_value(); }
};
// "ttft:1000,tpot:50,e2el:30000", in milliseconds. INVALID_ARGUMENT.
absl::StatusOr<Slo> ParseSlo(std::string_view text);
std::string FormatSlo(const Slo& slo);  // "ttft 1000 ms, tpot 50 ms"

struct Summary {
  double seconds = 0;
  int64_t completed = 0, failed = 0, cancelled = 0, unfinished = 0, turns_not_sent = 0;
  int64_t slow = 0;  // of the completed, which are no samples of latencies
  int64_t cut = 0;   // shorter than drawn, because of the context
  int64_t input_tokens = 0, output_tokens = 0;  // of the completed
  int64_t partial_output_tokens = 0;            // of the others
  int64_t max_concurrent = 0;                   // requests
  std::map<std::string, int64_t> errors;        // by the name of gRPC's code
  std::map<std::string, std::string> error_examples;

  // Of the completed that are samples, in seconds.
  Stat ttft, tpot, itl, e2el;         // from when the request was sent
  Stat intended_ttft, intended_e2el;  // from when it should have been sent
  Stat client_queue, session;         // of everything sent; of first turns of sessions
  // Receipts of the completed.
  Stat attention_share, kv_share, queue, server_ttft;

  int64_t good = 0;  // samples that meet the objectives, measured from the intended time
  bool has_slo = false;

  double RequestThroughput() const { return PerSecond(static_cast<double>(completed)); }
  double OutputThroughput() const { return PerSecond(static_cast<double>(output_tokens)); }
  double TotalThroughput() const {
    return PerSecond(static_cast<double>(input_tokens + output_tokens));
  }
  double Goodput() const { return PerSecond(static_cast<double>(good)); }
  double PerSecond(double amount) const { return seconds > 0 ? amount / seconds : 0; }
};

// `seconds`: how long the run took.
Summary Summarize(const std::vector<RequestRecord>& records, double seconds, const Slo& slo);

// Whether a sample meets the objectives; the first token counts from the intended time.
bool Meets(const RequestRecord& record, const Slo& slo);

}  // namespace entropyserve
