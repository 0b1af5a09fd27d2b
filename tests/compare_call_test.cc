// Compare over the wire: its stream, its errors, and that neither a reader nor a caller who left
// holds anything up.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::StartsWith;

class CompareCallTest : public ServerFixture {
 protected:
  void Start(ServiceLimits limits = {}, Authenticator authenticator = {}) {
    limits.allow_compare = true;
    StartServer(limits, {}, true, std::move(authenticator));
  }
  static v1::CompareRequest Request(int tokens, int64_t score_from = 0) {
    v1::CompareRequest request;
    for (int i = 0; i < tokens; ++i) request.mutable_token_ids()->add_ids(i % 50);
    request.set_score_from(score_from);
    return request;
  }
  struct Result {
    std::vector<v1::CompareEvent> events;
    grpc::Status status;
    int64_t positions() const {
      int64_t n = 0;
      for (const v1::CompareEvent& event : events) n += event.positions_size();
      return n;
    }
  };
  Result Compare(const v1::CompareRequest& request, grpc::ClientContext* context = nullptr) {
    grpc::ClientContext own;
    Result result;
    const auto reader = stub_->Compare(context ? context : &own, request);
    v1::CompareEvent event;
    while (reader->Read(&event)) result.events.push_back(event);
    result.status = reader->Finish();
    return result;
  }
};

