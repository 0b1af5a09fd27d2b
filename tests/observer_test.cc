// What the engine tells its observer, and the byte counts of its stats, on a real (random) model.
#include "engine/observer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <future>
#include <memory>
#include <vector>

#include "engine/engine_factory.h"

namespace entropyserve {
namespace {

// Written by the engine thread; read once the request has finished.
struct Recorder final : public EngineObserver {
  void OnStep(const StepInfo& step) override {
    prompt_tokens += step.prefill_tokens;
    decodes += step.decodes;
  }
  void OnPrefill(const PrefillInfo& prefill) override {
    receipts.push_back(*prefill.receipt);
    entropy.assign(prefill.entropy.begin(), prefill.entropy.end());
  }
  void OnCompress(double, int64_t bytes_before, int64_t bytes_after) override {
    before.push_back(bytes_before);
    after.push_back(bytes_after);
  }

  int64_t prompt_tokens = 0, decodes = 0;
  std::vector<Receipt> receipts;
  std::vector<float> entropy;
  std::vector<int64_t> before, after;
};

struct Sink final : public EventSink {
  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent) override {}
  void OnFinished(FinishedEvent event) override { finished.set_value(std::move(event)); }
  std::promise<FinishedEvent> finished;
};

class ObserverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    EngineConfig config;
    config.model_path = "synthetic:tiny";
    config.backend = "cpu";
    config.threads = 1;
    config.options.kv_bytes = int64_t{64} << 20;
    config.observer = recorder_;
    auto loaded = LoadEngine(config);
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    loaded_ = *std::move(loaded);
  }

  FinishedEvent Generate(int tokens, int64_t max_new, const char* prefill,
                         const std::string& session = "") {
    EngineRequest request;
    for (int i = 0; i < tokens; ++i) request.prompt.push_back(3 + i * 7 % 200);
    request.session_id = session;
    request.owner = "o";
    request.sampling.max_new_tokens = max_new;
    request.sampling.ignore_eos = true;
    request.prefill = *PrefillPreset(prefill, "test");
    request.prefill.params.segment = 128;
    request.prefill.params.dense_prefix = 256;
    request.prefill.params.base = 256;
    request.kv = *KvPreset("latent", "test");
    request.kv.params.budget = 128;
    auto sink = std::make_shared<Sink>();
    auto finished = sink->finished.get_future();
    const auto id = loaded_.engine->Submit(std::move(request), sink);
    EXPECT_TRUE(id.ok()) << id.status();
    FinishedEvent end = finished.get();
    loaded_.engine->ListSessions("o");  // between steps: the last one has been told of, too
    return end;
  }

  const std::shared_ptr<Recorder> recorder_ = std::make_shared<Recorder>();
  LoadedEngine loaded_;
};

TEST_F(ObserverTest, HearsOfStepsPrefillAndCompression) {
  const FinishedEvent end = Generate(1500, 20, "entropy");
  ASSERT_TRUE(end.status.ok()) << end.status;
  EXPECT_EQ(recorder_->prompt_tokens, 1500);
  EXPECT_EQ(recorder_->decodes, 19);  // the last token is not read
  ASSERT_EQ(recorder_->receipts.size(), 1u);
  const Receipt& prefill = recorder_->receipts[0];
  EXPECT_EQ(prefill.attention_flops_executed, end.receipt.attention_flops_executed);
  EXPECT_EQ(prefill.attention_flops_dense, end.receipt.attention_flops_dense);
  EXPECT_LT(prefill.attention_flops_executed, prefill.attention_flops_dense);
  // A value for every kv head of the sparse layers; layer 0 is dense.
  const ModelConfig& model = loaded_.config;
  EXPECT_EQ(int64_t(recorder_->entropy.size()), int64_t{model.layers - 1} * model.kv_heads);
  const float most = std::log(1500.0f / 8);  // of a uniform distribution over the blocks
  EXPECT_THAT(recorder_->entropy,
              testing::Each(testing::AllOf(testing::Ge(0.0f), testing::Le(most))));
  EXPECT_THAT(recorder_->before, testing::ElementsAre(end.receipt.kv_bytes_before));
  EXPECT_THAT(recorder_->after, testing::ElementsAre(end.receipt.kv_bytes_after));
  EXPECT_LT(end.receipt.kv_bytes_after, end.receipt.kv_bytes_before);
}

TEST_F(ObserverTest, OtherRulesHaveNoEntropies) {
  ASSERT_TRUE(Generate(600, 1, "full").status.ok());
  ASSERT_EQ(recorder_->receipts.size(), 1u);
  EXPECT_THAT(recorder_->entropy, testing::IsEmpty());
  EXPECT_EQ(recorder_->receipts[0].attention_flops_executed,
            recorder_->receipts[0].attention_flops_dense);
}

TEST_F(ObserverTest, LogicalBytesCountPositionsPhysicalOnesPages) {
  EXPECT_EQ(loaded_.engine->Stats().kv_logical_bytes, 0);
  const auto session = loaded_.engine->CreateSession("o");
  ASSERT_TRUE(session.ok());
  ASSERT_TRUE(Generate(1500, 0, "full", session->id).status.ok());
  ASSERT_TRUE(loaded_.engine->ForkSession("o", session->id).ok());
  ASSERT_TRUE(Generate(10, 0, "full", session->id).status.ok());
  const EngineStats stats = loaded_.engine->Stats();
  const int64_t heads = int64_t{loaded_.config.layers} * loaded_.config.kv_heads;
  const int64_t positions = 1500 + 1510;  // the fork's and the session's
  EXPECT_EQ(stats.kv_logical_bytes, positions * heads * stats.page_bytes / 64);
  // Both were compressed to 128 tokens a head, and share those.
  EXPECT_LT(stats.pages_used * stats.page_bytes, stats.kv_logical_bytes / 5);
  EXPECT_GT(stats.pages_used, 0);
}

}  // namespace
}  // namespace entropyserve
