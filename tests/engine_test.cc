// The engine's promises on a model without weights (tests/fake_model.h).
#include "engine/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "engine/base/status_details.h"
#include "engine/cache/page_pool.h"
#include "engine/engine_factory.h"
#include "engine/step_batch.h"
#include "tests/fake_model.h"
#include "tests/session_testing.h"

namespace entropyserve {
namespace {

using testing::HasSubstr;
using testing::Test;

class RecordingSink final : public EventSink {
 public:
  void OnAccepted(const AcceptedEvent& event) override { accepted_.set_value(event); }
  void OnProgress(int64_t prefilled, int64_t total) override {
    progress.emplace_back(prefilled, total);
  }
  void OnTokens(TokensEvent event) override {
    ids.insert(ids.end(), event.ids.begin(), event.ids.end());
    text += event.text;
    logprobs.insert(logprobs.end(), event.logprobs.begin(), event.logprobs.end());
    if (on_token) on_token(ids.size());
  }
  void OnFinished(FinishedEvent event) override { finished_.set_value(std::move(event)); }

  AcceptedEvent Accepted() { return accepted_future_.get(); }
  FinishedEvent Wait() { return finished_future_.get(); }
  bool Done() {
    return finished_future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }

  // Read after Wait(), or from on_token.
  std::vector<std::pair<int64_t, int64_t>> progress;
  std::vector<int32_t> ids;
  std::string text;
  std::vector<TokenLogprobs> logprobs;
  std::function<void(size_t)> on_token;  // engine thread

 private:
  std::promise<AcceptedEvent> accepted_;
  std::promise<FinishedEvent> finished_;
  std::future<AcceptedEvent> accepted_future_ = accepted_.get_future();
  std::future<FinishedEvent> finished_future_ = finished_.get_future();
};

class EngineTest : public Test {
 protected:
  void Start(EngineOptions options = {}, int64_t pages = 4000) {
    if (options.step_tokens == 0) options.step_tokens = 256;
    if (options.lone_chunk_tokens == 0) options.lone_chunk_tokens = 512;
    EngineParts parts;
    parts.backend = MakeCpuBackend(1);
    auto model = std::make_unique<FakeModel>(parts.backend.get());
    model_ = model.get();
    parts.model = std::move(model);
    parts.tokenizer = std::make_shared<FakeTokenizer>();
    parts.options = options;
    parts.pages = pages;
    engine_ = *MakeEngine(std::move(parts));
  }

  static EngineRequest Request(std::vector<int32_t> prompt, int64_t max_new) {
    EngineRequest r;
    r.prompt = std::move(prompt);
    r.sampling.temperature = 0;
    r.sampling.max_new_tokens = max_new;
    r.prefill = *PrefillPreset("entropy", "test");
    r.prefill.params.segment = 128;
    r.kv = *KvPreset("full", "test");
    return r;
  }

  static std::vector<int32_t> Prompt(int first, int n) {
    std::vector<int32_t> prompt(n);
    for (int i = 0; i < n; ++i) prompt[i] = 2 + (first * 37 + i * 11) % 900;
    return prompt;
  }

  std::shared_ptr<RecordingSink> Run(EngineRequest request) {
    auto sink = std::make_shared<RecordingSink>();
    const auto id = engine_->Submit(std::move(request), sink);
    EXPECT_TRUE(id.ok()) << id.status();
    id_ = *id;
    return sink;
  }

  void ExpectBaseline(int64_t sessions = 0) {
    const EngineStats stats = engine_->Stats();
    if (sessions == 0) {
      EXPECT_EQ(stats.pages_used, 0) << "every page returns";
    }
    EXPECT_EQ(stats.running + stats.waiting, 0);
    EXPECT_EQ(stats.admitted, stats.completed + stats.cancelled + stats.failed);
    EXPECT_EQ(model_->corruptions(), 0);
  }

