// The evaluation's runs: what is asked of a server, what becomes of its answers, resumed runs,
// servers that die.
#include <gmock/gmock.h>

#include <map>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/eval_testing.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(EvalPolicyTest, ReadsBothHalves) {
  const PolicySpec spec =
      Specs("entropy:base=1024:dense_prefix=512+latent:budget=256:fraction=0.5")[0];
  EXPECT_EQ(spec.policy.prefill().preset(), "entropy");
  EXPECT_EQ(spec.policy.prefill().base_tokens(), 1024);
  EXPECT_EQ(spec.policy.prefill().dense_prefix_tokens(), 512);
  EXPECT_FALSE(spec.policy.prefill().has_correction());
  EXPECT_EQ(spec.policy.kv().preset(), "latent");
  EXPECT_EQ(spec.policy.kv().budget_tokens(), 256);
  EXPECT_FLOAT_EQ(spec.policy.kv().fraction(), 0.5f);
  EXPECT_EQ(Specs("coverage")[0].name, "coverage+full");
  EXPECT_EQ(Specs("coverage")[0].policy.kv().preset(), "full");
  EXPECT_FALSE(Specs("default+default:gap=4")[0].policy.prefill().has_preset());
  EXPECT_EQ(Specs("full+full,entropy+latent").size(), 2u);
  EXPECT_EQ(Specs("full,full+full").size(), 1u);  // named twice
  for (const char* wrong : {"", "+latent", "entropy+", "entropy:base+full", "entropy:bass=1+full",
                            "entropy:base=x+full"}) {
    EXPECT_EQ(ParsePolicySpecs(wrong).status().code(), absl::StatusCode::kInvalidArgument) << wrong;
  }
  EXPECT_THAT(std::string(ParsePolicySpecs("full+latent:bugdet=1").status().message()),
              HasSubstr("full+latent:bugdet=1"));
}

TEST(EvalTaskListTest, NamesGroupsAndVariants) {
  const auto names = [](const char* text) {
    std::vector<std::string> out;
    const auto jobs = ParseTasks(text, {4096, 8192});
    EXPECT_TRUE(jobs.ok()) << jobs.status();
    for (const TaskJob& job : *jobs) out.push_back(absl::StrCat(job.name(), " ", job.length));
    return out;
  };
  EXPECT_THAT(names("vt,cwe/hidden,vt"),
              ElementsAre("vt 4096", "vt 8192", "cwe/hidden 4096", "cwe/hidden 8192"));
  EXPECT_EQ(names("ruler").size(), 2u * 11);
  EXPECT_EQ(names("all").size(), 2u * Tasks().size());
  EXPECT_THAT(names("all/turns"), Contains("kv_retrieval/turns 4096"));
  for (const char* wrong : {"", "vtt", "vt/hiden", "vt/turns", "vt/"}) {
    EXPECT_EQ(ParseTasks(wrong, {4096}).status().code(), absl::StatusCode::kInvalidArgument)
        << wrong;
  }
}

// --- runs against a server ---

class EvalRunTest : public ServerFixture {
 protected:
  void SetUp() override {
    StartServer();
    ClientOptions options;
    options.server = address();
    options.max_attempts = 1;
    client_ = *Client::Create(options);
    engine_->SetScript({.tokens = 1000});
  }
  TaskRun Run(const std::string& tasks, const std::string& policies, int prompts = 2) {
    TaskRun run;
    run.jobs = *ParseTasks(tasks, {2048});
    run.policies = Specs(policies);
    run.prompts = prompts;
    run.haystack = &haystack_;
    run.model = *client_->GetModel();
    run.server = "s";
    run.call.deadline_seconds = 60;
    return run;
  }
  static std::unique_ptr<RecordFile> Memory() { return *RecordFile::Open("", false, "s"); }

  const Haystack haystack_;
  std::unique_ptr<Client> client_;
};

