#include "server/metrics_scrape.h"

#include <prometheus/client_metric.h>

#include <algorithm>
#include <string>

namespace entropyserve {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

double Number(int64_t value) { return static_cast<double>(value); }

ClientMetric Metric(MetricType type, double value) {
  ClientMetric metric;
  if (type == MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  return metric;
}

MetricFamily Single(const char* name, const char* help, MetricType type, double value) {
  MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  family.metric.push_back(Metric(type, value));
  return family;
}

// A gauge with one label.
MetricFamily Labelled(const char* name, const char* help, const char* label,
                      const std::vector<std::pair<std::string, int64_t>>& values) {
  MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = MetricType::Gauge;
  for (const auto& [key, value] : values) {
    ClientMetric metric = Metric(MetricType::Gauge, Number(value));
    metric.label = {{label, key}};
    family.metric.push_back(std::move(metric));
  }
  return family;
}

double KvUsage(const EngineStats& e) {
  if (e.pages_total == 0) return 0;  // the model is not loaded
  return std::clamp(Number(e.pages_used) / Number(e.pages_total), 0.0, 1.0);
}

std::vector<MetricFamily> Unlabelled(const ServerGauges& gauges) {
  struct Row {
    const char* name;
    const char* help;
    MetricType type;
    double value;
  };
  const EngineStats& e = gauges.engine;
  constexpr MetricType kGauge = MetricType::Gauge, kCounter = MetricType::Counter;
  const Row rows[] = {
      {"entropyserve_ready", "1 when the service answers requests.", kGauge,
       gauges.ready ? 1.0 : 0.0},
      {"entropyserve_open_streams", "Generate and Compare calls that are open.", kGauge,
       Number(gauges.open_streams)},
      {"entropyserve_running_requests", "Requests the engine works on.", kGauge, Number(e.running)},
      {"entropyserve_waiting_requests", "Requests in the engine's queue.", kGauge,
       Number(e.waiting)},
      {"entropyserve_queued_tokens", "Prompt tokens in the engine's queue.", kGauge,
       Number(e.queued_tokens)},
      {"entropyserve_kv_pages_used", "Pages of the KV cache in use.", kGauge, Number(e.pages_used)},
      {"entropyserve_kv_pages", "Pages of the KV cache.", kGauge, Number(e.pages_total)},
      {"entropyserve_kv_page_bytes", "Bytes of one page: 64 tokens of one kv head of one layer.",
       kGauge, Number(e.page_bytes)},
      {"entropyserve_kv_usage_ratio", "Pages in use over pages of the KV cache, 0 to 1.", kGauge,
       KvUsage(e)},
      {"entropyserve_kv_physical_bytes",
       "Bytes of the pages in use; a page that forks share counts once.", kGauge,
       Number(e.pages_used * e.page_bytes)},
      {"entropyserve_kv_logical_bytes",
       "Bytes that the KV of every cached position would take uncompressed and unshared.", kGauge,
       Number(e.kv_logical_bytes)},
      {"entropyserve_admitted_total", "Requests that the engine accepted.", kCounter,
       Number(e.admitted)},
      {"entropyserve_completed_total", "Accepted requests that finished.", kCounter,
       Number(e.completed)},
      {"entropyserve_cancelled_total",
       "Accepted requests that their caller or a deadline cancelled.", kCounter,
       Number(e.cancelled)},
      {"entropyserve_failed_total", "Accepted requests that failed.", kCounter, Number(e.failed)},
      {"entropyserve_prompt_tokens_total", "Prompt tokens read.", kCounter,
       Number(e.prompt_tokens)},
      {"entropyserve_generated_tokens_total", "Tokens generated.", kCounter,
       Number(e.generated_tokens)},
      {"entropyserve_steps_total", "Engine steps.", kCounter, Number(e.steps)},
  };
  std::vector<MetricFamily> families;
  for (const Row& row : rows) families.push_back(Single(row.name, row.help, row.type, row.value));
  return families;
}

}  // namespace

std::vector<MetricFamily> ScrapeFamilies(const ServerGauges& gauges) {
  const EngineStats& e = gauges.engine;
  std::vector<MetricFamily> families = Unlabelled(gauges);
  families.push_back(Labelled(
      "entropyserve_encode_lane_bytes",
      "Bytes of requests that wait to be tokenized, or for an answer about their session.", "lane",
      {{"short", gauges.short_lane_bytes},
       {"long", gauges.long_lane_bytes},
       {"session", gauges.session_lane_bytes}}));
  std::vector<std::pair<std::string, int64_t>> sessions, bytes, memory;
  for (int tier = 0; tier < kSessionTiers; ++tier) {
    const char* const name = TierName(static_cast<SessionTier>(tier));
    sessions.emplace_back(name, e.tier_sessions[tier]);
    bytes.emplace_back(name, e.tier_bytes[tier]);
  }
  for (const MemoryEntry& entry : e.memory) memory.emplace_back(entry.name, entry.bytes);
  families.push_back(
      Labelled("entropyserve_sessions", "Sessions held, by where they are.", "tier", sessions));
  families.push_back(Labelled("entropyserve_session_bytes",
                              "KV bytes of sessions after their last turn, by where they are.",
                              "tier", bytes));
  families.push_back(Labelled("entropyserve_memory_bytes",
                              "Memory that the engine holds or has promised, by its use.", "part",
                              memory));
  return families;
}

}  // namespace entropyserve
