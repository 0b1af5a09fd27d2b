// A bench's results as a person, a program and a spreadsheet read them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "client/bench/plan.h"
#include "client/bench/record.h"
#include "client/bench/summary.h"

namespace entropyserve {

// One configuration: a point of the sweep under one policy.
struct BenchRow {
  LoadMode mode = LoadMode::kOpen;
  double level = 0;  // requests/s, requests at a time, or the trace's speed
  double ramp_from = -1;
  std::string policy;         // "default", "entropy", "full/latent"
  int64_t conversations = 0;  // planned
  Summary summary;
  std::vector<RequestRecord> records;             // this row's
  std::map<std::string, double> server_counters;  // how much each grew during the run
  bool counters_shared = false;  // the run had other policies as well (interleaved)
};

struct BenchReport {
  std::string date;     // UTC, "20261122-185530" as in vLLM's files
  std::string command;  // as given, without the key
  std::string server_version, backend, model, dtype;
  uint64_t seed = 0;
  bool poisson = true;
  Slo slo;
  std::string ended;  // why the run ended early; empty: it did not
  std::vector<BenchRow> rows;
};

// "rate 2/s", "32 at once", "trace at 1x".
std::string LevelName(const BenchRow& row);
// The row's level, policy, figures with their n, and errors; several lines.
std::string FormatRow(const BenchRow& row, const Slo& slo);
// One line per row under a heading.
std::string FormatSweep(const std::vector<BenchRow>& rows);

// One object: what ran, and "rows". Keys are those of `vllm bench serve` where they mean the same.
// With `detailed` also its per-request arrays (input_lens, output_lens, ttfts, itls, errors,
// start_times).
std::string ReportJson(const BenchReport& report, bool detailed);
// A heading and one line per row; the same keys.
std::string ReportCsv(const BenchReport& report);
// A heading and one line per request of every row.
std::string RequestsCsv(const BenchReport& report);

}  // namespace entropyserve