TEST_F(EvalRunTest, AsksEveryPolicyTheSamePromptOfTheRightLength) {
  const auto records = Memory();
  const TaskRun run = Run("niah_single_1,vt", "full+full,entropy:base=1024+latent:budget=256", 3);
  ASSERT_TRUE(RunTasks(client_.get(), run, records.get()).ok());
  const std::vector<EngineRequest> requests = engine_->Requests();
  ASSERT_EQ(requests.size(), 2u * 3 * 2);
  std::map<std::vector<int32_t>, int> prompts;
  for (const EngineRequest& request : requests) {
    ++prompts[request.prompt];
    const auto room = static_cast<size_t>(request.sampling.max_new_tokens);
    EXPECT_LE(request.prompt.size() + room, 2048u);
    EXPECT_GE(request.prompt.size() + room, 2048u - 2048 / 100 - 60);  // a line of noise
    EXPECT_EQ(request.sampling.temperature, 0);
    EXPECT_EQ(request.sampling.min_new_tokens, 16 + 8);  // the gap and more
    EXPECT_GT(request.sampling.forced_token_ids.size(), 5u);
  }
  EXPECT_EQ(prompts.size(), 6u);
  for (const auto& [prompt, times] : prompts) EXPECT_EQ(times, 2);
  const std::vector<TaskRecord> done = records->task_records();
  ASSERT_EQ(done.size(), 12u);
  for (const TaskRecord& r : done) {
    EXPECT_TRUE(r.compressed);
    EXPECT_EQ(r.flops_dense, 120);
    EXPECT_EQ(r.expected.size(), 1u);
    EXPECT_EQ(r.score, 0);  // the fake engine knows nothing
  }
  // The first prompts of both tasks come before the second ones.
  EXPECT_THAT((std::vector<int>{done[0].index, done[2].index, done[4].index}),
              ElementsAre(0, 0, 1));
}

TEST_F(EvalRunTest, PromptsDoNotDependOnOrderOrThreads) {
  const auto prompts = [this](const TaskRun& run) {
    const size_t before = engine_->Requests().size();
    const auto records = Memory();
    EXPECT_TRUE(RunTasks(client_.get(), run, records.get()).ok());
    std::multiset<std::vector<int32_t>> all;
    for (size_t i = before; i < engine_->Requests().size(); ++i) {
      all.insert(engine_->Requests()[i].prompt);
    }
    return all;
  };
  TaskRun run = Run("niah_multikey_2,cwe", "full+full", 6);
  const auto alone = prompts(run);
  EXPECT_EQ(alone.size(), 12u);
  run.concurrency = 4;
  EXPECT_EQ(prompts(run), alone);
  std::swap(run.jobs[0], run.jobs[1]);
  EXPECT_EQ(prompts(run), alone);
}

TEST_F(EvalRunTest, GivenAnswersAreFedAfterTheirBeginning) {
  const auto records = Memory();
  TaskRun run = Run("niah_single_1,kv_retrieval/turns", "full+latent", 1);
  ASSERT_TRUE(RunTasks(client_.get(), run, records.get()).ok());
  run.give_answers = true;
  ASSERT_TRUE(RunTasks(client_.get(), run, records.get()).ok());
  const std::vector<EngineRequest> requests = engine_->Requests();
  ASSERT_EQ(requests.size(), 2u * 5);
  const auto& generated = requests[0].sampling.forced_token_ids;
  const auto& given = requests[5].sampling.forced_token_ids;
  EXPECT_EQ(requests[5].prompt, requests[0].prompt);
  ASSERT_GT(given.size(), generated.size() + 7);  // a space and seven digits
  EXPECT_TRUE(std::equal(generated.begin(), generated.end(), given.begin()));
  const std::vector<TaskRecord> done = records->task_records();
  ASSERT_EQ(done.size(), 4u);
  EXPECT_EQ(done[2].answers[0], " " + done[2].expected[0]);
  EXPECT_EQ(done[2].answer_nll_tokens, int64_t(given.size() - generated.size()));
  EXPECT_DOUBLE_EQ(done[2].answer_nll, 1.5);           // what the fake engine says of every token
  EXPECT_EQ(done[3].answers[0], done[3].expected[0]);  // the beginning ends in a quotation mark
  EXPECT_DOUBLE_EQ(done[3].answer_nll, 1.5);
  EXPECT_EQ(done[3].turn_scores.size(), 4u);
  EXPECT_NE(KeyOf(done[2]), KeyOf(done[0]));
}

TEST_F(EvalRunTest, ForksOfOneReadingAnswerAtTheSameTime) {
  const auto records = Memory();
  const TaskRun run = Run("vt/forked", "full+full,full+latent,full+adakv", 1);
  engine_->Hold(true);
  absl::Status status;
  std::thread runner([&] { status = RunTasks(client_.get(), run, records.get()); });
  FakeEngine::WaitFor([this] { return engine_->Submits() == 1; });  // the reading
  engine_->HoldSessions(true);
  engine_->Hold(false);
  FakeEngine::WaitFor([this] { return engine_->WaitingForSessions() == 3; });  // to be forked
  engine_->HoldSessions(false);
  runner.join();
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(records->task_records().size(), 3u);
}

