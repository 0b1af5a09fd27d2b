// Engine::Compare: on the fake model what it promises as a piece of work, on a tiny real one what
// it computes.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "engine/base/status_details.h"
#include "engine/engine_factory.h"
#include "tests/fake_model.h"
#include "tests/manual_engine.h"
#include "tests/model_testing.h"

namespace entropyserve {
namespace {

PrefillPolicy Full() {
  PrefillPolicy policy = *PrefillPreset("full", "test");
  policy.params.segment = 128;
  return policy;
}
KvPolicy Kv(const std::string& name) {
  KvPolicy policy = *KvPreset(name, "test");
  if (name != "full") policy.params.budget = 96;
  return policy;
}

CompareRequest Request(std::vector<int32_t> tokens, int64_t score_from, int64_t decode_from) {
  CompareRequest r;
  r.tokens = std::move(tokens);
  r.score_from = score_from;
  r.decode_from = decode_from;
  r.prefill_a = r.prefill_b = Full();
  r.kv_a = r.kv_b = Kv("full");
  return r;
}

std::vector<int32_t> RandomTokens(int vocab, int64_t n) {
  std::mt19937 random(7);
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int32_t& token : tokens) token = int32_t(2 + random() % unsigned(vocab - 2));
  return tokens;
}

struct Outcome {
  absl::StatusOr<CompareResult> result = absl::UnknownError("not run");
  std::vector<ComparePosition> positions;
};

Outcome RunCompare(Engine* engine, CompareRequest request) {
  Outcome outcome;
  outcome.result = engine->Compare(std::move(request), [&](std::span<const ComparePosition> some) {
    outcome.positions.insert(outcome.positions.end(), some.begin(), some.end());
    return true;
  });
  return outcome;
}

// More positions than may wait for a caller: such a comparison cannot end while its sink stands.
constexpr int64_t kLong = 5000;

// A comparison on a thread of its own, whose sink stands still at the first positions.
class StandingCompare {
 public:
  StandingCompare(Engine* engine, CompareRequest request)
      : thread_([this, engine, request = std::move(request)]() mutable {
          result_ = engine->Compare(std::move(request), [this](auto some) {
            positions_ += some.size();
            if (!some.empty() && !standing_) {
              standing_ = true;
              stands_.set_value();
              go_on_.get_future().wait();
            }
            return true;
          });
        }) {
    stands_.get_future().wait();
  }
  absl::StatusOr<CompareResult> GoOn() {
    go_on_.set_value();
    thread_.join();
    return result_;
  }
  size_t positions() const { return positions_; }  // after GoOn

 private:
  std::promise<void> stands_, go_on_;
  bool standing_ = false;
  size_t positions_ = 0;
  absl::StatusOr<CompareResult> result_ = absl::UnknownError("not run");
  std::thread thread_;
};

class WaitingSink final : public EventSink {
 public:
  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent event) override {
    for (const TokenLogprobs& l : event.logprobs) logprobs.push_back(l.logprob);
    if (!told_) first_.set_value();
    told_ = true;
  }
  void OnFinished(FinishedEvent event) override { finished_.set_value(std::move(event)); }
  void WaitForFirst() { first_.get_future().wait(); }
  FinishedEvent Wait() { return finished_.get_future().get(); }
  std::vector<float> logprobs;

 private:
  bool told_ = false;
  std::promise<void> first_;
  std::promise<FinishedEvent> finished_;
};

class ManualClock final : public Clock {
 public:
  TimePoint Now() const override { return TimePoint() + std::chrono::seconds(seconds.load()); }
  std::atomic<int64_t> seconds{1};
};

EngineRequest GenerateRequest(std::vector<int32_t> prompt, int64_t max_new) {
  EngineRequest r;
  r.prompt = std::move(prompt);
  r.sampling.temperature = 0;
  r.sampling.max_new_tokens = max_new;
  r.sampling.ignore_eos = true;
  r.prefill = Full();
  r.kv = Kv("full");
  return r;
}

// ---- The work, on the fake model