TEST_F(CompareCallTest, StreamsEveryPositionThenTheSummary) {
  Start();
  v1::CompareRequest request = Request(1000, 300);
  request.set_decode_from(900);
  request.mutable_policy_a()->mutable_prefill()->set_preset("full");
  request.mutable_policy_b()->mutable_prefill()->set_base_tokens(4096);
  request.mutable_policy_b()->mutable_kv()->set_preset("snapkv");
  const Result result = Compare(request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  int64_t position = 300;
  for (const v1::CompareEvent& event : result.events) {
    for (const v1::ComparedPosition& p : event.positions()) {
      EXPECT_EQ(p.position(), position);
      EXPECT_EQ(p.kl(), double(position));
      EXPECT_EQ(p.top1_equal(), position % 2 == 0);
      EXPECT_EQ(p.logprob_a(), -double((position + 1) % 50));
      EXPECT_EQ(p.logprob_b(), -double(position));
      ++position;
    }
    EXPECT_EQ(event.has_summary(), &event == &result.events.back());
  }
  EXPECT_EQ(position, 999);
  const v1::CompareSummary& summary = result.events.back().summary();
  EXPECT_EQ(summary.attention_flops_a(), 1);
  EXPECT_EQ(summary.attention_flops_b(), 2);
  EXPECT_EQ(summary.attention_flops_dense(), 3);
  EXPECT_EQ(summary.prefill_seconds_a(), 4);
  EXPECT_EQ(summary.prefill_seconds_b(), 5);
  EXPECT_EQ(summary.kv_bytes_a(), 6);
  EXPECT_EQ(summary.kv_bytes_b(), 7);

  ASSERT_EQ(engine_->Compares().size(), 1u);
  const entropyserve::CompareRequest asked = engine_->Compares()[0];
  EXPECT_EQ(asked.tokens.size(), 1000u);
  EXPECT_EQ(asked.score_from, 300);
  EXPECT_EQ(asked.decode_from, 900);
  EXPECT_TRUE(asked.prefill_a.params.full);
  EXPECT_EQ(asked.prefill_b.name, model_->prefill.name) << "the server's default";
  EXPECT_EQ(asked.prefill_b.params.base, 4096);
  EXPECT_EQ(asked.kv_a.name, model_->kv.name);
  EXPECT_EQ(asked.kv_b.name, "snapkv");
}

TEST_F(CompareCallTest, ErrorsNameTheirFields) {
  Start();
  v1::CompareRequest request = Request(10);
  request.mutable_token_ids()->set_ids(3, -1);
  EXPECT_THAT(Compare(request).status.error_message(), StartsWith("token_ids[3]"));
  const auto expect = [&](const char* field, auto spoil) {
    v1::CompareRequest bad = Request(10);
    spoil(bad);
    const grpc::Status status = Compare(bad).status;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << field;
    EXPECT_THAT(status.error_message(), StartsWith(field));
  };
  expect("policy_a.prefill.preset",
         [](auto& r) { r.mutable_policy_a()->mutable_prefill()->set_preset("?"); });
  expect("policy_b.prefill.segment_tokens",
         [](auto& r) { r.mutable_policy_b()->mutable_prefill()->set_segment_tokens(7); });
  expect("policy_a.kv.preset",
         [](auto& r) { r.mutable_policy_a()->mutable_kv()->set_preset("?"); });
  expect("policy_b.kv.budget_tokens",
         [](auto& r) { r.mutable_policy_b()->mutable_kv()->set_budget_tokens(-5); });
  EXPECT_EQ(CallRaw("Compare", "\x0a\xff").error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  engine_->SetSubmitStatus(absl::InvalidArgumentError("score_from: out of range"));
  EXPECT_THAT(Compare(Request(10)).status.error_message(), StartsWith("score_from"));
  engine_->SetSubmitStatus(
      WithRetryAfter(absl::ResourceExhaustedError("another comparison is running"), 5));
  const grpc::Status busy = Compare(Request(10)).status;
  EXPECT_EQ(busy.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(RetrySeconds(busy), 5);
}

TEST_F(CompareCallTest, AsksForAKey) {
  const auto keys = Authenticator::FromText(  // SHA-256 of "secret"
      "alice 2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n", "keys");
  ASSERT_TRUE(keys.ok()) << keys.status();
  Start({}, *keys);
  EXPECT_EQ(Compare(Request(10)).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer secret");
  EXPECT_TRUE(Compare(Request(10), &context).status.ok());
}

// The engine makes no more than the outbox, the transport's windows and one batch take.
TEST_F(CompareCallTest, AReaderThatDoesNotReadHoldsTheEngineBackAndNobodyElse) {
  Start({.outbox_bytes = 4096});
  constexpr int kTokens = 1'000'000;  // 30 MB of answer
  const auto own_connection = NewStub();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(3));
  const auto reader = own_connection->Compare(&context, Request(kTokens));
  FakeEngine::WaitFor([&] { return engine_->Compared() > 0; });
  EXPECT_TRUE(Generate(TextRequest()).status.ok());
  // The lane is free again when the deadline has ended the call.
  EXPECT_EQ(Compare(Request(100)).positions(), 99);
  EXPECT_LT(engine_->Compared(), kTokens / 2);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(CompareCallTest, AReaderThatStopsIsCutOffAndTheNextComparisonRuns) {
  Start({.unread_seconds = 0.05, .outbox_bytes = 4096});
  const auto own_connection = NewStub();
  grpc::ClientContext stopped_context, next_context;
  stopped_context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(2));
  const auto stopped = own_connection->Compare(&stopped_context, Request(1'000'000));
  FakeEngine::WaitFor([&] { return engine_->Compares().size() == 1; });
  next_context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
  const Result next = Compare(Request(100), &next_context);
  EXPECT_TRUE(next.status.ok()) << next.status.error_message();
  EXPECT_EQ(next.positions(), 99);
  EXPECT_LT(engine_->Compared(), 500'000) << "the engine ran ahead of the reader";
  v1::CompareEvent event;
  while (stopped->Read(&event)) EXPECT_FALSE(event.has_summary());
  EXPECT_EQ(stopped->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(CompareCallTest, AFinishedAnswerThatIsNotReadIsCutOff) {
  Start({.unread_seconds = 0.05, .outbox_bytes = 128 << 20});
  const auto stub = NewStub();
  grpc::ClientContext context;
  const auto reader = stub->Compare(&context, Request(1'000'000));
  FakeEngine::WaitFor([&] { return engine_->Compared() == 999'999; });
  FakeEngine::WaitFor([&] { return core_->open_calls() == 0; });
  v1::CompareEvent event;
  while (reader->Read(&event)) EXPECT_FALSE(event.has_summary());
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(CompareCallTest, ASlowReaderGetsEverything) {
  Start({.outbox_bytes = 512});
  const Result result = Compare(Request(20'000));
  EXPECT_TRUE(result.status.ok());
  EXPECT_EQ(result.positions(), 19'999);
}

TEST_F(CompareCallTest, CancelReachesTheEngineAndTheQueue) {
  Start();
  engine_->Hold(true);
  grpc::ClientContext first_context, second_context;
  const auto first = stub_->Compare(&first_context, Request(100));
  FakeEngine::WaitFor([&] { return engine_->Compares().size() == 1; });
  const auto second = stub_->Compare(&second_context, Request(200));
  FakeEngine::WaitFor([&] { return core_->open_calls() == 2; });
  second_context.TryCancel();  // while it waits for the first
  EXPECT_EQ(second->Finish().error_code(), grpc::StatusCode::CANCELLED);
  FakeEngine::WaitFor([&] { return core_->open_calls() == 1; });
  first_context.TryCancel();
  EXPECT_EQ(first->Finish().error_code(), grpc::StatusCode::CANCELLED);
  FakeEngine::WaitFor([&] { return core_->open_calls() == 0; });
  engine_->Hold(false);
  EXPECT_EQ(Compare(Request(300)).positions(), 299);
  EXPECT_EQ(engine_->Compares().size(), 2u) << "the cancelled one never began";
}

TEST_F(CompareCallTest, ADrainEndsIt) {
  Start();
  engine_->Hold(true);
  grpc::ClientContext context;
  const auto reader = stub_->Compare(&context, Request(100));
  FakeEngine::WaitFor([&] { return engine_->Compares().size() == 1; });
  core_->BeginDrain();
  core_->AbortAll(absl::UnavailableError("the server is draining"));
  v1::CompareEvent event;
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Compare(Request(100)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

}  // namespace
}  // namespace entropyserve
