#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <exception>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/policy_params.h"
#include "server/metrics_scrape.h"

namespace entropyserve {
namespace {

using prometheus::Counter;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

// Seconds of whole phases. A short question on a GPU answers in tens of milliseconds, 1M tokens on
// a CPU take most of an hour.
const Buckets kPhaseSeconds = {0.05, 0.2, 0.5, 1, 2.5, 5, 10, 20, 80, 320, 2560};
const Buckets kInterTokenSeconds = {0.0025, 0.005, 0.01, 0.02, 0.03, 0.05,
                                    0.1,    0.2,   0.5,  1,    2.5,  10};
const Buckets kStepSeconds = {0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60};
const Buckets kCompressionSeconds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5};
const Buckets kPromptTokens = {256, 1024, 4096, 16384, 32768, 131072, 524288, 1048576};
const Buckets kStepTokens = {0, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768};
const Buckets kStepSequences = {0, 1, 2, 4, 8, 16, 32, 64, 128, 256};
const Buckets kSpeedups = {0.5, 0.8, 1, 1.5, 2, 3, 4, 6, 8, 16};
const Buckets kShares = {0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1};
// Nats; ln(131072) = 11.8 is the most that 1M tokens in blocks of 8 allow. Real heads of the box
// estimator lie near 0; e_t, under which one counts as rigid, is 1e-5.
const Buckets kEntropies = {1e-5, 1e-3, 0.01, 0.1, 0.5, 1, 2, 4, 8, 12};

constexpr const char* kGenerate = "Generate";
constexpr const char* kOtherMethods[] = {
    "Compare",   "CreateSession", "DeleteSession", "Detokenize", "ForkSession", "GetModel",
    "GetServer", "GetSession",    "ListSessions",  "Tokenize",   "other"};
constexpr const char* kUnknown = "UNKNOWN";
constexpr const char* kStreamCodes[] = {
    "OK",          "CANCELLED",        "DATA_LOSS", "DEADLINE_EXCEEDED",  "FAILED_PRECONDITION",
    "INTERNAL",    "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED",
    "UNAVAILABLE", "UNIMPLEMENTED",    kUnknown};
// Short calls have no deadline of their own and are rarely cancelled.
constexpr const char* kOtherCodes[] = {
    "OK",        "FAILED_PRECONDITION", "INTERNAL",        "INVALID_ARGUMENT",
    "NOT_FOUND", "RESOURCE_EXHAUSTED",  "UNAUTHENTICATED", "UNAVAILABLE",
    kUnknown};

// The value itself when it is one of `known`, else `fallback`.
const char* OneOf(const std::string& value, std::span<const char* const> known,
                  const char* fallback) {
  for (const char* const name : known) {
    if (value == name) return name;
  }
  return fallback;
}

// Prompt lengths as label values: the smallest class that holds the prompt.
struct PromptClass {
  int64_t most;  // tokens
  const char* name;
};
constexpr PromptClass kPromptClasses[] = {
    {1 << 10, "1k"},     {4 << 10, "4k"},     {16 << 10, "16k"},  {32 << 10, "32k"},
    {128 << 10, "128k"}, {512 << 10, "512k"}, {INT64_MAX, "more"}};

// Labels of a session that left a tier; `to` is "none" when it was dropped.
std::map<std::string, std::string> MoveLabels(SessionMove why, SessionTier from, SessionTier to) {
  const char* const target = from == to || to == SessionTier::kDevice ? "none" : TierName(to);
  switch (why) {
    case SessionMove::kPressure:
      return {{"to", target}, {"reason", "pressure"}};
    case SessionMove::kLimit:
      return {{"to", target}, {"reason", "limit"}};
    case SessionMove::kRestored:
      return {{"to", "device"}, {"reason", "restored"}};
    case SessionMove::kExpired:
      return {{"to", "none"}, {"reason", "expired"}};
    case SessionMove::kLost:
      return {{"to", "none"}, {"reason", "lost"}};
    case SessionMove::kDeleted:
      break;
  }
  return {{"to", "none"}, {"reason", "deleted"}};
}

const char* OutcomeName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "failed";
    default:
      return "completed";
  }
}

}  // namespace

const char* TierName(SessionTier tier) {
  constexpr const char* kNames[kSessionTiers] = {"device", "host", "disk"};
  return kNames[static_cast<size_t>(tier)];
}