class CompareTest : public testing::Test {
 protected:
  void Start(int64_t pages = 4000, int64_t max_context = 16384, EngineOptions options = {}) {
    EngineParts parts;
    parts.options = options;
    parts.backend = MakeCpuBackend(1);
    auto model = std::make_unique<FakeModel>(parts.backend.get());
    model_ = model.get();
    model_->before_step = [this] { ++forwards_; };
    parts.model = std::move(model);
    parts.tokenizer = std::make_shared<FakeTokenizer>();
    parts.options.max_context = max_context;
    parts.options.step_tokens = 256;
    parts.options.lone_chunk_tokens = 512;
    parts.clock = clock_;
    parts.pages = pages;
    engine_ = *MakeEngine(std::move(parts));
  }
  void ExpectPagesReturned() {
    // The end of a comparison is told after its pages are back.
    EXPECT_EQ(engine_->Stats().pages_used, 0);
    EXPECT_EQ(model_->corruptions(), 0);
  }
  std::shared_ptr<WaitingSink> Submit(EngineRequest request) {
    auto sink = std::make_shared<WaitingSink>();
    const auto id = engine_->Submit(std::move(request), sink);
    EXPECT_TRUE(id.ok()) << id.status();
    id_ = id.ok() ? *id : 0;
    return sink;
  }

  // An idle session with about `tokens` tokens in the pool.
  std::string MakeSession(int64_t tokens) {
    const std::string id = engine_->CreateSession("")->id;
    EngineRequest turn = GenerateRequest(RandomTokens(1000, tokens), 1);
    turn.session_id = id;
    EXPECT_TRUE(Submit(std::move(turn))->Wait().status.ok());
    return id;
  }

  std::shared_ptr<ManualClock> clock_ = std::make_shared<ManualClock>();
  std::atomic<int64_t> forwards_{0};
  std::unique_ptr<Engine> engine_;
  FakeModel* model_ = nullptr;
  RequestId id_ = 0;
};

// The text is what the model itself says, so every prediction is right, whichever step made it.
TEST_F(CompareTest, PositionsMeetTheirTokens) {
  Start();
  std::vector<int32_t> tokens = RandomTokens(1000, 700);
  for (int i = 0; i < 100; ++i) tokens.push_back(NextFakeToken(tokens));
  const double right = 20 - std::log(std::exp(20.0) + 999);
  for (int64_t decode_from : {0, 700, 750, 799}) {
    const Outcome o = RunCompare(engine_.get(), Request(tokens, 699, decode_from));
    ASSERT_TRUE(o.result.ok()) << o.result.status();
    ASSERT_EQ(o.positions.size(), 100u);
    for (size_t i = 0; i < o.positions.size(); ++i) {
      EXPECT_EQ(o.positions[i].position, 699 + int64_t(i));
      EXPECT_EQ(o.positions[i].kl, 0);
      EXPECT_TRUE(o.positions[i].top1_equal);
      EXPECT_NEAR(o.positions[i].logprob_a, right, 1e-9) << i;
      EXPECT_NEAR(o.positions[i].logprob_b, right, 1e-9) << i;
    }
    EXPECT_EQ(o.result->kv_bytes_a, o.result->kv_bytes_b);
    ExpectPagesReturned();
  }
}

TEST_F(CompareTest, CancelAnywhereReturnsEveryPage) {
  Start();
  const CompareRequest request = Request(RandomTokens(1000, 1500), 1000, 1450);
  // Empty calls, which only say that work goes on, are joined: how many come depends on the caller.
  int batches = 0;
  ASSERT_TRUE(
      engine_->Compare(request, [&](auto some) { return batches += !some.empty(), true; }).ok());
  ASSERT_GT(batches, 5);
  for (int at = 0; at <= batches; ++at) {
    int batch = 0;
    bool ended = false;
    const auto result = engine_->Compare(request, [&](auto some) {
      EXPECT_FALSE(ended) << "nothing is told after the cancel";
      batch += !some.empty();
      ended = batch == at;  // at 0: at the very first call
      return !ended;
    });
    EXPECT_TRUE(absl::IsCancelled(result.status())) << at << ": " << result.status();
    ExpectPagesReturned();
  }
}

TEST_F(CompareTest, OneAtATimeAndOthersAreServed) {
  Start();
  StandingCompare first(engine_.get(), Request(RandomTokens(1000, kLong), 0, 0));
  const Outcome second = RunCompare(engine_.get(), Request(RandomTokens(1000, 200), 0, 0));
  EXPECT_TRUE(absl::IsResourceExhausted(second.result.status())) << second.result.status();
  EXPECT_TRUE(IsRetryable(second.result.status()));
  EXPECT_TRUE(Submit(GenerateRequest(RandomTokens(1000, 900), 30))->Wait().status.ok());
  EXPECT_TRUE(first.GoOn().ok());
  EXPECT_EQ(first.positions(), size_t(kLong - 1));
  ExpectPagesReturned();
  EXPECT_TRUE(RunCompare(engine_.get(), Request(RandomTokens(1000, 200), 0, 0)).result.ok());
}

