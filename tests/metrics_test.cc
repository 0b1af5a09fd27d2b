// What the server exports: values, labels, and that no caller can add to the number of series.
#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::HasSubstr;

// Names with labels of everything that is exported, without values.
std::set<std::string> SeriesOf(const std::string& text) {
  std::set<std::string> series;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line.front() != '#') series.insert(line.substr(0, line.rfind(' ')));
  }
  return series;
}

std::set<std::string> SeriesOf(const Metrics& metrics) {
  ServerGauges gauges;
  gauges.engine.memory = {{"weights", 1}, {"kv_pages", 1}, {"activations", 1}, {"session_host", 1}};
  return SeriesOf(metrics.Render(gauges));
}

void ExpectLines(const std::string& text, const std::vector<std::string>& lines) {
  for (const std::string& line : lines) EXPECT_THAT(text, HasSubstr(line + "\n"));
}

// Everything that can be told to Metrics, with the i-th of endlessly many callers.
void Storm(Metrics* metrics, int i) {
  Receipt receipt;
  receipt.seed = static_cast<uint64_t>(i);
  receipt.prompt_tokens = int64_t{i} * i;
  receipt.prefill_policy = absl::StrCat("policy", i);
  receipt.attention_flops_dense = receipt.attention_flops_executed = i;
  metrics->ObservePromptTokens(receipt.prompt_tokens);
  metrics->ObserveTimeToFirstToken(i * 0.01, receipt.prompt_tokens);
  metrics->ObserveInterToken(i * 1e-4);
  metrics->ObserveFinished(static_cast<FinishReason>(i % 6), receipt);
  metrics->CountRequest(absl::StrCat("Method", i), absl::StrCat("CODE_", i));
  EngineObserver& engine = *metrics->observer();
  const float entropy[] = {static_cast<float>(i), 0.0f};
  engine.OnStep({.seconds = i * 1e-3, .prefill_tokens = i, .decodes = i, .prefills = 1});
  engine.OnPrefill(
      {.receipt = &receipt, .entropy = entropy, .step_seconds = i * 1e-3, .alone = true});
  engine.OnCompress(i * 1e-3, i + 1, i);
  engine.OnSessionMove(static_cast<SessionTier>(i % 3), static_cast<SessionTier>(i / 3 % 3),
                       static_cast<SessionMove>(i / 9 % 6));
}

TEST(MetricsTest, NoCallerCanAddSeries) {
  Metrics metrics("test");
  metrics.SetModel({.name = "m", .architecture = "a", .backend = "b", .dtype = "d"});
  std::vector<DensePrefill> dense;  // as many as a context of 1M tokens gives
  for (int64_t tokens = 4096; tokens <= 1 << 20; tokens *= 2) dense.push_back({tokens, 1});
  metrics.SetDenseCalibration(DenseCalibration(dense));
  Storm(&metrics, 0);
  // Every method that exists, with every code that exists.
  for (const char* method :
       {"Generate", "Compare", "Tokenize", "Detokenize", "GetModel", "GetServer", "CreateSession",
        "GetSession", "ListSessions", "ForkSession", "DeleteSession"}) {
    for (int code = 0; code <= 16; ++code) {
      metrics.CountRequest(method, absl::StatusCodeToString(static_cast<absl::StatusCode>(code)));
    }
  }
  for (const char* code : {"OK", "INTERNAL", "NOT_FOUND", "UNAVAILABLE", "INVALID_ARGUMENT",
                           "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"}) {
    metrics.CountRequest("NoSuchMethod", code);
  }
  const std::set<std::string> before = SeriesOf(metrics);
  EXPECT_LT(before.size(), 500u);
  constexpr int kCallers = 100'000;
  for (int i = 0; i < kCallers; ++i) Storm(&metrics, i);
  EXPECT_EQ(SeriesOf(metrics), before);
  ExpectLines(metrics.Render({}),
              {absl::StrCat("entropyserve_requests_total{code=\"UNKNOWN\",method=\"other\"} ",
                            kCallers + 1)});
}

