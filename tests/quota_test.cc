// What one caller may have queued, running and parked, and requests that come too late; on the real
// engine with a clock moved by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "engine/base/status_details.h"
#include "tests/manual_engine.h"

namespace entropyserve {
namespace {

using testing::HasSubstr;

class Sink final : public EventSink {
 public:
  void OnAccepted(const AcceptedEvent& event) override { accepted = event; }
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent event) override { tokens += int64_t(event.ids.size()); }
  void OnFinished(FinishedEvent event) override { finished = std::move(event); }

  std::optional<AcceptedEvent> accepted;
  std::optional<FinishedEvent> finished;
  int64_t tokens = 0;
};

class QuotaTest : public testing::Test {
 protected:
  void Start(EngineOptions options, int64_t pages = 2000) { world_.emplace(options, pages); }

  EngineRequest Request(const std::string& owner, int64_t prompt, int64_t max_new = 2) {
    EngineRequest r;
    r.owner = owner;
    for (int64_t i = 0; i < prompt; ++i) r.prompt.push_back(2 + int32_t(i * 7 % 900));
    r.sampling.temperature = 0;
    r.sampling.max_new_tokens = max_new;
    r.prefill = *PrefillPreset("entropy", "test");
    r.prefill.params.segment = 128;
    r.kv = *KvPreset("full", "test");
    return r;
  }

  absl::Status Submit(EngineRequest request, std::shared_ptr<Sink> sink = nullptr) {
    sinks_.push_back(sink ? sink : std::make_shared<Sink>());
    const auto id = engine().Submit(std::move(request), sinks_.back());
    if (!id.ok()) sinks_.pop_back();
    return id.status();
  }

  void RunAll() {
    for (int i = 0; i < 1000; ++i) engine().RunOnce();
    for (const auto& sink : sinks_) EXPECT_TRUE(sink->finished.has_value());
  }

  static void ExpectQuota(const absl::Status& status, const std::string& flag) {
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
    EXPECT_TRUE(IsRetryable(status));
    EXPECT_THAT(std::string(status.message()), HasSubstr(flag));
  }

  EngineImpl& engine() { return *world_->engine; }

  std::optional<ManualEngine> world_;
  std::vector<std::shared_ptr<Sink>> sinks_;
};

TEST_F(QuotaTest, RequestsOfOneOwnerAreCountedUntilTheyEnd) {
  Start({.max_sequences = 1, .max_owner_requests = 2});
  EXPECT_TRUE(Submit(Request("ann", 10)).ok());
  EXPECT_TRUE(Submit(Request("ann", 10)).ok());
  ExpectQuota(Submit(Request("ann", 10)), "--max-key-requests");
  EXPECT_TRUE(Submit(Request("bob", 10)).ok()) << "another owner is not disturbed";
  engine().RunOnce();  // the first runs: it still counts
  ExpectQuota(Submit(Request("ann", 10)), "--max-key-requests");
  RunAll();
  EXPECT_TRUE(Submit(Request("ann", 10)).ok());
  RunAll();
}

TEST_F(QuotaTest, QueuedTokensOfOneOwnerAreCountedUntilTheyRun) {
  Start({.max_sequences = 1, .max_owner_queue_tokens = 100});
  EXPECT_TRUE(Submit(Request("ann", 300, 50)).ok()) << "a longer prompt may wait alone";
  ExpectQuota(Submit(Request("ann", 1)), "--max-key-queue-tokens");
  engine().RunOnce();  // it runs and has left the queue
  EXPECT_TRUE(Submit(Request("bob", 90)).ok());
  EXPECT_TRUE(Submit(Request("ann", 60)).ok());
  ExpectQuota(Submit(Request("ann", 41)), "--max-key-queue-tokens");
  EXPECT_TRUE(Submit(Request("ann", 40)).ok());
  RunAll();
  EXPECT_TRUE(Submit(Request("ann", 90)).ok());
  RunAll();
}

TEST_F(QuotaTest, ARefusedRequestLeavesTheQuota) {
  Start({.max_owner_requests = 1}, 40);
  for (int i = 0; i < 3; ++i) {
    auto sink = std::make_shared<Sink>();
    EXPECT_TRUE(Submit(Request("ann", 3000), sink).ok());
    engine().RunOnce();
    EXPECT_TRUE(absl::IsResourceExhausted(sink->finished->status)) << "40 pages do not hold it";
  }
}

TEST_F(QuotaTest, AnOwnerHasAsManySessionsAsItMay) {
  Start({.max_owner_sessions = 2});
  const std::string first = engine().CreateSession("ann")->id;
  EXPECT_TRUE(engine().ForkSession("ann", first).ok());
  ExpectQuota(engine().CreateSession("ann").status(), "--max-key-sessions");
  ExpectQuota(engine().ForkSession("ann", first).status(), "--max-key-sessions");
  EngineRequest turn = Request("ann", 20);
  turn.session_id = first;
  EXPECT_TRUE(Submit(std::move(turn)).ok());
  RunAll();
  EXPECT_TRUE(sinks_.back()->finished->status.ok()) << "those it has go on";
  EXPECT_TRUE(engine().CreateSession("bob").ok());
  EXPECT_TRUE(engine().DeleteSession("ann", first).ok());
  EXPECT_TRUE(engine().CreateSession("ann").ok());
}

TEST_F(QuotaTest, SessionsOfOneOwnerHoldWhatTheyMay) {
  Start({.max_owner_session_bytes = 1});
  const std::string ann = engine().CreateSession("ann")->id,
                    bob = engine().CreateSession("bob")->id;
  auto turn = [&](const std::string& owner, const std::string& id) {
    EngineRequest r = Request(owner, 20);
    r.session_id = id;
    auto sink = std::make_shared<Sink>();
    EXPECT_TRUE(Submit(std::move(r), sink).ok());
    RunAll();
    return sink->finished->status;
  };
  EXPECT_TRUE(turn("ann", ann).ok()) << "it held nothing yet";
  ExpectQuota(turn("ann", ann), "--max-key-session-bytes");
  ExpectQuota(engine().CreateSession("ann").status(), "--max-key-session-bytes");
  ExpectQuota(engine().ForkSession("ann", ann).status(), "--max-key-session-bytes");
  EXPECT_TRUE(Submit(Request("ann", 20)).ok()) << "no session, no quota";
  RunAll();
  EXPECT_TRUE(sinks_.back()->finished->status.ok());
  EXPECT_TRUE(turn("bob", bob).ok());
  EXPECT_EQ(engine().GetSession("ann", ann)->turns, 1) << "it is as it was";
  EXPECT_TRUE(engine().DeleteSession("ann", ann).ok());
  EXPECT_TRUE(engine().CreateSession("ann").ok());
}

// 256 tokens take a second.
class LateTest : public QuotaTest {
 protected:
  void StartSlow(bool refuse_late) {
    Start({.max_sequences = 1, .refuse_late = refuse_late});
    world_->model->before_step = [this] { world_->clock->Advance(1.0); };
    // The rate is known after a prompt.
    EXPECT_TRUE(Submit(Request("ann", 512, 1)).ok());
    RunAll();
  }