// 12000 positions are three times what may wait for a caller: the engine must stop between.
TEST_F(CompareTest, DoesNotRunAheadOfItsCaller) {
  Start();
  StandingCompare standing(engine_.get(), Request(RandomTokens(1000, 12000), 0, 0));
  // Every turn of the engine's loop could run a step of the comparison; it has 24 pieces of 10
  // steps.
  constexpr int64_t kSteps = 600;
  auto sink = Submit(GenerateRequest(RandomTokens(1000, 10), kSteps));
  EXPECT_TRUE(sink->Wait().status.ok());
  EXPECT_LT(forwards_ - kSteps, 40) << "of 94 that read the whole text";
  EXPECT_TRUE(standing.GoOn().ok());
  EXPECT_EQ(standing.positions(), 11999u);
  ExpectPagesReturned();
}

TEST_F(CompareTest, TheDeadlineEndsIt) {
  Start();
  CompareRequest request = Request(RandomTokens(1000, kLong), 0, 0);
  request.deadline = clock_->Now() + std::chrono::seconds(10);
  StandingCompare standing(engine_.get(), request);
  clock_->seconds += 11;
  // Gone without its caller's doing: another one can run.
  Outcome other;
  do {
    other = RunCompare(engine_.get(), Request(RandomTokens(1000, 200), 0, 0));
  } while (IsRetryable(other.result.status()));
  EXPECT_TRUE(other.result.ok()) << other.result.status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(standing.GoOn().status()));
  ExpectPagesReturned();
}

TEST_F(CompareTest, DrainAndDestructionEndIt) {
  Start();
  {
    StandingCompare standing(engine_.get(), Request(RandomTokens(1000, kLong), 0, 0));
    engine_->Drain(std::chrono::steady_clock::now());
    ExpectPagesReturned();
    EXPECT_TRUE(absl::IsUnavailable(standing.GoOn().status()));
  }
  EXPECT_TRUE(absl::IsUnavailable(
      RunCompare(engine_.get(), Request(RandomTokens(1000, 20), 0, 0)).result.status()));
  engine_.reset();
  Start();
  StandingCompare standing(engine_.get(), Request(RandomTokens(1000, kLong), 0, 0));
  engine_.reset();
  EXPECT_TRUE(absl::IsUnavailable(standing.GoOn().status()));
}

TEST_F(CompareTest, MemoryThatIsNotThere) {
  Start(400, 4096);  // 3000 tokens take 47 pages in each of 4 heads, for each policy
  const Outcome never = RunCompare(engine_.get(), Request(RandomTokens(1000, 4000), 0, 0));
  EXPECT_TRUE(absl::IsResourceExhausted(never.result.status())) << never.result.status();
  EXPECT_FALSE(IsRetryable(never.result.status()));

  auto sink = Submit(GenerateRequest(RandomTokens(1000, 1000), 3000));
  sink->WaitForFirst();
  const Outcome later = RunCompare(engine_.get(), Request(RandomTokens(1000, 2000), 0, 0));
  EXPECT_TRUE(absl::IsResourceExhausted(later.result.status())) << later.result.status();
  EXPECT_TRUE(IsRetryable(later.result.status()));
  engine_->Cancel(id_, absl::CancelledError("enough"));
  sink->Wait();
  EXPECT_TRUE(RunCompare(engine_.get(), Request(RandomTokens(1000, 2000), 0, 0)).result.ok());
  ExpectPagesReturned();

  model_->max_rows = 100;
  const Outcome rows = RunCompare(engine_.get(), Request(RandomTokens(1000, 2000), 0, 0));
  EXPECT_TRUE(absl::IsResourceExhausted(rows.result.status())) << rows.result.status();
  ExpectPagesReturned();
}