  std::unique_ptr<Engine> engine_;
  FakeModel* model_ = nullptr;
  RequestId id_ = 0;
};

TEST_F(EngineTest, StreamsTheModelsTokensInOrder) {
  Start();
  ASSERT_TRUE(engine_->WarmUp().ok());
  EngineRequest r = Request(Prompt(1, 700), 20);
  r.progress = true;
  std::vector<int32_t> all = r.prompt, expected;
  for (int i = 0; i < 20; ++i) {
    expected.push_back(NextFakeToken(all));
    all.push_back(expected.back());
  }
  auto sink = Run(std::move(r));
  EXPECT_EQ(sink->Accepted().prompt_tokens, 700);
  const FinishedEvent end = sink->Wait();
  EXPECT_EQ(sink->ids, expected);
  EXPECT_EQ(end.reason, FinishReason::kLength);
  EXPECT_EQ(end.receipt.prompt_tokens, 700);
  EXPECT_EQ(end.receipt.generated_tokens, 20);
  EXPECT_EQ(sink->progress, (std::vector<std::pair<int64_t, int64_t>>{{512, 700}, {700, 700}}));
  ExpectBaseline();
}

TEST_F(EngineTest, InterleavedRequestsGetTheAnswersTheyGetAlone) {
  Start();
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  std::vector<std::vector<int32_t>> expected;
  for (int i = 0; i < 12; ++i) {
    std::vector<int32_t> all = Prompt(i, 50 + 97 * i);
    sinks.push_back(Run(Request(all, 15)));
    expected.emplace_back();
    for (int j = 0; j < 15; ++j) {
      expected.back().push_back(NextFakeToken(all));
      all.push_back(expected.back().back());
    }
  }
  for (size_t i = 0; i < sinks.size(); ++i) {
    sinks[i]->Wait();
    EXPECT_EQ(sinks[i]->ids, expected[i]) << "request " << i;
  }
  ExpectBaseline();
}

TEST_F(EngineTest, StopConditions) {
  Start();
  EngineRequest r = Request(Prompt(3, 40), 30);
  std::vector<int32_t> all = r.prompt, ids;
  std::string text;
  FakeTokenizer tokenizer;
  for (int i = 0; i < 30; ++i) {
    ids.push_back(NextFakeToken(all));
    all.push_back(ids.back());
    text += tokenizer.TokenBytes(ids.back());
  }
  {  // a stop token
    EngineRequest stop = r;
    stop.sampling.stop_token_ids = {ids[5]};
    auto sink = Run(std::move(stop));
    EXPECT_EQ(sink->Wait().reason, FinishReason::kStopToken);
    EXPECT_EQ(sink->ids.size(), 6u);
  }
  {  // the same, not allowed before the tenth token: another token is taken there
    EngineRequest stop = r;
    stop.sampling.stop_token_ids = {ids[5]};
    stop.sampling.min_new_tokens = 10;
    auto sink = Run(std::move(stop));
    sink->Wait();
    EXPECT_GE(sink->ids.size(), 10u);
    EXPECT_NE(sink->ids[5], ids[5]);
  }
  {  // a stop string over token borders; nothing of it is shown
    EngineRequest stop = r;
    const std::string word = text.substr(7, 6);
    stop.sampling.stop = {word};
    auto sink = Run(std::move(stop));
    const FinishedEvent end = sink->Wait();
    EXPECT_EQ(end.reason, FinishReason::kStopString);
    EXPECT_EQ(end.stop_string, word);
    EXPECT_EQ(sink->text, text.substr(0, text.find(word)));
  }
  {  // forced ids, and their logprobs
    EngineRequest forced = r;
    forced.sampling.forced_token_ids = {5, 1, 9};  // 1 is the end id: forced, it does not end
    forced.sampling.max_new_tokens = 3;
    forced.sampling.logprobs = 2;
    auto sink = Run(std::move(forced));
    EXPECT_EQ(sink->Wait().reason, FinishReason::kLength);
    EXPECT_EQ(sink->ids, (std::vector<int32_t>{5, 1, 9}));
    ASSERT_EQ(sink->logprobs.size(), 3u);
    EXPECT_EQ(sink->logprobs[0].top[0].first, ids[0]);
    EXPECT_LT(sink->logprobs[0].logprob, sink->logprobs[0].top[0].second);
  }
  ExpectBaseline();
}

TEST_F(EngineTest, SameSeedSameTokensWhateverElseRuns) {
  Start();
  EngineRequest r = Request(Prompt(4, 60), 25);
  r.sampling.temperature = 30.0f;  // the fake's logits are far apart
  r.sampling.seed = 1234;
  auto alone = Run(r);
  alone->Wait();
  std::vector<std::shared_ptr<RecordingSink>> others;
  for (int i = 0; i < 5; ++i) others.push_back(Run(Request(Prompt(10 + i, 300), 40)));
  auto crowded = Run(r);
  const uint64_t seed = crowded->Wait().receipt.seed;
  EXPECT_EQ(crowded->ids, alone->ids);
  EXPECT_EQ(seed, 1234u);
  r.sampling.seed = 1235;
  auto other = Run(r);
  other->Wait();
  EXPECT_NE(other->ids, alone->ids);
  for (auto& sink : others) sink->Wait();
  ExpectBaseline();
}

TEST_F(EngineTest, CancelsInEveryStateReturnEveryPage) {
  EngineOptions options;
  options.max_sequences = 3;
  Start(options, 600);
  for (int round = 0; round < 300; ++round) {
    std::vector<std::pair<RequestId, std::shared_ptr<RecordingSink>>> open;
    for (int i = 0; i < 6; ++i) {
      EngineRequest r =
          Request(Prompt(round + i, 30 + (round * 53 + i * 401) % 900), 1 + (round + i) % 50);
      if (i % 2) r.kv = *KvPreset("latent", "test"), r.kv.params.budget = 100;
      auto sink = Run(std::move(r));
      open.emplace_back(id_, sink);
    }
    if (round % 3 == 0) std::this_thread::yield();
    for (auto& [id, sink] : open) engine_->Cancel(id, absl::CancelledError("test"));
    for (auto& [id, sink] : open) {
      const FinishedEvent end = sink->Wait();
      if (end.reason == FinishReason::kCancelled) {
        EXPECT_TRUE(absl::IsCancelled(end.status));
      }
    }
  }
  ExpectBaseline();
}

TEST_F(EngineTest, DeadlinesEndARequestAndSayWhy) {
  Start();
  EngineRequest r = Request(Prompt(1, 3000), 1000);
  r.deadline = std::chrono::steady_clock::now() - std::chrono::seconds(1);
  auto sink = Run(std::move(r));
  EXPECT_TRUE(absl::IsDeadlineExceeded(sink->Wait().status));
  ExpectBaseline();
}

TEST_F(EngineTest, APausedSequenceStopsAndResumesAndNobodyElseDoes) {
  Start();
  auto slow = std::make_shared<RecordingSink>();
  std::promise<void> third;
  RequestId slow_id = 0;
  slow->on_token = [&](size_t n) {
    if (n == 3) third.set_value();
    if (n == 3) engine_->SetPaused(slow_id, true);
  };
  // Held until the id is known.
  std::promise<void> go;
  auto gate = go.get_future().share();
  model_->before_step = [gate] { gate.wait(); };
  slow_id = *engine_->Submit(Request(Prompt(1, 20), 50), slow);
  go.set_value();
  third.get_future().wait();
  auto fast = Run(Request(Prompt(2, 20), 50));
  fast->Wait();
  EXPECT_EQ(fast->ids.size(), 50u);
  EXPECT_FALSE(slow->Done());
  EXPECT_GT(engine_->Stats().pages_used, 0) << "a paused sequence keeps its pages";
  engine_->SetPaused(slow_id, false);
  slow->Wait();
  EXPECT_EQ(slow->ids.size(), 50u);
  ExpectBaseline();
}

TEST_F(EngineTest, FullQueuesAndImpossibleRequestsAreRefused) {
  EngineOptions options;
  options.max_queue_requests = 2;
  options.max_sequences = 1;
  Start(options, 250);
  std::promise<void> go;
  auto gate = go.get_future().share();
  model_->before_step = [gate] { gate.wait(); };
  auto running = Run(Request(Prompt(1, 20), 5));
  running->Accepted();
  while (engine_->Stats().queued_tokens > 0) std::this_thread::yield();  // admitted
  auto a = Run(Request(Prompt(2, 20), 5)), b = Run(Request(Prompt(3, 20), 5));
  const auto full = engine_->Submit(Request(Prompt(4, 20), 5), std::make_shared<RecordingSink>());
  EXPECT_TRUE(absl::IsResourceExhausted(full.status()));
  EXPECT_TRUE(IsRetryable(full.status()));
  go.set_value();
  for (auto& sink : {running, a, b}) sink->Wait();
  // 250 pages for 2 x 2 heads: 62 each, less than the 63 of 4000 tokens.
  auto giant = Run(Request(Prompt(5, 4000), 90));
  const FinishedEvent end = giant->Wait();
  EXPECT_TRUE(absl::IsResourceExhausted(end.status)) << end.status;
  EXPECT_FALSE(IsRetryable(end.status));
  EXPECT_NE(end.status.message().find("never fit"), absl::string_view::npos);
  ExpectBaseline();
}

TEST_F(EngineTest, BadRequestsNameTheirField) {
  Start();
  auto refusal = [&](EngineRequest r) {
    const auto id = engine_->Submit(std::move(r), std::make_shared<RecordingSink>());
    EXPECT_TRUE(absl::IsInvalidArgument(id.status())) << id.status();
    return std::string(id.status().message());
  };
  EXPECT_THAT(refusal(Request({}, 5)), testing::HasSubstr("prompt"));
  EXPECT_THAT(refusal(Request({1000}, 5)), testing::HasSubstr("token_ids"));
  EXPECT_THAT(refusal(Request({-1}, 5)), testing::HasSubstr("token_ids"));
  EXPECT_THAT(refusal(Request(Prompt(1, 4097), 0)), testing::HasSubstr("context"));
  EngineRequest r = Request({5}, 5);
  r.sampling.top_p = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(refusal(r), testing::HasSubstr("sampling.top_p"));
  r = Request({5}, 5);
  r.prefill.params.segment = 100;
  EXPECT_THAT(refusal(r), testing::HasSubstr("policy.prefill"));
  r = Request({5}, 5);
  r.kv.params.rule = KvRule::kLatent;
  r.kv.params.budget = 1;
  EXPECT_THAT(refusal(r), testing::HasSubstr("policy.kv"));
}

TEST_F(EngineTest, AStepThatDoesNotFitFailsItsPrefillOnly) {
  Start();
  model_->max_rows = 600;
  EngineRequest whole = Request(Prompt(1, 2000), 5);
  whole.prefill = *PrefillPreset("entropy_paper", "test");
  auto bad = Run(std::move(whole));
  EXPECT_TRUE(absl::IsResourceExhausted(bad->Wait().status));
  auto good = Run(Request(Prompt(2, 2000), 5));
  EXPECT_TRUE(good->Wait().status.ok());
  ExpectBaseline();
}

// Without a prefill to blame the newest goes, one a step, until the step fits.
TEST(ManualEngineTest, ADecodeStepThatDoesNotFitEndsTheNewest) {
  ManualEngine m({}, /*pages=*/200);
  std::vector<std::shared_ptr<TurnSink>> sinks;
  for (int i = 0; i < 3; ++i)
    sinks.push_back(Submit(m.engine.get(), TurnRequest({}, {5 + i, 6, 7}, 20)));
  while (sinks[2]->ids.size() < 5) m.engine->RunOnce();
  m.model->max_rows = 1;
  m.engine->RunOnce();
  EXPECT_TRUE(sinks[2]->done);
  EXPECT_TRUE(absl::IsResourceExhausted(sinks[2]->end.status)) << sinks[2]->end.status;
  EXPECT_TRUE(IsRetryable(sinks[2]->end.status)) << sinks[2]->end.status;
  EXPECT_FALSE(sinks[1]->done);
  m.engine->RunOnce();
  EXPECT_TRUE(absl::IsResourceExhausted(sinks[1]->end.status)) << sinks[1]->end.status;
  ASSERT_TRUE(RunToEnd(m, *sinks[0]));
  EXPECT_TRUE(sinks[0]->end.status.ok()) << sinks[0]->end.status;
  Conversation talk;
  EXPECT_EQ(sinks[0]->ids, Expected(&talk, {5, 6, 7}, 20));
  EXPECT_EQ(m.pool->used(), 0);
}

TEST_F(EngineTest, SessionsContinueForkAndAreBoundToTheirOwner) {
  Start();
  const SessionInfo session = *engine_->CreateSession("ann");
  EXPECT_EQ(session.id.size(), 32u);
  EngineRequest first = Request(Prompt(1, 100), 4);
  first.session_id = session.id;
  first.owner = "ann";
  first.end_of_turn = {7, 8};
  std::vector<int32_t> all = first.prompt;
  auto one = Run(std::move(first));
  one->Wait();
  all.insert(all.end(), one->ids.begin(), one->ids.end());
  EXPECT_EQ(engine_->GetSession("ann", session.id)->positions, 103)
      << "the last token has not been read";
  EXPECT_TRUE(absl::IsNotFound(engine_->GetSession("bob", session.id).status()));
  EXPECT_TRUE(engine_->ListSessions("bob").empty());
  const SessionInfo fork = *engine_->ForkSession("ann", session.id);
  // The next turn feeds the last token and the template's end of turn first.
  for (const std::string& id : {session.id, fork.id}) {
    EngineRequest second = Request({50, 51, 52}, 3);
    second.session_id = id;
    second.owner = "ann";
    std::vector<int32_t> history = all;
    for (int32_t token : {7, 8, 50, 51, 52}) history.push_back(token);
    auto two = Run(std::move(second));
    const FinishedEvent end = two->Wait();
    EXPECT_EQ(end.receipt.cached_tokens, 103);
    EXPECT_EQ(end.receipt.prompt_tokens, 6);
    for (int i = 0; i < 3; ++i) {
      const int32_t expected = NextFakeToken(history);
      EXPECT_EQ(two->ids[i], expected);
      history.push_back(expected);
    }
  }
  EXPECT_TRUE(absl::IsNotFound(engine_->DeleteSession("bob", fork.id)));
  EXPECT_TRUE(engine_->DeleteSession("ann", fork.id).ok());
  EXPECT_TRUE(engine_->DeleteSession("ann", session.id).ok());
  engine_->WarmUp().IgnoreError();  // a round trip through the engine thread
  ExpectBaseline();
}

TEST_F(EngineTest, ACancelledPrefillLeavesTheSessionAsItWas) {
  Start();
  const std::string id = engine_->CreateSession("ann")->id;
  auto turn = [&](std::vector<int32_t> prompt, int64_t max_new) {
    EngineRequest r = Request(std::move(prompt), max_new);
    r.session_id = id;
    r.owner = "ann";
    return r;
  };
  std::vector<int32_t> all = Prompt(1, 50);
  auto first = Run(turn(all, 2));
  first->Wait();
  all.insert(all.end(), first->ids.begin(), first->ids.end());
  // One step of the second turn's prefill runs, then it is cancelled; a second request meanwhile is
  // told that the session is busy.
  std::promise<void> stepping, go;
  auto gate = go.get_future().share();
  std::atomic<int> steps{0};
  model_->before_step = [&, gate] {
    if (steps++ == 1) stepping.set_value(), gate.wait();
  };
  auto second = Run(turn(Prompt(9, 3000), 5));
  const RequestId second_id = id_;
  stepping.get_future().wait();
  auto busy = Run(turn({5}, 1));
  engine_->Cancel(second_id, absl::CancelledError("test"));
  go.set_value();
  EXPECT_EQ(second->Wait().reason, FinishReason::kCancelled);
  const FinishedEvent refused = busy->Wait();
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status));
  EXPECT_EQ(Reason(refused.status), kSessionBusy);
  EXPECT_EQ(engine_->GetSession("ann", id)->positions, 51);
  auto third = Run(turn({60}, 1));
  third->Wait();
  all.push_back(60);
  EXPECT_EQ(third->ids, (std::vector<int32_t>{NextFakeToken(all)}));
  EXPECT_TRUE(engine_->DeleteSession("ann", id).ok());
  ExpectBaseline(1);
}