  std::shared_ptr<Sink> SubmitWithin(double seconds, int64_t prompt) {
    EngineRequest r = Request("ann", prompt, 1);
    r.deadline = world_->clock->Now() + std::chrono::milliseconds(int64_t(seconds * 1000));
    auto sink = std::make_shared<Sink>();
    EXPECT_TRUE(Submit(std::move(r), sink).ok());
    return sink;
  }
};

TEST_F(LateTest, WhatCannotBeInTimeIsRefusedAtOnce) {
  StartSlow(true);
  const int64_t steps = engine().Stats().steps;
  auto first = SubmitWithin(3600, 3000);  // 3000 tokens at 512 a second
  engine().RunOnce();
  EXPECT_EQ(engine().Stats().steps, steps + 1);
  // What is left of it takes 5 s: 100 tokens would be in time alone, and are not behind it.
  auto behind = SubmitWithin(2, 100), alone = SubmitWithin(2, 2000),
       in_time = SubmitWithin(60, 100);
  engine().RunOnce();
  ASSERT_TRUE(behind->finished.has_value());
  EXPECT_TRUE(absl::IsResourceExhausted(behind->finished->status)) << behind->finished->status;
  EXPECT_TRUE(IsRetryable(behind->finished->status));
  EXPECT_GT(*RetryAfterSeconds(behind->finished->status), 0.5);
  EXPECT_FALSE(behind->accepted.has_value());
  ASSERT_TRUE(alone->finished.has_value());
  EXPECT_TRUE(absl::IsDeadlineExceeded(alone->finished->status)) << alone->finished->status;
  EXPECT_FALSE(in_time->finished.has_value());
  RunAll();
  EXPECT_TRUE(first->finished->status.ok());
  EXPECT_TRUE(in_time->finished->status.ok()) << in_time->finished->status;
}

TEST_F(LateTest, AnIdleEngineTriesWhatItThinksItCannot) {
  StartSlow(true);
  world_->model->before_step = nullptr;  // it has become quick, and does not know it yet
  auto sink = SubmitWithin(2, 2000);
  RunAll();
  EXPECT_TRUE(sink->finished->status.ok()) << sink->finished->status;
}

TEST_F(LateTest, WithoutTheOptionALateRequestWaitsForItsDeadline) {
  StartSlow(false);
  auto first = SubmitWithin(3600, 3000);
  engine().RunOnce();
  auto behind = SubmitWithin(2, 100);
  engine().RunOnce();
  EXPECT_TRUE(behind->accepted.has_value());
  RunAll();
  EXPECT_TRUE(absl::IsDeadlineExceeded(behind->finished->status));
  EXPECT_EQ(behind->tokens, 0);
}

}  // namespace
}  // namespace entropyserve