TEST_F(EvalRunTest, VariantsUseSessionsAndLeaveNone) {
  auto records = Memory();
  ASSERT_TRUE(
      RunTasks(client_.get(), Run("vt/hidden", "full+full,full+latent", 1), records.get()).ok());
  std::vector<EngineRequest> requests = engine_->Requests();
  ASSERT_EQ(requests.size(), 4u);  // text and question, twice
  EXPECT_EQ(requests[0].sampling.max_new_tokens, 0);
  EXPECT_GT(requests[0].prompt.size(), 1000u);
  EXPECT_LT(requests[1].prompt.size(), 100u);
  EXPECT_EQ(requests[0].session_id, requests[1].session_id);
  EXPECT_EQ(records->task_records()[0].flops_dense, 240);  // of both

  records = Memory();
  ASSERT_TRUE(RunTasks(client_.get(), Run("vt/forked", "full+full,full+latent,entropy+adakv", 1),
                       records.get())
                  .ok());
  requests = engine_->Requests();
  requests.erase(requests.begin(), requests.begin() + 4);
  ASSERT_EQ(requests.size(), 5u);  // two readings, three questions
  std::multiset<int64_t> rooms;
  for (const EngineRequest& r : requests) rooms.insert(r.sampling.max_new_tokens);
  EXPECT_EQ(rooms.count(0), 2u);
  ASSERT_EQ(records->task_records().size(), 3u);
  for (const TaskRecord& r : records->task_records()) EXPECT_EQ(r.flops_dense, 240);

  records = Memory();
  ASSERT_TRUE(
      RunTasks(client_.get(), Run("niah_multikey_1/turns", "full+latent", 1), records.get()).ok());
  EXPECT_EQ(engine_->Requests().size(), 4u + 5 + 4);
  EXPECT_EQ(records->task_records()[0].answers.size(), 4u);
  EXPECT_THAT(client_->ListSessions()->sessions(), IsEmpty());
}

TEST_F(EvalRunTest, ResumeMeasuresOnlyWhatIsMissing) {
  const TempFile file;
  {
    auto records = RecordFile::Open(file.path(), false, "s");
    ASSERT_TRUE(RunTasks(client_.get(), Run("vt", "full+full", 2), records->get()).ok());
  }
  auto records = RecordFile::Open(file.path(), true, "s");
  ASSERT_TRUE(RunTasks(client_.get(), Run("vt", "full+full,full+latent", 3), records->get()).ok());
  EXPECT_EQ(engine_->Requests().size(), 6u);  // not one twice
  EXPECT_EQ((*records)->task_records().size(), 6u);
  EXPECT_EQ(Lines(file.Read()), 6u);
  ASSERT_TRUE(RunTasks(client_.get(), Run("vt", "full+full,full+latent", 3), records->get()).ok());
  EXPECT_EQ(engine_->Requests().size(), 6u);
  // Another seed is another prompt.
  TaskRun other = Run("vt", "full+full", 1);
  other.seed = 2;
  ASSERT_TRUE(RunTasks(client_.get(), other, records->get()).ok());
  EXPECT_EQ(engine_->Requests().size(), 7u);
}

TEST_F(EvalRunTest, ADyingServerEndsTheRunAndLeavesWhatWasMeasured) {
  const TempFile file;
  auto records = RecordFile::Open(file.path(), false, "s");
  TaskRun run = Run("vt", "full+full,full+latent", 20);
  run.on_prompt = [this](int done, int all) {
    EXPECT_EQ(all, 20);
    if (done == 3) {
      core_->AbortAll(absl::UnavailableError("dying"));
      engine_->SetSubmitStatus(absl::UnavailableError("dead"));
    }
  };
  const absl::Status status = RunTasks(client_.get(), run, records->get());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Lines(file.Read()), 6u);
  EXPECT_EQ((*records)->task_records().size(), 6u);

  engine_->SetSubmitStatus(absl::OkStatus());
  engine_->SetScript({.tokens = 1000, .fail_after_prefill = absl::InternalError("broken")});
  run.on_prompt = {};
  run.concurrency = 4;
  EXPECT_EQ(RunTasks(client_.get(), run, records->get()).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Lines(file.Read()), 6u);
}

TEST_F(EvalRunTest, TimeAndCancelEndIt) {
  const auto records = Memory();
  TaskRun run = Run("vt", "full+full", 20);
  int asked = 0;
  run.out_of_time = [&asked] { return ++asked > 5; };
  EXPECT_TRUE(RunTasks(client_.get(), run, records.get()).ok());
  EXPECT_EQ(records->task_records().size(), 5u);
  CancelToken cancel;
  run.out_of_time = {};
  run.call.cancel = &cancel;
  run.on_prompt = [&cancel](int, int) { cancel.Cancel(); };
  EXPECT_EQ(RunTasks(client_.get(), run, records.get()).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(records->task_records().size(), 6u);
}

TEST_F(EvalRunTest, ALengthThatFitsNothingSaysSo) {
  TaskRun run = Run("cwe", "full+full");
  run.jobs[0].length = 300;
  const auto records = Memory();
  const absl::Status status = RunTasks(client_.get(), run, records.get());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("cwe at 300: the shortest prompt takes"));
}