TEST(MetricsTest, CompressionsAndPrefillsAreSummed) {
  Metrics metrics("test");
  EngineObserver& engine = *metrics.observer();
  Receipt sparse, dense;
  sparse.attention_flops_executed = 300;
  dense.attention_flops_executed = 1000;
  sparse.attention_flops_dense = dense.attention_flops_dense = 1000;
  sparse.rigid_share = 0.25;
  const std::vector<float> entropy = {0.0f, 1e-5f, 2e-5f, 5.0f};
  engine.OnPrefill({.receipt = &sparse, .entropy = entropy});
  engine.OnPrefill({.receipt = &dense, .entropy = {}});
  engine.OnCompress(0.5, 1000, 50);
  engine.OnCompress(0.25, 3000, 150);
  engine.OnStep({.seconds = 0.5, .prefill_tokens = 512, .decodes = 3, .prefills = 1});
  engine.OnSessionMove(SessionTier::kDevice, SessionTier::kHost, SessionMove::kPressure);
  engine.OnSessionMove(SessionTier::kDisk, SessionTier::kDisk, SessionMove::kLimit);
  engine.OnSessionMove(SessionTier::kDisk, SessionTier::kDevice, SessionMove::kRestored);
  ExpectLines(metrics.Render({}),
              {"entropyserve_attention_flops_executed_total 1300",
               "entropyserve_attention_flops_dense_total 2000",
               "entropyserve_attention_executed_share_bucket{le=\"0.2\"} 0",
               "entropyserve_attention_executed_share_bucket{le=\"0.3\"} 1",
               "entropyserve_attention_executed_share_bucket{le=\"1\"} 2",
               "entropyserve_rigid_share_count 1",
               "entropyserve_rigid_share_sum 0.25",
               "entropyserve_head_entropy_nats_bucket{le=\"0.001\"} 3",
               "entropyserve_head_entropy_nats_bucket{le=\"4\"} 3",
               "entropyserve_head_entropy_nats_count 4",
               "entropyserve_kv_compression_input_bytes_total 4000",
               "entropyserve_kv_compression_output_bytes_total 200",
               "entropyserve_kv_compression_ratio_bucket{le=\"0.05\"} 2",
               "entropyserve_kv_compression_seconds_sum 0.75",
               "entropyserve_step_prefill_tokens_bucket{le=\"128\"} 0",
               "entropyserve_step_prefill_tokens_bucket{le=\"512\"} 1",
               "entropyserve_step_decode_sequences_sum 3",
               "entropyserve_session_moves_total{reason=\"pressure\",to=\"host\"} 1",
               "entropyserve_session_moves_total{reason=\"limit\",to=\"none\"} 1",
               "entropyserve_session_moves_total{reason=\"restored\",to=\"device\"} 1"});
}

TEST(MetricsTest, SpeedupIsDenseSecondsOverThoseOfAPrefillAlone) {
  Metrics metrics("test");
  EngineObserver& engine = *metrics.observer();
  const auto prefill = [&engine](int64_t prompt, int64_t cached, double seconds, bool alone) {
    Receipt receipt;
    receipt.prompt_tokens = prompt;
    receipt.cached_tokens = cached;
    engine.OnPrefill({.receipt = &receipt, .step_seconds = seconds, .alone = alone});
  };
  prefill(8192, 0, 1, true);
  EXPECT_THAT(metrics.Render({}), testing::Not(HasSubstr("speedup"))) << "nothing to compare with";
  metrics.SetDenseCalibration(DenseCalibration({{4096, 1}, {8192, 4}}));
  prefill(8192, 0, 1, true);     // 4
  prefill(6144, 0, 0.75, true);  // 6144 (1 / 4096 + 4 / 8192) / 2 = 2.25 s: 3
  prefill(8193, 0, 1, true);     // longer than what was timed
  prefill(4095, 0, 1, true);     // shorter
  prefill(8192, 1, 1, true);     // a session's past
  prefill(8192, 0, 1, false);    // the machine was shared
  ExpectLines(metrics.Render({}), {"entropyserve_dense_prefill_seconds{prompt=\"4k\"} 1",
                                   "entropyserve_dense_prefill_seconds{prompt=\"8k\"} 4",
                                   "entropyserve_prefill_speedup_ratio_sum 7",
                                   "entropyserve_prefill_speedup_ratio_bucket{le=\"2\"} 0",
                                   "entropyserve_prefill_speedup_ratio_bucket{le=\"3\"} 1",
                                   "entropyserve_prefill_speedup_ratio_bucket{le=\"4\"} 2",
                                   "entropyserve_prefill_speedup_ratio_count 2"});
}

