// `bench` against a server over a scripted engine: what is sent, what is counted, and how runs end.
// Nothing here depends on how long anything takes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "client/bench/drive.h"
#include "client/bench/prompts.h"
#include "client/bench/summary.h"
#include "client/command.h"
#include "nlohmann/json.hpp"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

class BenchDriveTest : public ServerFixture {
 protected:
  // What the driver is asked for; `spec` and `options` may be changed before Run.
  void SetUp() override {
    spec_.mode = LoadMode::kClosed;
    spec_.conversations = 10;
    spec_.level = 3;
    spec_.input_tokens = Distribution(20);
    spec_.output_tokens = Distribution(4);
    options_.requests.resize(1);
  }
  DriveResult Run(int connections = 1) {
    options_.client.server = address();
    auto driver = LoadDriver::Create(options_, connections);
    EXPECT_TRUE(driver.ok()) << driver.status();
    return (*driver)->Run(Plan(spec_), PromptSource::Random({1, 2, 3, 4, 5}));
  }
  // The program's own entry; its JSON in `report_`.
  int Bench(std::vector<std::string> args) {
    const std::string path =
        ::testing::TempDir() + "/bench_drive_test_" + std::to_string(getpid()) + ".json";
    args.insert(args.end(), {"--server=" + address(), "--output-json=" + path});
    const int code = RunBench(args);
    const std::string text = ReadAll(path);
    report_ = json::parse(text, nullptr, false);
    std::filesystem::remove(path);
    return code;
  }
  const json& Row(size_t index) { return report_["rows"][index]; }

  WorkloadSpec spec_;
  DriveOptions options_;
  json report_;
};

TEST_F(BenchDriveTest, AClosedLoopSendsEachRequestOnce) {
  StartServer();
  const DriveResult result = Run();
  EXPECT_TRUE(result.ended.ok());
  const Summary s = Summarize(result.records, result.seconds, {});
  EXPECT_EQ(s.completed, 10);
  EXPECT_EQ(s.input_tokens, 200);
  EXPECT_EQ(s.output_tokens, 40);
  EXPECT_EQ(s.ttft.n(), 10);
  EXPECT_EQ(s.tpot.n(), 10);
  EXPECT_EQ(s.attention_share.n(), 10);
  EXPECT_DOUBLE_EQ(s.attention_share.mean, 0.25);
  EXPECT_DOUBLE_EQ(s.kv_share.mean, 0.25);
  EXPECT_LE(s.max_concurrent, 3);
  std::set<std::vector<int32_t>> prompts;
  for (const EngineRequest& request : engine_->Requests()) {
    EXPECT_EQ(request.prompt.size(), 20u);
    EXPECT_EQ(request.sampling.max_new_tokens, 4);
    prompts.insert(request.prompt);
  }
  EXPECT_EQ(prompts.size(), 10u);
  for (const RequestRecord& record : result.records) {
    EXPECT_LE(record.intended, record.sent);
    EXPECT_LE(record.sent, record.first_token);
    EXPECT_LE(record.first_token, record.last_token);
    EXPECT_LE(record.last_token, record.ended);
  }
  // The same seed asks the same again.
  Run();
  std::set<std::vector<int32_t>> again;
  for (const EngineRequest& request : engine_->Requests()) again.insert(request.prompt);
  EXPECT_EQ(again, prompts);
}

TEST_F(BenchDriveTest, AnOpenLoopDoesNotWaitForAnswers) {
  StartServer();
  engine_->Hold(true);
  spec_.mode = LoadMode::kOpen;
  spec_.level = 1e6;
  spec_.conversations = 20;
  std::thread release([this] {
    FakeEngine::WaitFor([this] { return engine_->Submits() == 20; });
    engine_->Hold(false);
  });
  const DriveResult result = Run();
  release.join();
  EXPECT_EQ(Summarize(result.records, result.seconds, {}).max_concurrent, 20);
}

TEST_F(BenchDriveTest, ALimitMakesThemWaitInTheClient) {
  StartServer();
  spec_.mode = LoadMode::kOpen;
  spec_.level = 1e6;
  options_.max_concurrency = 2;
  const DriveResult result = Run();
  const Summary s = Summarize(result.records, result.seconds, {});
  EXPECT_EQ(s.completed, 10);
  EXPECT_LE(s.max_concurrent, 2);
  // The last was due at once and was sent when eight others had ended.
  EXPECT_GT(s.client_queue.sorted.back(), result.records[7].ended - 1e-3);
}

