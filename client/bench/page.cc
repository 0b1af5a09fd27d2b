#include "client/bench/page.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_replace.h"
#include "client/bench/page_assets.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kCurvePoints = 201;  // of a distribution: every half percent

// What a chart and the table need of one latency, in ms.
Json Latency(const Stat& stat) {
  Json out;
  out["n"] = stat.n();
  out["curve"] = Json::array();
  if (stat.n() == 0) return out;
  out["mean"] = stat.mean * 1e3;
  out["p50"] = stat.median * 1e3;
  out["p90"] = stat.p90 * 1e3;
  out["p95"] = stat.p95 * 1e3;
  out["p99"] = stat.p99 * 1e3;
  for (int i = 0; i < kCurvePoints; ++i) {
    const double value = Percentile(stat.sorted, i / (kCurvePoints - 1.0)) * 1e3;
    out["curve"].push_back(std::round(value * 1e3) * 1e-3);
  }
  return out;
}

Json Row(const BenchRow& row) {
  const Summary& s = row.summary;
  Json out;
  out["load"] = LevelName(row);
  out["level"] = std::isinf(row.level) ? Json() : Json(row.level);
  out["policy"] = row.policy;
  out["seconds"] = s.seconds;
  out["completed"] = s.completed;
  out["failed"] = s.failed;
  out["cancelled"] = s.cancelled;
  out["unfinished"] = s.unfinished;
  out["slow"] = s.slow;
  out["requestsPerSecond"] = s.RequestThroughput();
  out["outputPerSecond"] = s.OutputThroughput();
  out["tokensPerSecond"] = s.TotalThroughput();
  out["goodput"] = s.has_slo ? Json(s.Goodput()) : Json();
  out["good"] = s.good;
  out["attention"] = s.attention_share.n() > 0 ? Json(s.attention_share.mean) : Json();
  out["kv"] = s.kv_share.n() > 0 ? Json(s.kv_share.mean) : Json();
  out["errors"] = s.errors;
  out["ttft"] = Latency(s.intended_ttft);
  out["tpot"] = Latency(s.tpot);
  out["itl"] = Latency(s.itl);
  out["e2el"] = Latency(s.intended_e2el);
  out["queue"] = Latency(s.client_queue);
  return out;
}

// For a script element: no "</script>", no "<!--".
std::string ForScript(const Json& json) {
  return absl::StrReplaceAll(json.dump(-1, ' ', true, Json::error_handler_t::replace),
                             {{"<", "\\u003c"}});
}

}  // namespace

std::string BenchPage(const BenchReport& report) {
  Json data;
  data["date"] = report.date;
  data["command"] = report.command;
  data["server"] = report.server_version;
  data["backend"] = report.backend;
  data["model"] = report.model;
  data["dtype"] = report.dtype;
  data["seed"] = report.seed;
  data["slo"] = FormatSlo(report.slo);
  data["ended"] = report.ended;
  data["rows"] = Json::array();
  for (const BenchRow& row : report.rows) data["rows"].push_back(Row(row));
  return absl::StrReplaceAll(kBenchPageHtml,
                             {{"{{DATA}}", ForScript(data)}, {"{{SCRIPT}}", kBenchPageScript}});
}

}  // namespace entropyserve