// Both were tokenized for the session as it was before another turn ended, or was rolled back.
TEST_F(EngineTest, APromptMadeForAnotherTurnIsRefused) {
  Start();
  const std::string id = engine_->CreateSession("")->id;
  const auto turn = [&](bool first_turn) {
    EngineRequest r = Request(Prompt(1, 50), 2);
    r.session_id = id;
    r.first_turn = first_turn;
    return Run(std::move(r))->Wait().status;
  };
  const auto expect_refused = [](const absl::Status& status) {
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(Reason(status), kSessionBusy);
    EXPECT_THAT(std::string(status.message()), HasSubstr("send it again"));
  };
  expect_refused(turn(false));
  EXPECT_EQ(engine_->GetSession("", id)->positions, 0);
  EXPECT_TRUE(turn(true).ok());
  expect_refused(turn(true));
  EXPECT_EQ(engine_->GetSession("", id)->positions, 51);
  EXPECT_TRUE(turn(false).ok());
  ExpectBaseline(1);
}

TEST_F(EngineTest, CompressedSessionsStayWithinTheirBudget) {
  Start();
  const std::string id = engine_->CreateSession("")->id;
  for (int turn = 0; turn < 6; ++turn) {
    EngineRequest r = Request(Prompt(3, 400), 30);
    r.session_id = id;
    r.kv = *KvPreset("latent", "test");
    r.kv.params.budget = 100;
    auto sink = Run(std::move(r));
    const FinishedEvent end = sink->Wait();
    EXPECT_TRUE(end.receipt.compressed);
    EXPECT_LT(end.receipt.kv_bytes_after, end.receipt.kv_bytes_before);
    const SessionInfo info = *engine_->GetSession("", id);
    EXPECT_LE(info.kept_tokens, 150);
    EXPECT_EQ(info.positions, 430 * (turn + 1) - 1);
  }
  EXPECT_EQ(model_->corruptions(), 0);
}

