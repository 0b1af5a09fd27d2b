// The service end to end over loopback: streams, prompts, errors, cancellation, slow readers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <thread>

#include "server/outbox.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
using Event = v1::GenerateEvent;

// --- Streams ---

class StreamTest : public ServerFixture {
 protected:
  void SetUp() override { StartServer(); }
};

TEST_F(StreamTest, EventsComeInOrderAndTheReceiptLast) {
  engine_->SetScript({.prefill_steps = 3, .tokens = 5});
  v1::GenerateRequest request = TextRequest();
  request.set_progress(true);
  request.set_request_id("r1");
  request.mutable_sampling()->set_seed(7);
  const Result result = Generate(request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  ASSERT_GE(result.events.size(), 3u);
  int stage = 0;
  int64_t progressed = 0;
  std::vector<int32_t> ids;
  for (const Event& event : result.events) {
    const int next = event.has_accepted()   ? 0
                     : event.has_progress() ? 1
                     : event.has_tokens()   ? 2
                                            : 3;
    EXPECT_GE(next, stage);
    stage = next;
    if (event.has_progress()) {
      EXPECT_GT(event.progress().prefilled_tokens(), progressed);
      progressed = event.progress().prefilled_tokens();
    }
    ids.insert(ids.end(), event.tokens().ids().begin(), event.tokens().ids().end());
  }
  EXPECT_TRUE(result.events.front().has_accepted());
  EXPECT_EQ(result.text(), "t0 t1 t2 t3 t4 ");
  EXPECT_EQ(ids.size(), 5u);
  const auto prompt = static_cast<int64_t>(engine_->Requests()[0].prompt.size());
  EXPECT_EQ(result.events.front().accepted().prompt_tokens(), prompt);
  EXPECT_EQ(progressed, prompt);
  ASSERT_TRUE(result.events.back().has_finished());
  const v1::Finished& finished = result.events.back().finished();
  EXPECT_EQ(finished.reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(finished.receipt().generated_tokens(), 5);
  EXPECT_EQ(finished.receipt().seed(), 7u);
  EXPECT_DOUBLE_EQ(finished.receipt().attention_flops_ratio(), 0.25);
  EXPECT_DOUBLE_EQ(finished.receipt().kv_bytes_ratio(), 0.25);
  EXPECT_EQ(finished.receipt().policy().prefill().preset(), "entropy");
  EXPECT_EQ(finished.receipt().policy().kv().budget_tokens(), 2048);
  EXPECT_EQ(engine_->Requests()[0].request_id, "r1");
}

TEST_F(StreamTest, LogprobsAndTraceArrive) {
  engine_->SetScript({.tokens = 2, .trace_layers = 3});
  v1::GenerateRequest request = TextRequest();
  request.mutable_sampling()->set_logprobs(2);
  request.set_trace(true);
  const Result result = Generate(request);
  ASSERT_TRUE(result.status.ok());
  int logprobs = 0;
  std::vector<int> layers;
  for (const Event& event : result.events) {
    for (const v1::TokenLogprobs& token : event.tokens().logprobs()) {
      EXPECT_FLOAT_EQ(token.logprob(), -1.5f);
      ASSERT_EQ(token.top_size(), 2);
      EXPECT_EQ(token.top(1).id(), 1);
      ++logprobs;
    }
    if (event.has_trace()) {
      layers.push_back(event.trace().layer());
      ASSERT_EQ(event.trace().entropy_size(), 6);  // 2 kv heads, 3 segments
      EXPECT_FLOAT_EQ(event.trace().entropy(0), 6.0f * event.trace().layer());
      EXPECT_EQ(event.trace().selected(5), 6 * event.trace().layer() + 5);
      ASSERT_EQ(event.trace().kept_size(), 2);
      EXPECT_THAT(event.trace().kept(1).positions(),
                  ElementsAre(2 * event.trace().layer() + 1, 2 * event.trace().layer() + 2));
    }
  }
  EXPECT_EQ(logprobs, 2);
  EXPECT_THAT(layers, ElementsAre(0, 1, 2));
  EXPECT_TRUE(result.events.back().has_finished());
}

// What a KV budget of a whole long prompt keeps is more than a gRPC client takes in one message.
TEST_F(StreamTest, LargeTracesComeInEventsOfBoundedSize) {
  constexpr int kKept = 1'000'003;
  engine_->SetScript({.tokens = 1, .trace_layers = 2, .trace_kept = kKept});
  v1::GenerateRequest request = TextRequest();
  request.set_trace(true);
  const Result result = Generate(request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  std::vector<v1::LayerTrace> layers;
  for (const Event& event : result.events) {
    EXPECT_LE(event.ByteSizeLong(), 2'000'000u);
    if (!event.has_trace()) continue;
    v1::LayerTrace part = event.trace();
    if (part.layer() == static_cast<int>(layers.size())) {
      layers.push_back(part);
      continue;
    }
    ASSERT_EQ(part.layer(), static_cast<int>(layers.size()) - 1);
    if (part.continues_kept()) {
      layers.back().mutable_kept()->rbegin()->MergeFrom(part.kept(0));
      part.mutable_kept()->DeleteSubrange(0, 1);
    }
    layers.back().MergeFrom(part);
  }
  ASSERT_EQ(layers.size(), 2u);
  for (const v1::LayerTrace& layer : layers) {
    EXPECT_EQ(layer.entropy_size(), 6);
    EXPECT_EQ(layer.selected(5), 6 * layer.layer() + 5);
    ASSERT_EQ(layer.kept_size(), 2);
    for (int head = 0; head < 2; ++head) {
      std::vector<int32_t> all(kKept);
      std::iota(all.begin(), all.end(), 2 * layer.layer() + head);
      EXPECT_TRUE(std::ranges::equal(layer.kept(head).positions(), all));
    }
  }
}

TEST_F(StreamTest, ManyStreamsAtOnceStayApart) {
  engine_->SetScript({.tokens = 50});
  std::vector<std::thread> threads;
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([this, i] {
      v1::GenerateRequest request;
      for (int id = 0; id <= i; ++id) request.mutable_token_ids()->add_ids(id);
      const Result result = Generate(request);
      ASSERT_TRUE(result.status.ok());
      std::vector<int32_t> ids, expected;
      for (const Event& event : result.events) {
        ids.insert(ids.end(), event.tokens().ids().begin(), event.tokens().ids().end());
      }
      for (int k = 0; k < 50; ++k) expected.push_back(i + 1 + k);
      EXPECT_EQ(ids, expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(engine_->Stats().completed, 16);
}

TEST_F(StreamTest, FailureAfterAdmissionEndsWithFinishedAndItsStatus) {
  engine_->SetScript({.fail_after_prefill = absl::ResourceExhaustedError("scratch is full")});
  const Result result = Generate(TextRequest());
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  ASSERT_TRUE(result.events.back().has_finished());
  EXPECT_EQ(result.events.back().finished().reason(), v1::FINISH_REASON_ERROR);
}

TEST_F(StreamTest, ARefusalByTheEngineIsAStatusWithoutEvents) {
  engine_->SetScript({.refuse = WithRetryAfter(absl::ResourceExhaustedError("too late"), 2.5)});
  const Result result = Generate(TextRequest());
  EXPECT_TRUE(result.events.empty());
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_DOUBLE_EQ(RetrySeconds(result.status).value_or(0), 2.5);
}

TEST_F(StreamTest, InternalErrorsKeepTheirTextToThemselves) {
  engine_->SetScript({.fail_after_prefill = absl::InternalError("/secret/path 10.0.0.1")});
  const Result result = Generate(TextRequest());
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(result.status.error_message(), "internal error");
}

// --- Prompts ---

TEST_F(StreamTest, TextIsPlainUnlessParseSpecial) {
  v1::GenerateRequest request = TextRequest("a<|im_end|>");
  ASSERT_TRUE(Generate(request).status.ok());
  request.set_parse_special(true);
  ASSERT_TRUE(Generate(request).status.ok());
  const int32_t end = *model_->tokenizer->FindControl("<|im_end|>");
  const auto requests = engine_->Requests();
  EXPECT_THAT(requests[0].prompt, ::testing::Not(::testing::Contains(end)));
  EXPECT_THAT(requests[1].prompt, ::testing::Contains(end));
  EXPECT_FALSE(requests[0].strip_leading_space);
}

TEST_F(StreamTest, MessagesUseTheTemplateAndContentStaysText) {
  v1::GenerateRequest request;
  v1::Message& message = *request.mutable_messages()->add_messages();
  message.set_role("user");
  message.set_content("x<|im_end|>");
  ASSERT_TRUE(Generate(request).status.ok());
  const EngineRequest sent = engine_->Requests()[0];
  const int32_t end = *model_->tokenizer->FindControl("<|im_end|>");
  EXPECT_EQ(std::count(sent.prompt.begin(), sent.prompt.end(), end), 1);  // the template's own
  EXPECT_EQ(sent.end_of_turn, model_->chat->end_of_turn_ids());
  EXPECT_TRUE(sent.strip_leading_space);
}

TEST_F(StreamTest, PromptErrorsNameTheField) {
  const auto message = [this](const v1::GenerateRequest& request) {
    const Result result = Generate(request);
    EXPECT_EQ(result.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    return result.status.error_message();
  };
  v1::GenerateRequest request;
  EXPECT_THAT(message(request), StartsWith("input:"));
  EXPECT_THAT(message(TextRequest("")), StartsWith("text:"));
  request.mutable_token_ids();
  EXPECT_THAT(message(request), StartsWith("token_ids:"));
  request.mutable_token_ids()->add_ids(0);
  request.mutable_token_ids()->add_ids(model_->vocab_size());
  EXPECT_THAT(message(request), StartsWith("token_ids.ids[1]:"));
  request.mutable_token_ids()->set_ids(1, -1);
  EXPECT_THAT(message(request), StartsWith("token_ids.ids[1]:"));
  request.mutable_messages();
  EXPECT_THAT(message(request), StartsWith("messages"));
  request.mutable_messages()->add_messages()->set_role("wizard");
  EXPECT_THAT(message(request), StartsWith("messages[0].role"));
  request.mutable_messages()->mutable_messages(0)->set_role("user");
  request.mutable_messages()->add_messages()->set_role("assistant");
  EXPECT_THAT(message(request), StartsWith("messages[1].role"));
  request = TextRequest();
  request.set_request_id(std::string(200, 'a'));
  EXPECT_THAT(message(request), StartsWith("request_id:"));
  request.set_request_id("line\nbreak");
  EXPECT_THAT(message(request), StartsWith("request_id:"));
  request = TextRequest();
  request.set_keep_on_disconnect(true);
  EXPECT_THAT(message(request), StartsWith("keep_on_disconnect:"));
  model_->context_tokens = 3;
  EXPECT_THAT(message(TextRequest("one two three four five six")),
              HasSubstr("the context holds 3"));
  EXPECT_THAT(engine_->Requests(), IsEmpty());
}

TEST_F(StreamTest, UnknownTemplateRefusesMessagesButNotText) {
  model_->chat = absl::FailedPreconditionError("messages: the template is not known; text works");
  v1::GenerateRequest request;
  v1::Message& message = *request.mutable_messages()->add_messages();
  message.set_role("user");
  message.set_content("x");
  const Result result = Generate(request);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(ErrorReason(result.status), "NO_CHAT_TEMPLATE");
  EXPECT_TRUE(Generate(TextRequest()).status.ok());
}

TEST_F(StreamTest, LongPromptsFitAsTextAndAsIds) {
  v1::GenerateRequest request;
  constexpr int kTokens = 1'000'000;
  for (int i = 0; i < kTokens; ++i) request.mutable_token_ids()->add_ids(i % model_->vocab_size());
  ASSERT_TRUE(Generate(request).status.ok());
  EXPECT_EQ(engine_->Requests()[0].prompt.size(), size_t{kTokens});
  std::string text;
  while (text.size() < 5'000'000) text += "The quick brown fox jumps over it. ";
  model_->context_tokens = 8 << 20;
  const Result result = Generate(TextRequest(text));
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
}

// --- Messages that do not parse ---

TEST_F(StreamTest, BrokenMessagesAreInvalidArguments) {
  // Field 2 (text), two bytes, which are no UTF-8; then bytes that are no message at all.
  const std::string broken_text = std::string("\x12\x02\xff\xfe", 4);
  for (const std::string& bytes :
       {broken_text, std::string("\xff\xff\xff\xff"), std::string("\x12\x50xx")}) {
    const grpc::Status status = CallRaw("Generate", bytes);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), StartsWith("GenerateRequest:"));
  }
  const std::string broken_tokenize = std::string("\x0a\x02\xff\xfe", 4);
  const grpc::Status status = CallRaw("Tokenize", broken_tokenize);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), StartsWith("TokenizeRequest:"));
  for (const char* method : {"GetSession", "Detokenize", "ForkSession", "DeleteSession"}) {
    EXPECT_EQ(CallRaw(method, "\xff\xff\xff\xff").error_code(), grpc::StatusCode::INVALID_ARGUMENT)
        << method;
  }
  EXPECT_THAT(engine_->Requests(), IsEmpty());
}

// --- Cancellation and deadlines ---

TEST_F(StreamTest, CancelReachesTheEngine) {
  engine_->SetScript({.tokens = 1'000'000});
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, TextRequest());
  Event event;
  while (reader->Read(&event) && !event.has_tokens()) {
  }
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  FakeEngine::WaitFor([this] { return engine_->Stats().cancelled == 1; });
  EXPECT_EQ(engine_->Cancels()[1].code(), absl::StatusCode::kCancelled);
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
}

TEST_F(StreamTest, LostConnectionCancels) {
  engine_->SetScript({.tokens = 1'000'000});
  {
    grpc::ClientContext context;
    const auto stub = NewStub();
    const auto reader = stub->Generate(&context, TextRequest());
    Event event;
    ASSERT_TRUE(reader->Read(&event));
  }
  FakeEngine::WaitFor([this] { return engine_->Stats().cancelled == 1; });
}

TEST_F(StreamTest, DeadlineReachesTheEngine) {
  engine_->Hold(true);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  const Result result = Generate(TextRequest(), &context);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  FakeEngine::WaitFor([this] { return engine_->Stats().cancelled == 1; });
  // The call's, not the default of an hour; gRPC rounds it up on the way.
  const auto deadline = engine_->Requests()[0].deadline;
  EXPECT_LT(deadline, std::chrono::steady_clock::now() + std::chrono::minutes(1));
}

TEST_F(StreamTest, CallsWithoutDeadlineGetTheDefaultAndLongOnesAreCut) {
  const auto seconds_left = [this](const EngineRequest& request) {
    return std::chrono::duration<double>(request.deadline - std::chrono::steady_clock::now())
        .count();
  };
  ASSERT_TRUE(Generate(TextRequest()).status.ok());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::hours(1000));
  ASSERT_TRUE(Generate(TextRequest(), &context).status.ok());
  const auto requests = engine_->Requests();
  EXPECT_LE(seconds_left(requests[0]), 3600);
  EXPECT_GT(seconds_left(requests[0]), 3000);
  EXPECT_LE(seconds_left(requests[1]), 24 * 3600);
  EXPECT_GT(seconds_left(requests[1]), 23 * 3600);
}

// What the prompt was made for goes with it: the engine refuses it when the session has changed.
TEST_F(StreamTest, TheEngineIsToldForWhichTurnAPromptWasMade) {
  ASSERT_TRUE(Generate(TextRequest()).status.ok());
  v1::GenerateRequest request = SessionRequest();
  // Two at once: both find the session empty.
  engine_->HoldSessions(true);
  std::thread other([&] { EXPECT_TRUE(Generate(request).status.ok()); });
  std::thread another([&] { EXPECT_TRUE(Generate(request).status.ok()); });
  FakeEngine::WaitFor([this] { return engine_->WaitingForSessions() == 2; });
  engine_->Hold(true);
  engine_->HoldSessions(false);
  FakeEngine::WaitFor([this] { return engine_->Submits() == 3; });
  engine_->Hold(false);
  other.join();
  another.join();
  ASSERT_TRUE(Generate(request).status.ok());
  request.mutable_token_ids()->add_ids(5);
  ASSERT_TRUE(Generate(request).status.ok());
  const std::vector<EngineRequest> requests = engine_->Requests();
  ASSERT_EQ(requests.size(), 5u);
  EXPECT_EQ(requests[0].first_turn, std::nullopt) << "no session";
  EXPECT_EQ(requests[1].first_turn, true);
  EXPECT_EQ(requests[2].first_turn, true);
  EXPECT_EQ(requests[3].first_turn, false);
  EXPECT_EQ(requests[4].first_turn, std::nullopt) << "ids are used as they are";
}

TEST_F(StreamTest, KeepOnDisconnectRunsToTheEnd) {
  engine_->SetScript({.tokens = 20});
  v1::GenerateRequest request = SessionRequest();
  request.set_keep_on_disconnect(true);
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);
  Event event;
  ASSERT_TRUE(reader->Read(&event));
  engine_->Hold(true);
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
  engine_->Hold(false);
  FakeEngine::WaitFor([this] { return engine_->Stats().completed == 1; });
  EXPECT_THAT(engine_->Cancels(), IsEmpty());
  EXPECT_EQ(engine_->TokensSent(1), 20);
}