TEST(MetricsTest, TimeToFirstTokenIsClassedByPromptLength) {
  Metrics metrics("test");
  for (const int64_t tokens : {1, 1024, 1025, 131072, 131073, 524289})
    metrics.ObserveTimeToFirstToken(1, tokens);
  const std::string name = "entropyserve_time_to_first_token_seconds_count";
  ExpectLines(metrics.Render({}),
              {name + "{prompt=\"1k\"} 2", name + "{prompt=\"4k\"} 1", name + "{prompt=\"16k\"} 0",
               name + "{prompt=\"32k\"} 0", name + "{prompt=\"128k\"} 1",
               name + "{prompt=\"512k\"} 1", name + "{prompt=\"more\"} 1"});
}

TEST(MetricsTest, PhasesAreOfCompletedRequestsAndTheQueueIsEverybodys) {
  Metrics metrics("test");
  Receipt receipt;
  receipt.queue_seconds = 1;
  receipt.prefill_seconds = 2;
  receipt.decode_seconds = 4;
  receipt.total_seconds = 7;
  for (const FinishReason reason :
       {FinishReason::kStop, FinishReason::kLength, FinishReason::kCancelled, FinishReason::kError})
    metrics.ObserveFinished(reason, receipt);
  ExpectLines(
      metrics.Render({}),
      {"entropyserve_request_seconds_count{outcome=\"completed\"} 2",
       "entropyserve_request_seconds_count{outcome=\"cancelled\"} 1",
       "entropyserve_request_seconds_sum{outcome=\"failed\"} 7", "entropyserve_queue_seconds_sum 4",
       "entropyserve_prefill_seconds_sum 4", "entropyserve_decode_seconds_sum 8"});
}

TEST(MetricsTest, GaugesAreTheEnginesAndTheGatewaysMeanings) {
  Metrics metrics("test");
  ExpectLines(metrics.Render({}), {"entropyserve_kv_usage_ratio 0"});  // before the model
  metrics.SetModel(
      {.name = "m", .architecture = "qwen2", .backend = "cpu", .dtype = "bf16", .kv_blocks = 123});
  ServerGauges gauges;
  gauges.engine.pages_total = 400;
  gauges.engine.pages_used = 100;
  gauges.engine.page_bytes = 10;
  gauges.engine.kv_logical_bytes = 5000;
  gauges.engine.waiting = 2;
  gauges.engine.tier_sessions[1] = 3;
  gauges.engine.tier_bytes[2] = 77;
  gauges.engine.memory = {{"weights", 11}, {"session_host", 22}};
  ExpectLines(metrics.Render(gauges),
              {"entropyserve_kv_usage_ratio 0.25", "entropyserve_kv_pages 400",
               "entropyserve_kv_physical_bytes 1000", "entropyserve_kv_logical_bytes 5000",
               "entropyserve_waiting_requests 2", "entropyserve_sessions{tier=\"host\"} 3",
               "entropyserve_session_bytes{tier=\"disk\"} 77",
               "entropyserve_memory_bytes{part=\"weights\"} 11",
               "entropyserve_memory_bytes{part=\"session_host\"} 22",
               "entropyserve_kv_cache_info{block_size=\"64\",num_gpu_blocks=\"123\"} 1"});
}

// The engine may end after the server's other parts.
TEST(MetricsTest, TheObserverOutlivesMetrics) {
  std::shared_ptr<EngineObserver> observer;
  {
    Metrics metrics("test");
    ASSERT_TRUE(metrics.Listen("127.0.0.1:0", [] { return ServerGauges(); }).ok());
    observer = metrics.observer();
  }
  observer->OnStep({.seconds = 1});
}

class MetricsCallsTest : public ServerFixture {};

TEST_F(MetricsCallsTest, HundredsOfCallsWithTheirOwnIdsAddNoSeries) {
  StartServer();
  const auto call = [this](int i) {
    v1::GenerateRequest request = SessionRequest();
    request.set_request_id(absl::StrCat("request-", i));
    EXPECT_TRUE(Generate(request).status.ok());
    request.set_session_id(absl::StrCat("no-such-session-", i));
    EXPECT_FALSE(Generate(request).status.ok());
    EXPECT_EQ(CallRaw(absl::StrCat("Method", i), "").error_code(), grpc::StatusCode::UNIMPLEMENTED);
  };
  call(0);
  FakeEngine::WaitFor([this] { return core_->Idle(); });
  const std::set<std::string> before = SeriesOf(metrics_.Render(core_->Gauges()));
  for (int i = 1; i < 100; ++i) call(i);
  FakeEngine::WaitFor([this] { return core_->Idle(); });
  EXPECT_EQ(SeriesOf(metrics_.Render(core_->Gauges())), before);
}

}  // namespace
}  // namespace entropyserve