// 32 pages in each of 4 heads for each policy; the sessions hold 47 in each head.
TEST(CompareRoomTest, SessionsMoveForItAPageAStepWhileOthersGoOn) {
  ManualEngine m({.session_host_bytes = int64_t{1} << 30, .session_step_bytes = 1}, 400);
  Engine& engine = *m.engine;
  const std::string id = engine.CreateSession("")->id;
  EngineRequest turn = GenerateRequest(RandomTokens(1000, 3000), 1);
  turn.session_id = id;
  auto sink = std::make_shared<WaitingSink>();
  ASSERT_TRUE(engine.Submit(std::move(turn), sink).ok());
  while (engine.Stats().completed == 0) m.engine->RunOnce();
  constexpr int64_t kTokens = 1000;
  auto other = std::make_shared<WaitingSink>();
  const auto running = engine.Submit(GenerateRequest(RandomTokens(1000, 10), kTokens), other);
  m.engine->RunOnce();
  engine.SetPaused(*running, true);

  std::atomic<bool> done = false;
  Outcome outcome;
  std::thread comparing([&] {
    outcome = RunCompare(&engine, Request(RandomTokens(1000, 2000), 0, 0));
    done = true;
  });
  while (engine.Stats().memory[3].name != "compare") m.engine->RunOnce();
  EXPECT_EQ(engine.GetSession("", id)->tier, SessionTier::kDevice) << "moved in one step";
  engine.SetPaused(*running, false);
  const int64_t before = engine.Stats().generated_tokens;
  while (engine.GetSession("", id)->tier == SessionTier::kDevice) m.engine->RunOnce();
  EXPECT_GT(engine.Stats().generated_tokens - before, 150);
  while (!done) m.engine->RunOnce();
  comparing.join();
  EXPECT_TRUE(outcome.result.ok()) << outcome.result.status();
  engine.Cancel(*running, absl::CancelledError("enough"));
  while (engine.Stats().running > 0) m.engine->RunOnce();
  EXPECT_EQ(m.pool->used(), 0);
}

TEST_F(CompareTest, WhereThereIsNoOtherTierAnIdleEngineDropsSessionsForIt) {
  Start(400, 4096);
  const std::string id = MakeSession(3000);
  auto sink = Submit(GenerateRequest(RandomTokens(1000, 10), 1000));
  sink->WaitForFirst();
  engine_->SetPaused(id_, true);
  const CompareRequest request = Request(RandomTokens(1000, 2000), 0, 0);
  const Outcome refused = RunCompare(engine_.get(), request);
  EXPECT_TRUE(absl::IsResourceExhausted(refused.result.status())) << refused.result.status();
  EXPECT_TRUE(IsRetryable(refused.result.status()));
  EXPECT_TRUE(engine_->GetSession("", id).ok()) << "the request will give its memory back";
  engine_->Cancel(id_, absl::CancelledError("enough"));
  sink->Wait();
  // What can never fit costs nobody a session.
  EXPECT_FALSE(RunCompare(engine_.get(), Request(RandomTokens(1000, 4000), 0, 0)).result.ok());
  EXPECT_TRUE(engine_->GetSession("", id).ok());
  EXPECT_TRUE(RunCompare(engine_.get(), request).result.ok());
  EXPECT_EQ(Reason(engine_->GetSession("", id).status()), kSessionLost);
  ExpectPagesReturned();
}

TEST_F(CompareTest, IsInTheRequestCounts) {
  Start(1000, 16384);
  const auto expect = [&](int64_t admitted, int64_t running, int64_t completed, int64_t cancelled,
                          int64_t failed) {
    EXPECT_TRUE(engine_->WarmUp().ok());  // a round trip through the engine thread
    const EngineStats stats = engine_->Stats();
    EXPECT_EQ(stats.admitted, admitted);
    EXPECT_EQ(stats.running, running);
    EXPECT_EQ(stats.waiting, 0);
    EXPECT_EQ(stats.completed, completed);
    EXPECT_EQ(stats.cancelled, cancelled);
    EXPECT_EQ(stats.failed, failed);
    return stats.steps;
  };
  EXPECT_TRUE(RunCompare(engine_.get(), Request(RandomTokens(1000, 200), 0, 0)).result.ok());
  // Both policies read the text, then 199 rows are scored, 64 at a time.
  EXPECT_EQ(expect(1, 0, 1, 0, 0), 6);
  StandingCompare standing(engine_.get(), Request(RandomTokens(1000, kLong), 0, 0));
  expect(2, 1, 1, 0, 0);
  EXPECT_FALSE(RunCompare(engine_.get(), Request(RandomTokens(1000, 200), 0, 0)).result.ok());
  expect(2, 1, 1, 0, 0);  // refused, because one is running
  engine_->Drain(std::chrono::steady_clock::now());
  EXPECT_TRUE(absl::IsUnavailable(standing.GoOn().status()));
  expect(2, 0, 1, 1, 0);

  Start(100, 16384);
  EXPECT_FALSE(RunCompare(engine_.get(), Request(RandomTokens(1000, 8000), 0, 0)).result.ok());
  expect(1, 0, 0, 0, 1);
}