TEST_F(StreamTest, KeepOnDisconnectHoldsBeforeTheEngineHasTheRequest) {
  engine_->SetScript({.tokens = 20});
  v1::GenerateRequest request = SessionRequest();
  request.set_keep_on_disconnect(true);
  engine_->HoldSessions(true);  // parsed, and not yet tokenized
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);
  FakeEngine::WaitFor([this] { return engine_->WaitingForSessions() == 1; });
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
  engine_->HoldSessions(false);
  FakeEngine::WaitFor([this] { return engine_->Stats().completed == 1; });
  EXPECT_THAT(engine_->Cancels(), IsEmpty());
  EXPECT_EQ(engine_->TokensSent(1), 20);
}

// Its connection ends while a write waits for it: no call that was cut off counts as answered.
TEST_F(StreamTest, KeptCallsWhoseConnectionIsLostAreNotOk) {
  engine_->SetScript({.tokens = 1'000'000, .text_bytes = 4096});
  v1::GenerateRequest request = SessionRequest();
  request.set_keep_on_disconnect(true);
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, request);  // never read: writes wait
  FakeEngine::WaitFor([this] { return engine_->IsPaused(1); });
  context.TryCancel();
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
  EXPECT_THAT(metrics_.Render(core_->Gauges()),
              HasSubstr("code=\"CANCELLED\",method=\"Generate\"} 1\n"));
}

