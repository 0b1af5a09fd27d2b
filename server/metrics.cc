#include "server/metrics.h"

#include <prometheus/client_metric.h>
#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <exception>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace entropyserve {
namespace {

using prometheus::Histogram;
using prometheus::MetricFamily;
using prometheus::MetricType;

// Seconds. A short question on a GPU answers in tens of milliseconds, 1M tokens on a CPU take an
// hour.
const Histogram::BucketBoundaries kTtftBuckets = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,    2.5,
                                                  5,    10,    25,   50,  100,  250, 1000, 4000};
const Histogram::BucketBoundaries kInterTokenBuckets = {
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5};
// Tokens: powers of four up to 1M.
const Histogram::BucketBoundaries kPromptBuckets = {64,    256,   1024,   4096,   16384,
                                                    32768, 65536, 131072, 262144, 1048576};

MetricFamily Single(const char* name, const char* help, MetricType type, double value) {
  MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = type;
  prometheus::ClientMetric metric;
  if (type == MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  family.metric.push_back(std::move(metric));
  return family;
}

std::vector<MetricFamily> Families(const ServerGauges& gauges) {
  struct Row {
    const char* name;
    const char* help;
    MetricType type;
    double value;
  };
  const EngineStats& e = gauges.engine;
  const auto d = [](int64_t value) { return static_cast<double>(value); };
  constexpr MetricType kGauge = MetricType::Gauge, kCounter = MetricType::Counter;
  const Row rows[] = {
      {"entropyserve_ready", "1 when the service answers requests.", kGauge,
       gauges.ready ? 1.0 : 0.0},
      {"entropyserve_open_streams", "Generate calls that are open.", kGauge,
       d(gauges.open_streams)},
      {"entropyserve_running_requests", "Requests the engine works on.", kGauge, d(e.running)},
      {"entropyserve_waiting_requests", "Requests in the engine's queue.", kGauge, d(e.waiting)},
      {"entropyserve_queued_tokens", "Prompt tokens in the engine's queue.", kGauge,
       d(e.queued_tokens)},
      {"entropyserve_sessions", "Sessions held.", kGauge, d(e.sessions)},
      {"entropyserve_kv_pages_used", "Pages of the KV cache in use.", kGauge, d(e.pages_used)},
      {"entropyserve_kv_pages_total", "Pages of the KV cache.", kGauge, d(e.pages_total)},
      {"entropyserve_kv_page_bytes", "Bytes of one page.", kGauge, d(e.page_bytes)},
      {"entropyserve_weight_bytes", "Bytes of the weights.", kGauge, d(e.weight_bytes)},
      {"entropyserve_activation_bytes", "Bytes of activations and scratch.", kGauge,
       d(e.activation_bytes)},
      {"entropyserve_admitted_total", "Requests the engine admitted.", kCounter, d(e.admitted)},
      {"entropyserve_completed_total", "Requests that finished.", kCounter, d(e.completed)},
      {"entropyserve_cancelled_total", "Requests that were cancelled.", kCounter, d(e.cancelled)},
      {"entropyserve_failed_total", "Requests that failed.", kCounter, d(e.failed)},
      {"entropyserve_prompt_tokens_total", "Prompt tokens read.", kCounter, d(e.prompt_tokens)},
      {"entropyserve_generated_tokens_total", "Tokens generated.", kCounter, d(e.generated_tokens)},
      {"entropyserve_steps_total", "Engine steps.", kCounter, d(e.steps)},
  };
  std::vector<MetricFamily> families;
  for (const Row& row : rows) families.push_back(Single(row.name, row.help, row.type, row.value));

  MetricFamily lanes;
  lanes.name = "entropyserve_encode_lane_bytes";
  lanes.help = "Bytes of requests that wait to be tokenized, or for an answer about their session.";
  lanes.type = kGauge;
  for (const auto& [lane, bytes] :
       {std::pair{"short", gauges.short_lane_bytes}, std::pair{"long", gauges.long_lane_bytes},
        std::pair{"session", gauges.session_lane_bytes}}) {
    prometheus::ClientMetric metric;
    metric.label = {{"lane", lane}};
    metric.gauge.value = d(bytes);
    lanes.metric.push_back(std::move(metric));
  }
  families.push_back(std::move(lanes));
  return families;
}

class GaugeCollector final : public prometheus::Collectable {
 public:
  explicit GaugeCollector(std::function<ServerGauges()> gauges) : gauges_(std::move(gauges)) {}
  std::vector<MetricFamily> Collect() const override { return Families(gauges_()); }

 private:
  const std::function<ServerGauges()> gauges_;
};

}  // namespace

