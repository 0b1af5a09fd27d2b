// Full lanes and queues, large messages, start and drain of the service.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine/base/status_macros.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using Event = v1::GenerateEvent;

class LimitsTest : public ServerFixture {};

// Every text is a word without end.
class EndlessTokenizer final : public Tokenizer {
 public:
  EndlessTokenizer() : Tokenizer(Vocabulary()) {}
  int entered() const { return entered_; }

 private:
  absl::Status EncodeText(std::string_view, bool, WorkMeter* meter,
                          std::vector<int32_t>*) const override {
    ++entered_;
    while (true) {
      RETURN_IF_ERROR(meter->Add());
    }
  }
  mutable std::atomic<int> entered_ = 0;
};

TEST_F(LimitsTest, FullEncodeLaneCarriesRetryAdviceAndTheOtherLaneStaysOpen) {
  ServiceLimits limits;
  limits.short_prompt_bytes = 1000;
  limits.short_lane_bytes = 10'000;
  limits.long_lane_bytes = 10'000;
  StartServer(limits);
  // The long lane's thread waits here until it is told to go on.
  std::mutex gate;
  gate.lock();
  ASSERT_TRUE(core_->lanes().Post(5000, [&gate] { std::lock_guard wait(gate); }).ok());
  const grpc::Status full = Generate(TextRequest(std::string(8000, 'a'))).status;
  EXPECT_EQ(full.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(RetrySeconds(full).has_value());
  EXPECT_TRUE(Generate(TextRequest("short")).status.ok());
  gate.unlock();
  FakeEngine::WaitFor([this] { return core_->lanes().long_bytes() == 0; });
  EXPECT_TRUE(Generate(TextRequest(std::string(8000, 'a'))).status.ok());
}

TEST_F(LimitsTest, CancelWhileWaitingToBeTokenizedEndsTheCall) {
  StartServer();
  std::mutex gate;
  gate.lock();
  ASSERT_TRUE(core_->lanes().Post(10, [&gate] { std::lock_guard wait(gate); }).ok());
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, TextRequest());
  FakeEngine::WaitFor([this] { return core_->open_calls() == 1; });
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  // The server may learn of it before or after the prompt is tokenized; nothing is answered either
  // way.
  engine_->Hold(true);
  gate.unlock();
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
  EXPECT_EQ(engine_->Stats().completed, 0);
}

TEST_F(LimitsTest, WhoeverLeavesWhileTheirPromptIsTokenizedFreesTheLane) {
  auto owned = std::make_unique<EndlessTokenizer>();
  const EndlessTokenizer& tokenizer = *owned;
  model_->chat = absl::UnimplementedError("");
  model_->tokenizer = std::move(owned);
  StartServer();
  grpc::ClientContext cancelled;
  const auto reader = stub_->Generate(&cancelled, TextRequest());
  FakeEngine::WaitFor([&] { return tokenizer.entered() == 1; });
  cancelled.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });

  grpc::ClientContext late;  // begins only because the lane is free again
  late.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
  EXPECT_EQ(Generate(TextRequest(), &late).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });

  grpc::ClientContext unary;
  unary.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
  v1::TokenizeRequest request;
  request.set_text("a");
  v1::TokenizeResponse response;
  EXPECT_EQ(stub_->Tokenize(&unary, request, &response).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  FakeEngine::WaitFor([this] { return core_->lanes().short_bytes() == 0; });
  EXPECT_EQ(engine_->Submits(), 0);
}

TEST_F(LimitsTest, QuestionsThatWaitForTheEngineHoldUpNobodyElse) {
  StartServer();
  const v1::GenerateRequest turn = SessionRequest();
  engine_->HoldSessions(true);  // as during a long step
  std::vector<std::thread> waiting;
  for (int i = 0; i < 8; ++i) {
    waiting.emplace_back([&] { EXPECT_TRUE(Generate(turn).status.ok()); });
    waiting.emplace_back([&] {
      v1::Session made;
      grpc::ClientContext context;
      EXPECT_TRUE(stub_->CreateSession(&context, {}, &made).ok());
    });
  }
  FakeEngine::WaitFor([this] { return engine_->WaitingForSessions() == 16; });
  EXPECT_TRUE(Generate(TextRequest()).status.ok());
  v1::GetModelResponse model;
  grpc::ClientContext context;
  EXPECT_TRUE(stub_->GetModel(&context, {}, &model).ok());
  engine_->HoldSessions(false);
  for (std::thread& thread : waiting) thread.join();
}

TEST_F(LimitsTest, TooManyOpenStreamsAreRefusedWithRetryAdvice) {
  ServiceLimits limits;
  limits.max_open_streams = 1;
  StartServer(limits);
  engine_->Hold(true);
  grpc::ClientContext context;
  const auto first = stub_->Generate(&context, TextRequest());
  FakeEngine::WaitFor([this] { return engine_->Requests().size() == 1; });
  const grpc::Status second = Generate(TextRequest()).status;
  EXPECT_EQ(second.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(RetrySeconds(second).has_value());
  engine_->Hold(false);
  Event event;
  while (first->Read(&event)) {
  }
  EXPECT_TRUE(first->Finish().ok());
}

TEST_F(LimitsTest, MessagesAboveTheLimitAreRefused) {
  ServerOptions options;
  options.max_message_bytes = 2000;
  StartServer({}, options);
  EXPECT_EQ(Generate(TextRequest(std::string(4000, 'a'))).status.error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(Generate(TextRequest(std::string(1000, 'a'))).status.ok());
}

// --- Start and drain ---

TEST_F(LimitsTest, RefusesUntilTheModelIsThere) {
  StartServer({}, {}, /*serve=*/false);
  EXPECT_EQ(Generate(TextRequest()).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::GetServerResponse server;
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->GetServer(&context, {}, &server).ok());
  EXPECT_EQ(server.state(), v1::GetServerResponse::STATE_STARTING);
  core_->Attach(model_.get());
  EXPECT_TRUE(Generate(TextRequest()).status.ok());
}

TEST_F(LimitsTest, DrainFinishesWhatRunsAndRefusesTheRest) {
  StartServer();
  engine_->Hold(true);
  engine_->SetScript({.tokens = 7});
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, TextRequest());
  FakeEngine::WaitFor([this] { return engine_->Requests().size() == 1; });
  core_->BeginDrain();
  EXPECT_FALSE(core_->Idle());
  EXPECT_EQ(Generate(TextRequest()).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  v1::Session session;
  grpc::ClientContext create;
  EXPECT_EQ(stub_->CreateSession(&create, {}, &session).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  engine_->Hold(false);
  Event event;
  while (reader->Read(&event)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(event.finished().receipt().generated_tokens(), 7);
  FakeEngine::WaitFor([this] { return core_->Idle(); });
}

TEST_F(LimitsTest, WhatIsLeftAfterTheDrainEndsUnavailable) {
  StartServer();
  engine_->SetScript({.tokens = 1'000'000});
  grpc::ClientContext context;
  const auto reader = stub_->Generate(&context, TextRequest());
  Event event;
  ASSERT_TRUE(reader->Read(&event));
  core_->BeginDrain();
  core_->AbortAll(absl::UnavailableError("shut down"));
  while (reader->Read(&event)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(event.has_finished());
  EXPECT_EQ(event.finished().reason(), v1::FINISH_REASON_CANCELLED);
}

}  // namespace
}  // namespace entropyserve
