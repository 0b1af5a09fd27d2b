// The client library against a server over a scripted engine, and what the command line prints.
#include "client/client.h"

#include <gmock/gmock.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "client/request_flags.h"
#include "client/session_table.h"
#include "client/terminal.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ClientTest : public ServerFixture {
 protected:
  void SetUp() override {
    StartServer();
    client_ = NewClient();
  }
  std::unique_ptr<Client> NewClient(const std::string& key = "") {
    ClientOptions options;
    options.server = address();
    options.api_key = key;
    options.max_attempts = 3;
    auto client = Client::Create(options);
    EXPECT_TRUE(client.ok());
    return *std::move(client);
  }
  absl::Status Run(const v1::GenerateRequest& request, const CallOptions& options = {}) {
    text_.clear();
    events_ = 0;
    return client_->Generate(
        request,
        [this](const v1::GenerateEvent& event) {
          ++events_;
          text_ += event.tokens().text();
        },
        options);
  }

  std::unique_ptr<Client> client_;
  std::string text_;
  int events_ = 0;
};

TEST_F(ClientTest, StreamsAnAnswer) {
  ASSERT_TRUE(Run(TextRequest()).ok());
  EXPECT_EQ(text_, "t0 t1 t2 t3 ");
}

TEST_F(ClientTest, UnaryCallsWork) {
  const auto model = client_->GetModel();
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(model->name(), "fake");
  EXPECT_TRUE(client_->GetServer().ok());
  v1::TokenizeRequest tokenize;
  tokenize.set_text("hello");
  const auto tokens = client_->Tokenize(tokenize);
  ASSERT_TRUE(tokens.ok());
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_ids() = tokens->ids();
  EXPECT_EQ(client_->Detokenize(detokenize)->text(), "hello");
  const auto session = client_->CreateSession();
  ASSERT_TRUE(session.ok());
  EXPECT_TRUE(client_->GetSession(session->id()).ok());
  EXPECT_TRUE(client_->ForkSession(session->id()).ok());
  EXPECT_EQ(client_->ListSessions()->sessions_size(), 2);
  EXPECT_TRUE(client_->DeleteSession(session->id()).ok());
  EXPECT_EQ(client_->GetSession(session->id()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->Compare({}, [](const v1::CompareEvent&) {}).code(),
            absl::StatusCode::kUnimplemented);
}

TEST_F(ClientTest, RetriesOnlyWhatIsAdvised) {
  engine_->SetSubmitStatus(WithRetryAfter(absl::ResourceExhaustedError("full"), 0.01));
  const absl::Status full = Run(TextRequest());
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_DOUBLE_EQ(RetryAfterSeconds(full).value_or(0), 0.01);
  EXPECT_EQ(engine_->Submits(), 3);

  engine_->SetSubmitStatus(absl::ResourceExhaustedError("never fits"));
  EXPECT_EQ(Run(TextRequest()).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine_->Submits(), 4);

  engine_->SetSubmitStatus(WithReason(absl::FailedPreconditionError("lost"), kSessionLost));
  EXPECT_EQ(Reason(Run(TextRequest())), kSessionLost);
  EXPECT_EQ(engine_->Submits(), 5);
}

TEST_F(ClientTest, ARetryThatSucceedsIsInvisible) {
  engine_->SetSubmitStatus(absl::UnavailableError("starting"));
  std::thread later([this] {
    FakeEngine::WaitFor([this] { return engine_->Submits() == 1; });
    engine_->SetSubmitStatus(absl::OkStatus());
  });
  EXPECT_TRUE(Run(TextRequest()).ok());
  later.join();
  EXPECT_EQ(text_, "t0 t1 t2 t3 ");
  EXPECT_EQ(engine_->Submits(), 2);
}

TEST_F(ClientTest, NothingIsRetriedOnceEventsHaveArrived) {
  engine_->SetScript(
      {.fail_after_prefill = WithRetryAfter(absl::ResourceExhaustedError("scratch"), 0.01)});
  EXPECT_EQ(Run(TextRequest()).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine_->Submits(), 1);
  EXPECT_GT(events_, 0);
}

TEST_F(ClientTest, CancelEndsACallAtAnyTime) {
  CancelToken before;
  before.Cancel();
  EXPECT_EQ(Run(TextRequest(), {0, &before}).code(), absl::StatusCode::kCancelled);

  engine_->SetScript({.tokens = 1'000'000'000});
  CancelToken during;
  const absl::Status status = client_->Generate(TextRequest(),
                                                [&](const v1::GenerateEvent& event) {
                                                  if (event.has_tokens()) during.Cancel();
                                                },
                                                {0, &during});
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);

  // While waiting to try again: an hour, unless the wait is interrupted.
  engine_->SetSubmitStatus(WithRetryAfter(absl::ResourceExhaustedError("full"), 3600));
  CancelToken waiting;
  const int submits = engine_->Submits();
  std::thread canceller([&] {
    FakeEngine::WaitFor([&] { return engine_->Submits() == submits + 1; });
    waiting.Cancel();
  });
  EXPECT_FALSE(Run(TextRequest(), {0, &waiting}).ok());
  canceller.join();
  EXPECT_EQ(engine_->Submits(), submits + 1);
}

TEST_F(ClientTest, DeadlinesCoverAllAttempts) {
  engine_->Hold(true);
  EXPECT_EQ(Run(TextRequest(), {0.1, nullptr}).code(), absl::StatusCode::kDeadlineExceeded);
  engine_->Hold(false);
  engine_->SetSubmitStatus(WithRetryAfter(absl::ResourceExhaustedError("full"), 3600));
  const int submits = engine_->Submits();
  EXPECT_EQ(Run(TextRequest(), {1, nullptr}).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(engine_->Submits(), submits + 1);  // an hour's wait would pass the deadline
}

TEST(ClientOptionsTest, FilesAreChecked) {
  ClientOptions options;
  options.tls_ca = "/no/such/file";
  EXPECT_EQ(Client::Create(options).status().code(), absl::StatusCode::kNotFound);
  ClientOptions newline;
  newline.api_key = "key\n";  // on which gRPC would abort
  EXPECT_EQ(Client::Create(newline).status().code(), absl::StatusCode::kInvalidArgument);
  newline.api_key.clear();
  newline.affinity = "a\nb";
  EXPECT_THAT(std::string(Client::Create(newline).status().message()), HasSubstr("--affinity"));
  options.tls_ca.clear();
  options.tls_cert = "cert";
  EXPECT_EQ(Client::Create(options).status().code(), absl::StatusCode::kInvalidArgument);
}

// Keeps the headers of the last call.
class HeaderKeeper final : public v1::EntropyServe::Service {
 public:
  grpc::Status GetModel(grpc::ServerContext* context, const v1::GetModelRequest*,
                        v1::GetModelResponse*) override {
    headers.clear();
    for (const auto& [name, value] : context->client_metadata())
      headers[{name.data(), name.size()}] = {value.data(), value.size()};
    return grpc::Status::OK;
  }
  std::map<std::string, std::string> headers;
};

TEST(ClientHeadersTest, KeyAndAffinityTravelWithACallWhereTheyAreGiven) {
  HeaderKeeper keeper;
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  const auto server = builder.RegisterService(&keeper).BuildAndStart();
  ClientOptions options;
  options.server = absl::StrCat("127.0.0.1:", port);
  ASSERT_TRUE((*Client::Create(options))->GetModel().ok());
  EXPECT_EQ(keeper.headers.count("authorization") + keeper.headers.count("entropyserve-affinity"),
            0u);
  options.api_key = "k";
  options.affinity = "conversation-1";
  ASSERT_TRUE((*Client::Create(options))->GetModel().ok());
  EXPECT_EQ(keeper.headers["authorization"], "Bearer k");
  EXPECT_EQ(keeper.headers["entropyserve-affinity"], "conversation-1");
}

// --- The command line ---

TEST(TerminalTest, Sizes) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(20.0 * (1 << 20)), "20 MiB");
  EXPECT_EQ(FormatFlops(2.8e12), "2.8 TFLOP");
  EXPECT_EQ(FormatFlops(999), "999 FLOP");
}

TEST(TerminalTest, Progress) {
  EXPECT_EQ(FormatProgress(0, 100, 0), "[------------------------------]   0 %  0 of 100 tokens");
  EXPECT_EQ(FormatProgress(50, 100, 2),
            "[###############---------------]  50 %  50 of 100 tokens, 25 tokens/s, 2.0 s left");
  EXPECT_THAT(FormatProgress(100, 100, 2), HasSubstr("[##############################] 100 %"));
  EXPECT_THAT(FormatProgress(200, 100, 2), HasSubstr("[##############################]"));
  EXPECT_THAT(FormatProgress(0, 0, 1), HasSubstr("0 of 0"));
}

TEST(TerminalTest, ReceiptSaysWhatWasSkippedAndKept) {
  v1::Finished finished;
  finished.set_reason(v1::FINISH_REASON_LENGTH);
  v1::Receipt& r = *finished.mutable_receipt();
  r.set_prompt_tokens(7512);
  r.set_generated_tokens(11);
  r.set_prefill_seconds(10);
  r.set_ttft_seconds(10.25);
  r.set_decode_seconds(2);
  r.set_attention_flops_executed(1e12);
  r.set_attention_flops_dense(4e12);
  r.set_attention_flops_ratio(0.25);
  r.set_kv_bytes_before(100 << 20);
  r.set_kv_bytes_after(25 << 20);
  r.set_kv_bytes_ratio(0.25);
  r.set_compressed(true);
  r.mutable_policy()->mutable_prefill()->set_preset("entropy");
  const std::string text = FormatReceipt(finished);
  for (const char* part : {"length", "7512 prompt, 0 cached, 11 generated", "751 tokens/s",
                           "first token after 10.25 s", "5.0 tokens/s", "25.0 % of dense",
                           "100 MiB -> 25 MiB (25.0 %)", "prefill entropy"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
  r.set_compressed(false);
  EXPECT_THAT(FormatReceipt(finished), HasSubstr("25 MiB, not compressed"));
}

TEST(TerminalTest, TextCannotDriveTheTerminal) {
  EXPECT_EQ(Printable("a\x1b[2Jb\r\n\tc\x7f ä"), "a[2Jb\n\tc ä");
}

TEST(TerminalTest, JsonIsOneLineInTheContractsNames) {
  v1::GenerateEvent event;
  event.mutable_tokens()->set_text("a\nb");
  event.mutable_tokens()->add_ids(7);
  EXPECT_EQ(ToJson(event), R"({"tokens":{"ids":[7],"text":"a\nb"}})");
}

TEST(RequestFlagsTest, FillTheRequest) {
  v1::GenerateRequest request;
  FlagSet set("", "");
  AddRequestFlags(&set, &request);
  ASSERT_TRUE(set.Parse({"--temperature=0", "--top-k=-1", "--seed=18446744073709551615", "--stop=a",
                         "--stop=b", "--stop-token-ids=1,2", "--max-new-tokens=9",
                         "--ignore-eos=true", "--prefill-policy=coverage", "--kv-budget=64"})
                  .ok());
  EXPECT_TRUE(request.sampling().has_temperature());
  EXPECT_EQ(request.sampling().top_k(), -1);  // ranges are the server's to check
  EXPECT_EQ(request.sampling().seed(), ~uint64_t{0});
  EXPECT_THAT(request.sampling().stop(), ElementsAre("a", "b"));
  EXPECT_THAT(request.sampling().stop_token_ids(), ElementsAre(1, 2));
  EXPECT_EQ(request.sampling().max_new_tokens(), 9);
  EXPECT_FALSE(request.sampling().has_top_p());
  EXPECT_EQ(request.policy().prefill().preset(), "coverage");
  EXPECT_EQ(request.policy().kv().budget_tokens(), 64);
  for (const char* bad :
       {"--temperature=warm", "--seed=-1", "--stop-token-ids=1,x", "--top-k=99999999999"}) {
    EXPECT_FALSE(set.Parse({bad}).ok()) << bad;
  }
}

TEST(SessionTableTest, AlignsAndNamesTiers) {
  v1::Session session;
  session.set_id(std::string(32, 'a'));
  session.set_turns(3);
  session.set_positions(9000);
  session.set_kept_tokens(2048);
  session.set_kv_bytes(3 << 20);
  session.set_tier(v1::Session::TIER_HOST);
  session.set_kv_policy("latent");
  session.set_busy(true);
  const std::string table = FormatSessions({session, v1::Session()});
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 3);
  EXPECT_THAT(table, HasSubstr(std::string(32, 'a') + "      3       9000       2048"));
  EXPECT_THAT(table, HasSubstr("3.0 MiB host"));
  EXPECT_THAT(table, HasSubstr("latent  busy"));
}

}  // namespace
}  // namespace entropyserve