TEST_F(BenchDriveTest, ConnectionsAreOpenedAsStreamsAskForThem) {
  ServerOptions server;
  server.max_streams_per_connection = 4;
  StartServer({}, server);
  engine_->Hold(true);
  spec_.level = 10;
  options_.streams_per_connection = 4;
  std::thread release([this] {
    // Over one connection the fifth would never arrive.
    FakeEngine::WaitFor([this] { return engine_->Submits() == 10; });
    engine_->Hold(false);
  });
  const DriveResult result = Run();
  release.join();
  EXPECT_EQ(Summarize(result.records, result.seconds, {}).completed, 10);
}

TEST_F(BenchDriveTest, CancelsArePlannedAndCounted) {
  StartServer();
  engine_->SetScript({.tokens = 1'000'000'000});
  spec_.output_tokens = Distribution(50);
  spec_.cancel_share = 1;
  // The engine goes on past every planned place.
  const DriveResult result = Run();
  const Summary s = Summarize(result.records, result.seconds, {});
  EXPECT_EQ(s.cancelled, 10);
  EXPECT_EQ(s.completed + s.failed, 0);
  EXPECT_EQ(s.ttft.n(), 0);
  const Plan plan(spec_);
  int64_t least = 0;
  for (int64_t i = 0; i < 10; ++i) least += plan.Get(i).turns[0].cancel_after_tokens;
  EXPECT_GE(s.partial_output_tokens, least);
}

TEST_F(BenchDriveTest, SlowReadersReadEverythingAndAreNoSamples) {
  StartServer();
  spec_.slow_share = 1;
  options_.slow_pause_seconds = 0.001;
  const DriveResult result = Run();
  const Summary s = Summarize(result.records, result.seconds, {});
  EXPECT_EQ(s.completed, 10);
  EXPECT_EQ(s.slow, 10);
  EXPECT_EQ(s.output_tokens, 40);
  EXPECT_EQ(s.ttft.n() + s.e2el.n(), 0);
}

TEST_F(BenchDriveTest, ConversationsKeepTheirSessionAndLeaveNone) {
  StartServer();
  spec_.conversations = 4;
  spec_.level = 1;
  spec_.turns = Distribution(3);
  const DriveResult result = Run();
  const Summary s = Summarize(result.records, result.seconds, {});
  EXPECT_EQ(s.completed, 12);
  EXPECT_EQ(s.session.n(), 4);
  EXPECT_THAT(result.turns_not_sent, ElementsAre(0));
  const std::vector<EngineRequest> requests = engine_->Requests();
  ASSERT_EQ(requests.size(), 12u);
  for (size_t i = 0; i < 12; ++i) {
    EXPECT_FALSE(requests[i].session_id.empty());
    EXPECT_EQ(requests[i].session_id, requests[i - i % 3].session_id);
  }
  EXPECT_TRUE(engine_->ListSessions(requests[0].owner).empty());
}

TEST_F(BenchDriveTest, AFailedTurnEndsItsConversation) {
  StartServer();
  engine_->SetScript({.fail_after_prefill = absl::InternalError("broken")});
  spec_.conversations = 2;
  spec_.level = 1;
  spec_.turns = Distribution(3);
  const DriveResult result = Run();
  EXPECT_TRUE(result.ended.ok());
  EXPECT_EQ(Summarize(result.records, result.seconds, {}).failed, 2);
  EXPECT_THAT(result.turns_not_sent, ElementsAre(4));
}

TEST_F(BenchDriveTest, SessionsThatCannotBeMadeAreErrors) {
  StartServer();
  engine_->SetSessionsImplemented(false);
  spec_.conversations = 2;
  spec_.turns = Distribution(2);
  const DriveResult result = Run();
  EXPECT_THAT(Summarize(result.records, result.seconds, {}).errors,
              ElementsAre(Pair("UNIMPLEMENTED", 2)));
  EXPECT_EQ(engine_->Submits(), 0);
}

TEST_F(BenchDriveTest, ATokenEndsARunAtOnce) {
  StartServer();
  engine_->Hold(true);
  CancelToken cancel;
  options_.cancel = &cancel;
  spec_.turns = Distribution(2);
  std::thread canceller([&] {
    FakeEngine::WaitFor([this] { return engine_->Submits() == 3; });
    cancel.Cancel();
    FakeEngine::WaitFor([this] { return engine_->Cancels().size() == 3; });
    engine_->Hold(false);
  });
  const DriveResult result = Run();
  canceller.join();
  EXPECT_EQ(result.ended.code(), absl::StatusCode::kCancelled);
  const Summary s = Summarize(result.records, result.seconds, {});
  EXPECT_EQ(s.unfinished, 3);
  EXPECT_EQ(s.failed, 0);
  EXPECT_THAT(result.turns_not_sent, ElementsAre(3));
}

TEST_F(BenchDriveTest, NobodyThereIsUnavailable) {
  StartServer();
  options_.client.server = address();
  server_->Shutdown(0);
  options_.connect_seconds = 0.2;
  EXPECT_EQ(LoadDriver::Create(options_, 1).status().code(), absl::StatusCode::kUnavailable);
}

// --- The program ---

TEST_F(BenchDriveTest, PoliciesAreAskedTheSame) {
  StartServer();
  for (const char* order : {"sequential", "interleaved"}) {
    const size_t before = engine_->Requests().size();
    ASSERT_EQ(Bench({"--requests=5", "--input-len=uniform:5-50", "--output-len=4",
                     "--policies=full/full,coverage/snapkv", "--warmup=2",
                     std::string("--policy-order=") + order}),
              kExitOk);
    ASSERT_EQ(report_["rows"].size(), 2u);
    EXPECT_EQ(Row(0)["policy"], "full/full");
    EXPECT_EQ(Row(1)["policy"], "coverage/snapkv");
    EXPECT_EQ(Row(0)["completed"], 5);
    EXPECT_EQ(Row(1)["completed"], 5);
    std::vector<EngineRequest> requests = engine_->Requests();
    requests.erase(requests.begin(), requests.begin() + static_cast<int64_t>(before));
    const size_t warm = order == std::string("sequential") ? 4 : 2;  // before each run
    ASSERT_EQ(requests.size(), 10 + warm);
    std::map<std::string, size_t> by_policy;
    std::map<std::vector<int32_t>, std::set<std::string>> policies_of;
    for (const EngineRequest& request : requests) {
      const std::string name = request.prefill.name + "/" + request.kv.name;
      ++by_policy[name];
      policies_of[request.prompt].insert(name);
    }
    EXPECT_EQ(by_policy["full/full"] + by_policy["coverage/snapkv"], requests.size());
    EXPECT_GE(by_policy["full/full"], 5u);
    EXPECT_GE(by_policy["coverage/snapkv"], 5u);
    int shared = 0;
    for (const auto& [prompt, policies] : policies_of) shared += policies.size() == 2;
    // The two warm-up prompts of the sequential order are shared too.
    EXPECT_EQ(shared, warm == 4 ? 7 : 5);
  }
}

TEST_F(BenchDriveTest, ASweepHasARowForEachLoad) {
  StartServer();
  ASSERT_EQ(Bench({"--concurrency=1,4", "--requests=6", "--input-len=8", "--output-len=4",
                   "--save-detailed", "--slo=e2el:3600000"}),
            kExitOk);
  ASSERT_EQ(report_["rows"].size(), 2u);
  EXPECT_EQ(Row(0)["max_concurrency"], 1);
  EXPECT_EQ(Row(1)["max_concurrency"], 4);
  EXPECT_EQ(Row(1)["total_output_tokens"], 24);
  EXPECT_EQ(Row(1)["good"], 6);
  EXPECT_EQ(Row(1)["ttfts"].size(), 6u);
  EXPECT_EQ(Row(1)["n_ttft"], 6);
  EXPECT_TRUE(report_["ended"].is_null());
  EXPECT_EQ(report_["model_id"], "fake");
}

TEST_F(BenchDriveTest, TracesAndTextsAreReplayed) {
  StartServer();
  const std::string folder = ::testing::TempDir();
  const std::string trace = folder + "/bench_trace.jsonl", text = folder + "/bench_text.txt";
  std::ofstream(trace) << R"({"timestamp": 0, "input_length": 6, "output_length": 2, "session": "s"}
{"timestamp": 1, "input_length": 7, "output_length": 3}
{"timestamp": 2, "input_length": 8, "output_length": 1, "session": "s"}
)";
  std::ofstream(text) << "a b c d e";
  ASSERT_EQ(Bench({"--replay=" + trace, "--text=" + text}), kExitOk);
  EXPECT_EQ(Row(0)["mode"], "trace");
  EXPECT_EQ(Row(0)["num_prompts"], 2);  // conversations
  EXPECT_EQ(Row(0)["completed"], 3);
  EXPECT_EQ(Row(0)["total_input_tokens"], 21);
  EXPECT_EQ(Row(0)["total_output_tokens"], 6);
  v1::TokenizeRequest request;
  request.set_text("a b c d e");
  grpc::ClientContext context;
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&context, request, &tokens).ok());
  const std::set<int32_t> own(tokens.ids().begin(), tokens.ids().end());
  for (const EngineRequest& sent : engine_->Requests()) {
    for (const int32_t id : sent.prompt) EXPECT_TRUE(own.contains(id));
  }
}

