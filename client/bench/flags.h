// What a bench is asked for.
#pragma once

#include <string>
#include <vector>

#include "client/bench/plan.h"
#include "client/bench/summary.h"
#include "client/command.h"

namespace entropyserve {

struct BenchSettings {
  ConnectionFlags connection;
  WorkloadSpec workload;       // but for the level, the prompts' limit and the copies
  std::vector<double> levels;  // of the sweep
  std::vector<std::string> policies = {"default"};
  bool interleave = false;
  int64_t warmup = 0;
  int64_t max_concurrency = 0;
  double slow_pause_seconds = 0.1;
  int streams_per_connection = 200;
  v1::GenerateRequest request;  // sampling and policy of every request
  std::string text_file, metrics_url;
  Slo slo;
  std::string json_file, csv_file, html_file;  // empty: none
  bool json = false, save_detailed = false;
};

// Parses, as ParseCommandLine does: false when the subcommand is over already.
bool ParseBenchFlags(const std::vector<std::string>& args, BenchSettings* settings, int* exit_code);

// `request` under a policy of --policies: "default" (as it is), "PREFILL", "PREFILL/KV" or "/KV".
v1::GenerateRequest WithPolicy(v1::GenerateRequest request, const std::string& policy);

// "1,2,inf": all greater than 0. INVALID_ARGUMENT.
absl::StatusOr<std::vector<double>> ParseLevels(std::string_view text, bool whole_numbers);

}  // namespace entropyserve