TEST_F(CompareTest, BadFieldsAreNamed) {
  Start(4000, 4096);
  const std::pair<const char*, std::function<void(CompareRequest*)>> cases[] = {
      {"token_ids", [](CompareRequest* r) { r->tokens.resize(1); }},
      {"token_ids", [](CompareRequest* r) { r->tokens[3] = 1000; }},
      {"token_ids", [](CompareRequest* r) { r->tokens[3] = -1; }},
      {"token_ids", [](CompareRequest* r) { r->tokens.resize(4097, 5); }},
      {"score_from", [](CompareRequest* r) { r->score_from = -1; }},
      {"score_from", [](CompareRequest* r) { r->score_from = 99; }},
      {"decode_from", [](CompareRequest* r) { r->decode_from = -1; }},
      {"decode_from", [](CompareRequest* r) { r->decode_from = 100; }},
      {"policy_a.prefill", [](CompareRequest* r) { r->prefill_a.params.segment = 100; }},
      {"policy_b.prefill", [](CompareRequest* r) { r->prefill_b.params.segment = 100; }},
      {"policy_a.kv", [](CompareRequest* r) { r->kv_a.params.budget = -1; }},
      {"policy_b.kv", [](CompareRequest* r) { r->kv_b.params.budget = -1; }},
  };
  for (const auto& [field, spoil] : cases) {
    CompareRequest r = Request(RandomTokens(1000, 100), 0, 0);
    spoil(&r);
    const absl::Status status = RunCompare(engine_.get(), r).result.status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << field << ": " << status;
    EXPECT_TRUE(status.message().substr(0, std::string(field).size()) == field) << status;
  }
  CompareRequest last = Request(RandomTokens(1000, 100), 98, 99);
  EXPECT_EQ(RunCompare(engine_.get(), last).positions.size(), 1u);
}

// ---- What it computes, on a tiny model

constexpr int64_t kTokens = 700;

class CompareModelTest : public testing::Test {
 protected:
  static TestModel Load() {
    return LoadTestModel(GoldenPath("models/qwen2_yarn"), DType::kF32, 1024);
  }
  void SetUp() override {
    TestModel t = Load();
    t.pool.reset();
    vocab_ = t.model->config().vocab;
    tokens_ = RandomTokens(vocab_, kTokens);
    EngineParts parts;
    parts.backend = std::move(t.backend);
    parts.model = std::move(t.model);
    parts.tokenizer = std::make_shared<FakeTokenizer>();
    parts.options.max_context = 1024;
    parts.options.step_tokens = parts.options.lone_chunk_tokens = 256;
    parts.pages = 4096;
    engine_ = *MakeEngine(std::move(parts));
  }
  // Acts on short prompts.
  static PrefillPolicy Sparse(const std::string& preset) {
    PrefillPolicy policy = *PrefillPreset(preset, "test");
    policy.params.segment = 128;
    policy.params.dense_prefix = 128;
    policy.params.dense_suffix = 32;
    policy.params.base = 160;
    return policy;
  }
  // Logits of every row, read in one step.
  std::vector<float> Logits(const PrefillPolicy& policy) {
    TestModel t = Load();
    TestSequence sequence(&t, tokens_, policy, Kv("full"), 0);
    return RunStep(&t, {{&sequence, kTokens}})[0];
  }
  std::vector<double> Logprobs(const std::vector<float>& logits, int64_t row) const {
    std::vector<double> x(logits.begin() + row * vocab_, logits.begin() + (row + 1) * vocab_);
    double sum = 0;
    for (double v : x) sum += std::exp(v);
    for (double& v : x) v -= std::log(sum);
    return x;
  }
  // What Generate says of the tokens from `decode_from` on.
  std::vector<float> GenerateLogprobs(const PrefillPolicy& prefill, const KvPolicy& kv,
                                      int64_t decode_from) {
    EngineRequest r =
        GenerateRequest({tokens_.begin(), tokens_.begin() + decode_from}, kTokens - decode_from);
    r.prefill = prefill;
    r.kv = kv;
    r.sampling.logprobs = 0;
    r.sampling.forced_token_ids.assign(tokens_.begin() + decode_from, tokens_.end());
    auto sink = std::make_shared<WaitingSink>();
    EXPECT_TRUE(engine_->Submit(std::move(r), sink).ok());
    const FinishedEvent end = sink->Wait();
    EXPECT_TRUE(end.status.ok()) << end.status;
    compressed_ = end.receipt.compressed;
    kv_bytes_ = end.receipt.kv_bytes_after;
    return sink->logprobs;
  }