struct Metrics::Impl {
  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();
  prometheus::Family<prometheus::Counter>* requests = nullptr;
  Histogram* ttft = nullptr;
  Histogram* inter_token = nullptr;
  Histogram* prompt_tokens = nullptr;
  std::shared_ptr<GaugeCollector> collector;
  std::unique_ptr<prometheus::Exposer> exposer;  // last: it reads the rest
};

Metrics::Metrics(const std::string& version) : impl_(std::make_unique<Impl>()) {
  prometheus::Registry& registry = *impl_->registry;
  prometheus::BuildGauge()
      .Name("entropyserve_build_info")
      .Help("Always 1; what runs is in the labels.")
      .Register(registry)
      .Add({{"version", version}})
      .Set(1);
  impl_->requests = &prometheus::BuildCounter()
                         .Name("entropyserve_requests_total")
                         .Help("Finished calls by method and status code.")
                         .Register(registry);
  const auto histogram = [&](const char* name, const char* help,
                             const Histogram::BucketBoundaries& buckets) {
    return &prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
  };
  impl_->ttft = histogram("entropyserve_time_to_first_token_seconds",
                          "From the call's arrival to its first token.", kTtftBuckets);
  impl_->inter_token = histogram("entropyserve_inter_token_seconds",
                                 "Between token events of one stream.", kInterTokenBuckets);
  impl_->prompt_tokens = histogram("entropyserve_request_prompt_tokens",
                                   "Prompt length of accepted requests.", kPromptBuckets);
}

Metrics::~Metrics() = default;

void Metrics::SetModel(const std::string& name, const std::string& architecture,
                       const std::string& backend, const std::string& dtype) {
  prometheus::BuildGauge()
      .Name("entropyserve_model_info")
      .Help("Always 1; the served model is in the labels.")
      .Register(*impl_->registry)
      .Add(
          {{"model", name}, {"architecture", architecture}, {"backend", backend}, {"dtype", dtype}})
      .Set(1);
}

void Metrics::CountRequest(const std::string& method, const std::string& code) {
  impl_->requests->Add({{"method", method}, {"code", code}}).Increment();
}
void Metrics::ObserveTimeToFirstToken(double seconds) { impl_->ttft->Observe(seconds); }
void Metrics::ObserveInterToken(double seconds) { impl_->inter_token->Observe(seconds); }
void Metrics::ObservePromptTokens(double tokens) { impl_->prompt_tokens->Observe(tokens); }

absl::Status Metrics::Listen(const std::string& address, std::function<ServerGauges()> gauges) {
  constexpr size_t kThreads = 2;
  try {
    impl_->exposer = std::make_unique<prometheus::Exposer>(address, kThreads);
  } catch (const std::exception&) {  // its text names no cause
    return absl::UnavailableError(absl::StrCat("cannot listen on ", address));
  }
  impl_->collector = std::make_shared<GaugeCollector>(std::move(gauges));
  impl_->exposer->RegisterCollectable(impl_->registry);
  impl_->exposer->RegisterCollectable(impl_->collector);
  return absl::OkStatus();
}

void Metrics::StopListening() { impl_->exposer.reset(); }

int Metrics::port() const {
  if (impl_->exposer == nullptr) return 0;
  const std::vector<int> ports = impl_->exposer->GetListeningPorts();
  return ports.empty() ? 0 : ports.front();
}

std::string Metrics::Render(const ServerGauges& gauges) const {
  std::vector<MetricFamily> families = impl_->registry->Collect();
  for (MetricFamily& family : Families(gauges)) families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace entropyserve