TEST_F(EngineTest, TheReceiptSpansBothCompressionsOfALongAnswer) {
  Start();
  EngineRequest r = Request(Prompt(3, 1500), 200);
  r.session_id = engine_->CreateSession("")->id;
  r.kv = *KvPreset("latent", "test");
  r.kv.params.budget = 100;
  const FinishedEvent end = Run(std::move(r))->Wait();
  ASSERT_TRUE(end.receipt.compressed);
  EXPECT_GE(end.receipt.kv_bytes_before, 7 * end.receipt.kv_bytes_after);
}

TEST_F(EngineTest, ParkedSessionsThatHoldTheMemoryDoNotBlockTheQueue) {
  Start({}, 313);
  const std::string id = engine_->CreateSession("")->id;
  const auto turn = [&](std::vector<int32_t> prompt, int64_t max_new, const std::string& session) {
    EngineRequest r = Request(std::move(prompt), max_new);
    r.session_id = session;
    return r;
  };
  // 47 pages in each of 4 heads stay.
  ASSERT_TRUE(Run(turn(Prompt(1, 3000), 1, id))->Wait().status.ok());
  auto giant = Run(Request(Prompt(2, 2500), 5));
  auto small = Run(Request(Prompt(3, 20), 5));
  EXPECT_TRUE(giant->Wait().status.ok()) << "there is no other tier: the idle session is dropped";
  EXPECT_TRUE(small->Wait().status.ok());
  const absl::Status lost = engine_->GetSession("", id).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(lost)) << lost;
  EXPECT_EQ(Reason(lost), kSessionLost);
  EXPECT_TRUE(absl::IsNotFound(engine_->GetSession("bob", id).status()));
  EXPECT_EQ(Reason(Run(turn({5}, 1, id))->Wait().status), kSessionLost);
  EXPECT_TRUE(absl::IsNotFound(engine_->DeleteSession("bob", id)));
  EXPECT_TRUE(engine_->DeleteSession("", id).ok()) << "cleaning up succeeds";
  EXPECT_TRUE(absl::IsNotFound(engine_->DeleteSession("", id)));
  // A session's own next turn can never fit beside what the session holds: that does not pass.
  // 18 + 1 + 3 pages in each head and 2 x 19 in transit: 126, and 125 are left beside it.
  const std::string other = engine_->CreateSession("")->id;
  ASSERT_TRUE(Run(turn(Prompt(1, 3000), 1, other))->Wait().status.ok());
  const FinishedEvent never = Run(turn(Prompt(4, 1090), 5, other))->Wait();
  EXPECT_TRUE(absl::IsResourceExhausted(never.status)) << never.status;
  EXPECT_FALSE(IsRetryable(never.status));
  EXPECT_TRUE(engine_->DeleteSession("", other).ok());
  EXPECT_TRUE(Run(Request(Prompt(2, 2500), 5))->Wait().status.ok());
  ExpectBaseline();
}