// Shared with the engine, which may live longer than Metrics.
struct Metrics::Impl final : public EngineObserver {
  explicit Impl(const std::string& version);

  void OnStep(const StepInfo& step) override;
  void OnPrefill(const PrefillInfo& prefill) override;
  void OnCompress(double seconds, int64_t bytes_before, int64_t bytes_after) override;
  void OnSessionMove(SessionTier from, SessionTier to, SessionMove why) override;
  void ObserveSpeedup(const PrefillInfo& prefill);

  Histogram& AddHistogram(const char* name, const char* help, const Buckets& buckets) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry).Add({}, buckets);
  }
  prometheus::Family<Histogram>& HistogramFamily(const char* name, const char* help) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry);
  }
  prometheus::Family<Counter>& CounterFamily(const char* name, const char* help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(*registry);
  }

  std::shared_ptr<prometheus::Registry> registry = std::make_shared<prometheus::Registry>();

  // Calls and requests.
  prometheus::Family<Counter>& requests;
  std::vector<Histogram*> ttft;                            // by kPromptClasses
  std::map<std::string_view, Histogram*> request_seconds;  // by OutcomeName
  Histogram &inter_token, &queue, &prefill, &decode, &prompt_tokens;
  // What the method does.
  Counter &flops_executed, &flops_dense;
  Histogram &executed_share, &head_entropy, &rigid_share;
  DenseCalibration dense{{}};
  Histogram* speedup = nullptr;  // set with `dense`
  Counter &compression_input, &compression_output;
  Histogram &compression_ratio, &compression_seconds;
  // The engine.
  Histogram &step_seconds, &step_prefill_tokens, &step_decodes;
  prometheus::Family<Counter>& session_moves;

  std::shared_ptr<GaugeCollector> collector;
  std::unique_ptr<prometheus::Exposer> exposer;  // last: it reads the rest
};

Metrics::Impl::Impl(const std::string& version)
    : requests(CounterFamily("entropyserve_requests_total",
                             "Finished calls by method and canonical status code.")),
      inter_token(AddHistogram("entropyserve_inter_token_seconds",
                               "Between token events of one stream.", kInterTokenSeconds)),
      queue(AddHistogram("entropyserve_queue_seconds",
                         "From submission to the engine until work on the request began, or until "
                         "it ended without any.",
                         kPhaseSeconds)),
      prefill(AddHistogram("entropyserve_prefill_seconds",
                           "Reading the prompt, of completed requests; steps are shared with "
                           "others.",
                           kPhaseSeconds)),
      decode(AddHistogram("entropyserve_decode_seconds",
                          "From the end of the prompt to the end of the answer, of completed "
                          "requests.",
                          kPhaseSeconds)),
      prompt_tokens(AddHistogram("entropyserve_request_prompt_tokens",
                                 "Prompt length of accepted requests.", kPromptTokens)),
      flops_executed(CounterFamily("entropyserve_attention_flops_executed_total",
                                   "Attention FLOPs of prompts that were executed: 4 head_dim per "
                                   "query, key and head inside the mask, estimators included.")
                         .Add({})),
      flops_dense(CounterFamily("entropyserve_attention_flops_dense_total",
                                "Attention FLOPs that dense attention would have executed for the "
                                "same prompts.")
                      .Add({})),
      executed_share(AddHistogram("entropyserve_attention_executed_share",
                                  "Per prompt, attention FLOPs executed over those of dense "
                                  "attention; over 1 where the estimator saved nothing.",
                                  kShares)),
      head_entropy(AddHistogram("entropyserve_head_entropy_nats",
                                "Entropy of the last full segment of each layer and kv head whose "
                                "budget the entropy rule set.",
                                kEntropies)),
      rigid_share(AddHistogram("entropyserve_rigid_share",
                               "Per prompt under the entropy rule, the share of sparse layers' kv "
                               "heads that stayed rigid.",
                               kShares)),
      compression_input(CounterFamily("entropyserve_kv_compression_input_bytes_total",
                                      "KV bytes of sequences when their compression began.")
                            .Add({})),
      compression_output(CounterFamily("entropyserve_kv_compression_output_bytes_total",
                                       "KV bytes of the same sequences after it.")
                             .Add({})),
      compression_ratio(AddHistogram("entropyserve_kv_compression_ratio",
                                     "Per compression, KV bytes after over bytes before.",
                                     kShares)),
      compression_seconds(AddHistogram("entropyserve_kv_compression_seconds",
                                       "Choosing and gathering what a compression keeps.",
                                       kCompressionSeconds)),
      step_seconds(AddHistogram("entropyserve_step_seconds", "Engine steps.", kStepSeconds)),
      step_prefill_tokens(AddHistogram("entropyserve_step_prefill_tokens",
                                       "Prompt tokens read in one step.", kStepTokens)),
      step_decodes(AddHistogram("entropyserve_step_decode_sequences",
                                "Sequences that decoded a token in one step.", kStepSequences)),
      session_moves(CounterFamily("entropyserve_session_moves_total",
                                  "Sessions that left a tier, by where they went (none: dropped) "
                                  "and why.")) {
  prometheus::BuildGauge()
      .Name("entropyserve_build_info")
      .Help("Always 1; what runs is in the labels.")
      .Register(*registry)
      .Add({{"version", version}})
      .Set(1);
  auto& first = HistogramFamily("entropyserve_time_to_first_token_seconds",
                                "From a Generate call's arrival to its first token; prompt: the "
                                "most tokens of its length class, k = 1024.");
  for (const PromptClass& c : kPromptClasses)
    ttft.push_back(&first.Add({{"prompt", c.name}}, kPhaseSeconds));
  auto& whole = HistogramFamily("entropyserve_request_seconds",
                                "From submission to the engine to the end, by outcome.");
  for (const char* name : {"completed", "cancelled", "failed"})
    request_seconds[name] = &whole.Add({{"outcome", name}}, kPhaseSeconds);
  // From the start, so that `rate` sees the first of each.
  for (const char* code : kStreamCodes) requests.Add({{"method", kGenerate}, {"code", code}});
  for (const SessionTier to : {SessionTier::kDevice, SessionTier::kHost, SessionTier::kDisk}) {
    for (const SessionMove why :
         {SessionMove::kPressure, SessionMove::kLimit, SessionMove::kRestored,
          SessionMove::kExpired, SessionMove::kLost, SessionMove::kDeleted}) {
      session_moves.Add(MoveLabels(why, SessionTier::kDevice, to));
    }
  }
}