  int vocab_ = 0;
  std::vector<int32_t> tokens_;
  std::unique_ptr<Engine> engine_;
  bool compressed_ = false;
  int64_t kv_bytes_ = 0;
};

TEST_F(CompareModelTest, AgreesWithLogitsReadByHand) {
  for (const char* preset : {"entropy", "coverage", "entropy_paper"}) {
    CompareRequest r = Request(tokens_, 0, 0);
    r.prefill_b = Sparse(preset);
    const Outcome o = RunCompare(engine_.get(), r);
    ASSERT_TRUE(o.result.ok()) << o.result.status();
    ASSERT_EQ(o.positions.size(), size_t(kTokens - 1));
    const std::vector<float> a = Logits(r.prefill_a), b = Logits(r.prefill_b);
    double largest = 0;
    for (int64_t row = 0; row < kTokens - 1; ++row) {
      const std::vector<double> p = Logprobs(a, row), q = Logprobs(b, row);
      double kl = 0;
      for (int i = 0; i < vocab_; ++i) kl += std::exp(p[i]) * (p[i] - q[i]);
      const ComparePosition& got = o.positions[row];
      EXPECT_EQ(got.position, row);
      EXPECT_NEAR(got.kl, kl, 1e-6 + 1e-4 * kl) << preset << " " << row;
      EXPECT_NEAR(got.logprob_a, p[tokens_[row + 1]], 1e-5);
      EXPECT_NEAR(got.logprob_b, q[tokens_[row + 1]], 1e-4);
      largest = std::max(largest, kl);
    }
    EXPECT_GT(largest, 1e-5) << preset << " read everything: there is nothing to see";
    EXPECT_DOUBLE_EQ(o.result->attention_flops_a, o.result->attention_flops_dense);
    EXPECT_LT(o.result->attention_flops_b, o.result->attention_flops_dense);
  }
}

TEST_F(CompareModelTest, APolicyIsItself) {
  for (const char* preset : {"full", "entropy", "coverage", "critiprefill", "entropy_paper"}) {
    CompareRequest r = Request(tokens_, 0, 600);
    r.prefill_a = r.prefill_b = Sparse(preset);
    r.kv_a = r.kv_b = Kv("latent");
    const Outcome o = RunCompare(engine_.get(), r);
    ASSERT_TRUE(o.result.ok()) << o.result.status();
    ASSERT_EQ(o.positions.size(), size_t(kTokens - 1));
    for (const ComparePosition& p : o.positions) {
      EXPECT_EQ(p.kl, 0) << preset << " " << p.position;
      EXPECT_TRUE(p.top1_equal);
      EXPECT_EQ(p.logprob_a, p.logprob_b);
    }
    EXPECT_EQ(o.result->kv_bytes_a, o.result->kv_bytes_b);
    EXPECT_EQ(o.result->attention_flops_a, o.result->attention_flops_b);
  }
}

TEST_F(CompareModelTest, TheDecodedPartIsWhatGenerateComputes) {
  constexpr int64_t kDecodeFrom = 600;
  const PrefillPolicy prefill = Sparse("entropy");
  for (const char* kv : {"latent", "snapkv", "adakv"}) {
    CompareRequest r = Request(tokens_, kDecodeFrom - 1, kDecodeFrom);
    r.prefill_b = prefill;
    r.kv_b = Kv(kv);
    const Outcome o = RunCompare(engine_.get(), r);
    ASSERT_TRUE(o.result.ok()) << o.result.status();
    const std::vector<float> a = GenerateLogprobs(r.prefill_a, r.kv_a, kDecodeFrom);
    const std::vector<float> b = GenerateLogprobs(r.prefill_b, r.kv_b, kDecodeFrom);
    EXPECT_TRUE(compressed_);
    ASSERT_EQ(o.positions.size(), a.size());
    double largest = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(o.positions[i].logprob_a, a[i], 1e-5) << kv << " " << i;
      EXPECT_NEAR(o.positions[i].logprob_b, b[i], 1e-5) << kv << " " << i;
      largest = std::max(largest, o.positions[i].kl);
    }
    EXPECT_GT(largest, 1e-5) << kv << " dropped nothing that mattered";
    EXPECT_LT(o.result->kv_bytes_b, o.result->kv_bytes_a);
  }
}

}  // namespace
}  // namespace entropyserve