TEST_F(BenchDriveTest, FilesHoldWhatTheyShould) {
  StartServer();
  const std::string base = ::testing::TempDir() + "/bench_files";
  ASSERT_EQ(Bench({"--requests=3", "--output-len=2", "--output-csv=" + base + ".csv",
                   "--html=" + base + ".html", "--save-detailed", "--api-key=secret"}),
            kExitOk);
  const std::string csv = ReadAll(base + ".csv"), requests = ReadAll(base + ".csv.requests.csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 2);
  EXPECT_EQ(std::count(requests.begin(), requests.end(), '\n'), 4);
  EXPECT_THAT(ReadAll(base + ".html"), HasSubstr("id=\"bench\">{"));
  EXPECT_THAT(std::string(report_["command"]), HasSubstr("--api-key=***"));
  EXPECT_EQ(Bench({"--html=/no/such/folder/x.html"}), kExitUsage);
}

TEST_F(BenchDriveTest, ErrorsAreCountedByCode) {
  StartServer();
  engine_->SetSubmitStatus(WithRetryAfter(absl::ResourceExhaustedError("full"), 0.01));
  EXPECT_EQ(Bench({"--requests=5"}), kExitServer);  // nothing was completed
  EXPECT_EQ(Row(0)["failed"], 5);
  EXPECT_EQ(Row(0)["errors_by_code"], json({{"RESOURCE_EXHAUSTED", 5}}));
  EXPECT_EQ(engine_->Submits(), 5);  // an overload is measured, not talked away by retries
  engine_->SetSubmitStatus(absl::OkStatus());
  engine_->Hold(true);
  EXPECT_EQ(Bench({"--requests=2", "--deadline-seconds=0.05"}), kExitServer);
  EXPECT_EQ(Row(0)["errors_by_code"], json({{"DEADLINE_EXCEEDED", 2}}));
}

TEST_F(BenchDriveTest, AServerThatIsOnlyFullOrStartingIsNotGone) {
  StartServer();
  engine_->SetSubmitStatus(absl::UnavailableError("for now"));
  EXPECT_EQ(Bench({"--requests=5"}), kExitServer);
  EXPECT_TRUE(report_["ended"].is_null());
  EXPECT_EQ(Row(0)["errors_by_code"], json({{"UNAVAILABLE", 5}}));
}

TEST_F(BenchDriveTest, ADyingServerLeavesPartialResults) {
  StartServer();
  std::thread killer([this] {
    FakeEngine::WaitFor([this] { return engine_->Submits() >= 30; });
    server_->Shutdown(0);
  });
  // More than it can have done by then, and a second row that is never begun.
  EXPECT_EQ(Bench({"--concurrency=2,3", "--requests=100000000", "--output-len=4"}), kExitServer);
  killer.join();
  ASSERT_EQ(report_["rows"].size(), 1u);
  EXPECT_GE(Row(0)["completed"], 20);
  EXPECT_LT(Row(0)["completed"], 100000000);
  EXPECT_THAT(std::string(report_["ended"]), HasSubstr("the server is gone"));
}

TEST_F(BenchDriveTest, OrdinaryIdsLeaveControlTokensOut) {
  StartServer();
  ClientOptions options;
  options.server = address();
  const auto client = Client::Create(options);
  ASSERT_TRUE(client.ok());
  const auto model = (*client)->GetModel();
  ASSERT_TRUE(model.ok());
  const auto ids = OrdinaryIds(*model, client->get());
  ASSERT_TRUE(ids.ok()) << ids.status();
  const std::set<int32_t> ordinary(ids->begin(), ids->end());
  EXPECT_EQ(ordinary.size(), ids->size());
  int control = 0;
  for (int32_t id = 0; id < model->vocab_size(); ++id) {
    const bool expected = !model_->tokenizer->IsControl(id);
    control += !expected;
    if (expected != ordinary.contains(id)) {
      // The model's own ends are left out as well.
      EXPECT_TRUE(std::find(model->end_token_ids().begin(), model->end_token_ids().end(), id) !=
                  model->end_token_ids().end())
          << id;
    }
  }
  EXPECT_GT(control, 0);
  EXPECT_GT(ids->size(), 100u);
}

}  // namespace
}  // namespace entropyserve