void Metrics::Impl::OnStep(const StepInfo& step) {
  step_seconds.Observe(step.seconds);
  step_prefill_tokens.Observe(static_cast<double>(step.prefill_tokens));
  step_decodes.Observe(static_cast<double>(step.decodes));
}

void Metrics::Impl::OnPrefill(const PrefillInfo& prefill_info) {
  const Receipt& receipt = *prefill_info.receipt;
  flops_executed.Increment(receipt.attention_flops_executed);
  flops_dense.Increment(receipt.attention_flops_dense);
  if (receipt.attention_flops_dense > 0) {
    executed_share.Observe(receipt.attention_flops_executed / receipt.attention_flops_dense);
  }
  ObserveSpeedup(prefill_info);
  const std::span<const float> entropy = prefill_info.entropy;
  if (entropy.empty()) return;  // another rule, or a prompt too short to judge a head
  rigid_share.Observe(receipt.rigid_share);
  // One lock for all heads.
  std::vector<double> counts(kEntropies.size() + 1);
  for (const float nats : entropy) {
    const auto at = std::lower_bound(kEntropies.begin(), kEntropies.end(), double{nats});
    ++counts[static_cast<size_t>(at - kEntropies.begin())];
  }
  head_entropy.ObserveMultiple(counts, std::accumulate(entropy.begin(), entropy.end(), 0.0));
}

void Metrics::Impl::ObserveSpeedup(const PrefillInfo& prefill_info) {
  const Receipt& receipt = *prefill_info.receipt;
  if (speedup == nullptr || receipt.cached_tokens > 0 || !prefill_info.alone) return;
  const std::optional<double> seconds = dense.Seconds(receipt.prompt_tokens);
  if (seconds && prefill_info.step_seconds > 0) {
    speedup->Observe(*seconds / prefill_info.step_seconds);
  }
}