// --- what counts as the answer ---

// Answers every Generate with given tokens; texts are their ids.
class ScriptedClient : public Client {
 public:
  struct Token {
    int32_t id, likeliest;
  };
  std::vector<Token> script;
  std::vector<v1::GenerateRequest> requests;

  absl::Status Generate(const v1::GenerateRequest& request,
                        const std::function<void(const v1::GenerateEvent&)>& on_event,
                        const CallOptions&) override {
    requests.push_back(request);
    v1::GenerateEvent event;
    for (const int32_t id : request.sampling().forced_token_ids()) {
      event.mutable_tokens()->add_ids(id);
      event.mutable_tokens()->add_logprobs()->add_top()->set_id(kEnd);  // means nothing there
    }
    for (const Token& token : script) {
      event.mutable_tokens()->add_ids(token.id);
      event.mutable_tokens()->add_logprobs()->add_top()->set_id(token.likeliest);
    }
    on_event(event);
    on_event(v1::GenerateEvent::default_instance());
    return absl::OkStatus();
  }
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request,
                                                const CallOptions&) override {
    v1::TokenizeResponse response;
    const std::string& text =
        request.has_text() ? request.text() : request.messages().messages(0).content();
    for (size_t i = 0; i < text.size() / 4; ++i) response.add_ids(1);
    return response;
  }
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request,
                                                    const CallOptions&) override {
    v1::DetokenizeResponse response;
    response.set_text(absl::StrJoin(request.ids(), " "));
    return response;
  }
  absl::Status Compare(const v1::CompareRequest&,
                       const std::function<void(const v1::CompareEvent&)>&,
                       const CallOptions&) override {
    return absl::UnimplementedError("");
  }
  absl::StatusOr<v1::Session> CreateSession(const CallOptions&) override { return v1::Session(); }
  absl::StatusOr<v1::Session> GetSession(const std::string&, const CallOptions&) override {
    return v1::Session();
  }
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(const CallOptions&) override {
    return v1::ListSessionsResponse();
  }
  absl::StatusOr<v1::Session> ForkSession(const std::string&, const CallOptions&) override {
    return v1::Session();
  }
  absl::Status DeleteSession(const std::string&, const CallOptions&) override {
    return absl::OkStatus();
  }
  absl::StatusOr<v1::GetModelResponse> GetModel(const CallOptions&) override {
    v1::GetModelResponse model;
    model.add_end_token_ids(kEnd);
    return model;
  }
  absl::StatusOr<v1::GetServerResponse> GetServer(const CallOptions&) override {
    return v1::GetServerResponse();
  }

  static constexpr int32_t kEnd = 99;
};

std::string AnswerOf(std::vector<ScriptedClient::Token> script, int answer_limit = 0) {
  ScriptedClient client;
  client.script = std::move(script);
  TaskRun run;
  run.jobs = *ParseTasks("passkey", {1024});
  run.policies = Specs("full+full");
  run.prompts = 1;
  const Haystack haystack;
  run.haystack = &haystack;
  run.model = *client.GetModel({});
  run.answer_limit = answer_limit;
  const auto records = *RecordFile::Open("", false, "");
  EXPECT_TRUE(RunTasks(&client, run, records.get()).ok());
  return records->task_records()[0].answers[0];
}

TEST(EvalAnswerTest, EndsWhereTheModelWouldHaveEnded) {
  EXPECT_EQ(AnswerOf({{5, 5}, {6, 6}, {7, 7}}), "5 6 7");
  // An end token that min_new_tokens did not allow: what was taken instead is no answer.
  EXPECT_EQ(AnswerOf({{5, 5}, {6, 99}, {7, 7}}), "5");
  EXPECT_EQ(AnswerOf({{5, 5}, {6, 6}, {99, 99}}), "5 6");
  EXPECT_EQ(AnswerOf({{6, 99}, {7, 7}}), "");
  EXPECT_EQ(AnswerOf({{5, 5}, {6, 6}, {7, 7}}, 2), "5 6");
  EXPECT_EQ(AnswerOf({}), "");
}

}  // namespace
}  // namespace entropyserve