// --- Slow readers ---

TEST_F(StreamTest, SlowReaderPausesItselfOnly) {
  // 400 MB: the transport takes some megabytes ahead of a reader that does not read, never that
  // much.
  constexpr int kTokens = 100'000, kTextBytes = 4096;
  engine_->SetScript({.tokens = kTokens, .text_bytes = kTextBytes});
  const auto slow_stub = NewStub();
  grpc::ClientContext context;
  const auto slow = slow_stub->Generate(&context, TextRequest());
  FakeEngine::WaitFor([this] { return engine_->IsPaused(1); });

  engine_->SetScript({.tokens = 50});
  const Result other = Generate(TextRequest());
  ASSERT_TRUE(other.status.ok());
  EXPECT_EQ(other.events.back().finished().receipt().generated_tokens(), 50);
  EXPECT_FALSE(engine_->IsPaused(2));
  FakeEngine::WaitFor([this] { return engine_->IsPaused(1); });
  const int64_t sent = engine_->TokensSent(1);
  EXPECT_LT(sent, kTokens / 2);

  // Once it reads, the sequence goes on.
  Event event;
  int64_t received = 0;
  while (received <= sent + 100 && slow->Read(&event)) received += event.tokens().ids_size();
  EXPECT_GT(received, sent + 100);
  context.TryCancel();
  EXPECT_EQ(slow->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(StreamTest, ReaderThatNeverReadsCanBeCancelled) {
  engine_->SetScript({.tokens = 100'000, .text_bytes = 4096});
  grpc::ClientContext context;
  const auto stub = NewStub();
  const auto reader = stub->Generate(&context, TextRequest());
  FakeEngine::WaitFor([this] { return engine_->IsPaused(1); });
  context.TryCancel();
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
  EXPECT_EQ(engine_->Stats().cancelled, 1);
}

// The engine is done and the connection stands, but nobody reads.
class UnreadTest : public ServerFixture {};

TEST_F(UnreadTest, AFinishedAnswerThatIsNotReadIsCutOff) {
  StartServer({.unread_seconds = 0.05, .outbox_bytes = 128 << 20});
  engine_->SetScript({.tokens = 2000, .text_bytes = 20'000});  // 40 MB: more than the windows take
  const auto stub = NewStub();
  grpc::ClientContext context;
  const auto reader = stub->Generate(&context, TextRequest());
  FakeEngine::WaitFor([&] { return engine_->Stats().completed == 1; });
  FakeEngine::WaitFor([&] { return core_->open_calls() == 0; });
  Event event;
  bool finished = false;
  while (reader->Read(&event)) finished |= event.has_finished();
  EXPECT_FALSE(finished);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(UnreadTest, AFinishedAnswerMayWaitAWhile) {
  StartServer({.unread_seconds = 3600, .outbox_bytes = 128 << 20});
  engine_->SetScript({.tokens = 2000, .text_bytes = 20'000});
  const auto stub = NewStub();
  grpc::ClientContext context;
  const auto reader = stub->Generate(&context, TextRequest());
  FakeEngine::WaitFor([&] { return engine_->Stats().completed == 1; });
  EXPECT_EQ(core_->open_calls(), 1);
  Event event;
  bool finished = false;
  while (reader->Read(&event)) finished |= event.has_finished();
  EXPECT_TRUE(finished);
  EXPECT_TRUE(reader->Finish().ok());
}

TEST(OutboxTest, JoinsTokensReplacesProgressAndAsksForAPause) {
  Outbox outbox(1000);
  const auto push_tokens = [&](int id, const std::string& text) {
    Event event;
    event.mutable_tokens()->add_ids(id);
    event.mutable_tokens()->set_text(text);
    outbox.Push(event);
  };
  const auto push_progress = [&](int64_t done) {
    Event event;
    event.mutable_progress()->set_prefilled_tokens(done);
    outbox.Push(event);
  };
  push_progress(1);
  push_progress(2);
  push_tokens(1, "a");
  push_tokens(2, "b");
  EXPECT_EQ(outbox.Pop().progress().prefilled_tokens(), 2);
  EXPECT_FALSE(outbox.wants_pause());
  push_tokens(3, std::string(1000, 'x'));
  EXPECT_TRUE(outbox.wants_pause());
  const Event joined = outbox.Pop();
  EXPECT_THAT(joined.tokens().ids(), ElementsAre(1, 2, 3));
  EXPECT_EQ(joined.tokens().text(), "ab" + std::string(1000, 'x'));
  EXPECT_TRUE(outbox.empty());
  EXPECT_EQ(outbox.bytes(), 0u);
  EXPECT_FALSE(outbox.wants_pause());
}

// --- Queues ---

TEST_F(StreamTest, FullEngineQueueCarriesRetryAdvice) {
  engine_->SetSubmitStatus(WithRetryAfter(absl::ResourceExhaustedError("queue is full"), 2.5));
  grpc::Status status = Generate(TextRequest()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  ASSERT_TRUE(RetrySeconds(status).has_value());
  EXPECT_DOUBLE_EQ(*RetrySeconds(status), 2.5);

  engine_->SetSubmitStatus(absl::ResourceExhaustedError("needs 10 GiB, have 1 GiB"));
  status = Generate(TextRequest()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_FALSE(RetrySeconds(status).has_value());

  engine_->SetSubmitStatus(WithReason(absl::FailedPreconditionError("busy"), kSessionBusy));
  status = Generate(TextRequest()).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(ErrorReason(status), "SESSION_BUSY");
}

}  // namespace
}  // namespace entropyserve