void Metrics::Impl::OnCompress(double seconds, int64_t bytes_before, int64_t bytes_after) {
  compression_seconds.Observe(seconds);
  compression_input.Increment(static_cast<double>(bytes_before));
  compression_output.Increment(static_cast<double>(bytes_after));
  if (bytes_before > 0) {
    compression_ratio.Observe(static_cast<double>(bytes_after) / static_cast<double>(bytes_before));
  }
}

void Metrics::Impl::OnSessionMove(SessionTier from, SessionTier to, SessionMove why) {
  session_moves.Add(MoveLabels(why, from, to)).Increment();
}

Metrics::Metrics(const std::string& version) : impl_(std::make_shared<Impl>(version)) {}

Metrics::~Metrics() { StopListening(); }

void Metrics::SetModel(const ModelLabels& model) {
  const auto info = [this](const char* name, const char* help,
                           const std::map<std::string, std::string>& labels) {
    prometheus::BuildGauge().Name(name).Help(help).Register(*impl_->registry).Add(labels).Set(1);
  };
  info("entropyserve_model_info", "Always 1; the served model is in the labels.",
       {{"model", model.name},
        {"architecture", model.architecture},
        {"backend", model.backend},
        {"dtype", model.dtype}});
  info("entropyserve_kv_cache_info",
       "Always 1; labels as the inference gateway reads them: tokens of a block, and how many "
       "blocks over all layers and kv heads fit.",
       {{"block_size", absl::StrCat(kPageTokens)},
        {"num_gpu_blocks", absl::StrCat(model.kv_blocks)}});
}

void Metrics::SetDenseCalibration(const DenseCalibration& dense) {
  auto& seconds =
      prometheus::BuildGauge()
          .Name("entropyserve_dense_prefill_seconds")
          .Help(
              "Calibration of --calibrate-dense-tokens: seconds that this server took, before it "
              "took requests, to read one prompt of random tokens under policy full with nothing "
              "else running; prompt: its tokens, k = 1024.")
          .Register(*impl_->registry);
  for (const DensePrefill& point : dense.points())
    seconds.Add({{"prompt", LengthName(point.tokens)}}).Set(point.seconds);
  impl_->dense = dense;
  impl_->speedup = &impl_->AddHistogram(
      "entropyserve_prefill_speedup_ratio",
      "Per prompt, dense seconds over measured seconds of its prefill. Dense: "
      "entropyserve_dense_prefill_seconds at the prompt's length, seconds per token interpolated "
      "linearly between two calibrated lengths. Measured: the engine steps that read the prompt, "
      "without the time between them. Only prompts within the calibrated lengths, without tokens "
      "cached by a session, all of whose steps did nothing for another request.",
      kSpeedups);
}

void Metrics::CountRequest(const std::string& method, const std::string& code) {
  const bool stream = method == kGenerate || method == "Compare";
  const char* const known = method == kGenerate ? kGenerate : OneOf(method, kOtherMethods, "other");
  const std::span<const char* const> codes =
      stream ? std::span<const char* const>(kStreamCodes) : kOtherCodes;
  impl_->requests.Add({{"method", known}, {"code", OneOf(code, codes, kUnknown)}}).Increment();
}

void Metrics::ObservePromptTokens(int64_t tokens) {
  impl_->prompt_tokens.Observe(static_cast<double>(tokens));
}

void Metrics::ObserveTimeToFirstToken(double seconds, int64_t prompt_tokens) {
  size_t i = 0;
  while (prompt_tokens > kPromptClasses[i].most) ++i;
  impl_->ttft[i]->Observe(seconds);
}

void Metrics::ObserveInterToken(double seconds) { impl_->inter_token.Observe(seconds); }

void Metrics::ObserveFinished(FinishReason reason, const Receipt& receipt) {
  const std::string_view outcome = OutcomeName(reason);
  impl_->request_seconds.at(outcome)->Observe(receipt.total_seconds);
  impl_->queue.Observe(receipt.queue_seconds);
  if (outcome != "completed") return;  // its phases may have been cut short
  impl_->prefill.Observe(receipt.prefill_seconds);
  impl_->decode.Observe(receipt.decode_seconds);
}

std::shared_ptr<EngineObserver> Metrics::observer() const { return impl_; }

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
  std::vector<prometheus::MetricFamily> families = impl_->registry->Collect();
  for (prometheus::MetricFamily& family : ScrapeFamilies(gauges))
    families.push_back(std::move(family));
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace entropyserve