TEST_F(EngineTest, TheSmallestPenaltyStillGivesAToken) {
  Start();
  EngineRequest r = Request(Prompt(6, 40), 10);
  r.sampling.temperature = 1.0f;
  r.sampling.repetition_penalty = std::numeric_limits<float>::min();
  r.sampling.presence_penalty = -2.0f;
  auto sink = Run(std::move(r));
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_EQ(sink->ids.size(), 10u);
  ExpectBaseline();
}

TEST_F(EngineTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  Start();
  auto sink = Run(Request(Prompt(1, 200), 20));
  engine_->Drain(std::chrono::steady_clock::now() + std::chrono::hours(1));
  EXPECT_TRUE(sink->Done());
  EXPECT_EQ(sink->Wait().reason, FinishReason::kLength);
  const auto late = engine_->Submit(Request(Prompt(2, 10), 1), std::make_shared<RecordingSink>());
  EXPECT_TRUE(absl::IsUnavailable(late.status()));
}

TEST_F(EngineTest, DrainCancelsAfterItsDeadline) {
  Start();
  model_->before_step = [] { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
  auto sink = Run(Request(Prompt(1, 200), 3000));
  engine_->Drain(std::chrono::steady_clock::now() + std::chrono::milliseconds(20));
  const FinishedEvent end = sink->Wait();
  EXPECT_EQ(end.reason, FinishReason::kCancelled);
  EXPECT_TRUE(absl::IsUnavailable(end.status));
  ExpectBaseline();
}

// The fake must be able to catch a mistake: a page of one sequence swapped for another's is seen.
TEST_F(EngineTest, TheFakeNoticesAPlantedPageSwap) {
  auto backend = MakeCpuBackend(1);
  FakeModel model(backend.get());
  auto pool = *PagePool::Create(backend.get(), DType::kF32, FakeConfig().head_dim, 64);
  auto make = [&](int32_t tag) {
    Sequence s;
    s.owned = std::make_unique<SequenceCache>(backend.get(), pool.get(), model.shape());
    s.cache = s.owned.get();
    s.input.assign(100, tag);
    s.request.prefill.params.full = true;
    s.plan = {
        .prompt = 100, .max_new = 4, .prefill = {.full = true}, .kv = {.rule = KvRule::kFull}};
    EXPECT_TRUE(s.cache->BeginTurn(s.plan).ok());
    s.cache->Append(100);
    return s;
  };
  Sequence a = make(5), b = make(6);
  StepBatch step(backend.get());
  step.Clear();
  step.Add(&a, 100, true, false, {});
  step.Add(&b, 100, true, false, {});
  ASSERT_TRUE(step.Upload());
  model.Forward(step.batch(), pool->kv(), nullptr, 0);
  EXPECT_EQ(model.corruptions(), 0);
  for (Sequence* s : {&a, &b}) {
    s->cache->Advance(100);
    s->prefilled = 100;
    s->last_token = 9;
    s->cache->Append(1);
  }
  step.Clear();
  step.Add(&a, 1, false, false, {});
  step.Add(&b, 1, false, false, {});
  ASSERT_TRUE(step.Upload());
  auto* pages_a = const_cast<int32_t*>(step.batch().seqs[0].pages);
  auto* pages_b = const_cast<int32_t*>(step.batch().seqs[1].pages);
  std::swap(pages_a[1], pages_b[1]);
  model.Forward(step.batch(), pool->kv(), nullptr, 0);
  EXPECT_GT(model.corruptions(), 0);
  std::swap(pages_a[1], pages_b[1]);
}

}  // namespace
}  // namespace entropyserve
