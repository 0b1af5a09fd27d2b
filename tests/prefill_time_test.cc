// The time of a prefill's own steps, whether it had them alone, and dense prefills that are timed
// without being anybody's request; on the real engine with a clock moved by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/manual_engine.h"

namespace entropyserve {
namespace {

constexpr double kStep = 1;         // seconds of a step
constexpr double kRounding = 1e-6;  // the clock moves a nanosecond when it is read

struct Recorder final : public EngineObserver {
  struct Prefill {
    int64_t tokens;
    double step_seconds;
    bool alone;
  };
  void OnPrefill(const PrefillInfo& p) override {
    prefills.push_back({p.receipt->prompt_tokens, p.step_seconds, p.alone});
  }
  std::vector<Prefill> prefills;
};

struct Sink final : public EventSink {
  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent) override {}
  void OnFinished(FinishedEvent event) override { finished = std::move(event); }
  std::optional<FinishedEvent> finished;
};

// Steps of one prompt that is alone read 512 tokens, of several together 256.
class PrefillTimeTest : public testing::Test {
 protected:
  PrefillTimeTest() : world_({}, 4000, "fake", recorder_) {
    world_.model->before_step = [this] { world_.clock->Advance(kStep); };
  }

  std::shared_ptr<Sink> Submit(int64_t prompt, int64_t max_new) {
    EngineRequest r;
    for (int64_t i = 0; i < prompt; ++i) r.prompt.push_back(2 + int32_t(i * 7 % 900));
    r.sampling.max_new_tokens = max_new;
    r.sampling.ignore_eos = true;
    r.prefill = *PrefillPreset("full", "test");
    r.prefill.params.segment = 128;  // so that small steps are shared
    r.kv = *KvPreset("full", "test");
    auto sink = std::make_shared<Sink>();
    const auto id = engine().Submit(std::move(r), sink);
    EXPECT_TRUE(id.ok()) << id.status();
    return sink;
  }

  EngineImpl& engine() { return *world_.engine; }

  const std::shared_ptr<Recorder> recorder_ = std::make_shared<Recorder>();
  ManualEngine world_;
};

TEST_F(PrefillTimeTest, IsThatOfItsStepsWithoutTheTimeBetweenThem) {
  const auto sink = Submit(1100, 3);  // 512, 512, 76
  while (!sink->finished) {
    engine().RunOnce();
    world_.clock->Advance(100);
  }
  ASSERT_EQ(recorder_->prefills.size(), 1u);
  EXPECT_EQ(recorder_->prefills[0].tokens, 1100);
  EXPECT_NEAR(recorder_->prefills[0].step_seconds, 3 * kStep, kRounding);
  EXPECT_TRUE(recorder_->prefills[0].alone);
  EXPECT_NEAR(sink->finished->receipt.prefill_seconds, 3 * kStep + 200, kRounding);
}

TEST_F(PrefillTimeTest, APrefillBesideADecodeIsNotAlone) {
  const auto first = Submit(100, 50);
  engine().RunOnce();
  const auto second = Submit(100, 1);
  while (!first->finished || !second->finished) engine().RunOnce();
  ASSERT_EQ(recorder_->prefills.size(), 2u);
  EXPECT_TRUE(recorder_->prefills[0].alone) << "nobody else was there yet";
  EXPECT_FALSE(recorder_->prefills[1].alone);
}

TEST_F(PrefillTimeTest, OneSharedStepOfManyIsEnough) {
  const auto longer = Submit(1100, 1);
  engine().RunOnce();
  const auto shorter = Submit(10, 1);  // is read with the second piece of the longer prompt
  while (!longer->finished || !shorter->finished) engine().RunOnce();
  ASSERT_EQ(recorder_->prefills.size(), 2u);
  for (const Recorder::Prefill& prefill : recorder_->prefills) EXPECT_FALSE(prefill.alone);
}

TEST_F(PrefillTimeTest, ATimedDensePrefillTakesTheStepsOfALonePromptAndLeavesNothing) {
  ASSERT_TRUE(engine().WarmUp().ok());
  std::vector<int32_t> rows;
  world_.model->tamper = [&rows](const Batch& batch) { rows.push_back(batch.rows); };
  const auto seconds = engine().TimeDensePrefill(1100);
  ASSERT_TRUE(seconds.ok()) << seconds.status();
  EXPECT_THAT(rows, testing::ElementsAre(512, 512, 76));
  EXPECT_NEAR(*seconds, 3 * kStep, kRounding);
  EXPECT_THAT(recorder_->prefills, testing::IsEmpty());
  engine().RunOnce();
  const EngineStats stats = engine().Stats();
  EXPECT_EQ(stats.pages_used, 0);
  EXPECT_EQ(world_.pool->available(), world_.pool->total());
  EXPECT_EQ(stats.admitted + stats.steps + stats.prompt_tokens, 0);
  // A request of that length takes the same steps.
  rows.clear();
  const auto sink = Submit(1100, 1);
  while (!sink->finished) engine().RunOnce();
  EXPECT_THAT(rows, testing::ElementsAre(512, 512, 76));
}

TEST_F(PrefillTimeTest, ATimedDensePrefillSaysWhatDoesNotFit) {
  EXPECT_TRUE(absl::IsInvalidArgument(engine().TimeDensePrefill(4097).status()));
  ManualEngine small({}, 40);
  EXPECT_TRUE(absl::IsResourceExhausted(small.engine->TimeDensePrefill(4096).status()));
  EXPECT_EQ(small.pool->available(), 40);
}

}  // namespace
}  // namespace entropyserve
