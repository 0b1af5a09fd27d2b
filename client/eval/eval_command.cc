// entropyserve-client eval: what policies cost, on generated tasks with known answers.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/command.h"
#include "client/eval/policy_spec.h"
#include "client/eval/record.h"
#include "client/eval/report.h"
#include "client/eval/task_runner.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client eval [flags]\n"
    "Measures what policies cost on your model: generated tasks with known answers, each prompt "
    "under every policy,\n"
    "with scores, intervals, paired differences to dense attention, attention computed, cache kept "
    "and seconds.\n";

struct EvalFlags {
  ConnectionFlags connection;
  std::string policies = "full+full,entropy+latent,coverage+latent";
  std::string tasks = "ruler,passkey,kv_retrieval,qa_facts", lengths = "4K", haystack;
  std::string format = "auto", output;
  int prompts = 20, concurrency = 1, answer_limit = 0;
  int64_t seed = 1;
  double minutes = 0;
  bool resume = false, list_tasks = false;
};

void AddFlags(FlagSet* set, EvalFlags* flags) {
  set->Section("What to compare");
  set->Add(
      "policies", &flags->policies,
      "PREFILL+KV pairs, e.g. full+full,entropy:base=1024:dense_prefix=1024+latent:budget=1024; "
      "keys as in generate's flags");
  set->Section("Tasks");
  set->Add("tasks", &flags->tasks,
           "names, ruler or all; with /hidden (question after the text was compressed), /forked "
           "(one reading for all KV policies) or /turns (further questions)");
  set->Add("list-tasks", &flags->list_tasks, "print the tasks and stop; asks no server");
  set->Add("lengths", &flags->lengths, "tokens of prompt and answer, e.g. 4K,32K");
  set->Add("n", &flags->prompts, "prompts of each task and length");
  set->Add("seed", &flags->seed, "the same seed gives the same prompts");
  set->Add("haystack", &flags->haystack,
           "text to hide things in, for tasks that want text; empty: generated sentences");
  set->AddChoice("format", &flags->format, {"auto", "chat", "text"},
                 "with the model's chat template or plain; auto: chat where it has one");
  set->Add("answer-tokens", &flags->answer_limit,
           "score at most this many tokens of an answer; 0: the task's own number");
  set->Section("Run");
  set->Add("concurrency", &flags->concurrency,
           "prompts at the same time; seconds are a lone prompt's at 1 only");
  set->Add("minutes", &flags->minutes, "begin no prompt after this time; 0: no limit");
  set->Section("Output");
  set->Add("output", &flags->output, "write one JSON object per prompt and policy here");
  set->Add("resume", &flags->resume,
           "go on where --output ends: measures only what it lacks, reports all of it");
  AddConnectionFlags(set, &flags->connection);
}

// "4K,8192".
absl::StatusOr<std::vector<int64_t>> ParseLengths(const std::string& text) {
  std::vector<int64_t> lengths;
  for (const auto part : absl::StrSplit(text, ',')) {
    const absl::StatusOr<int64_t> length = ParseBytes({part.data(), part.size()});
    if (!length.ok() || *length < 1) {
      return absl::InvalidArgumentError("--lengths: expected numbers of tokens, e.g. 4K,32K");
    }
    lengths.push_back(*length);
  }
  return lengths;
}

void ListTasks() {
  for (const Task& task : Tasks()) {
    std::printf("%-16s %s%s%s\n", task.name, task.summary, task.ruler ? " (RULER)" : "",
                task.further_turns ? "; /turns" : "");
  }
}

absl::Status CheckFlags(const EvalFlags& flags) {
  if (flags.prompts < 1) return absl::InvalidArgumentError("--n: expected at least 1");
  if (flags.concurrency < 1 || flags.concurrency > 256) {
    return absl::InvalidArgumentError("--concurrency: expected 1 to 256");
  }
  if (flags.answer_limit < 0) return absl::InvalidArgumentError("--answer-tokens: expected >= 0");
  if (flags.minutes < 0) return absl::InvalidArgumentError("--minutes: expected >= 0");
  if (flags.resume && flags.output.empty()) {
    return absl::InvalidArgumentError("--resume: name the file with --output");
  }
  return absl::OkStatus();
}

// What the command line means.
absl::StatusOr<TaskRun> MakeRun(const EvalFlags& flags, const Haystack* haystack) {
  RETURN_IF_ERROR(CheckFlags(flags));
  TaskRun run;
  ASSIGN_OR_RETURN(const std::vector<int64_t> lengths, ParseLengths(flags.lengths));
  ASSIGN_OR_RETURN(run.jobs, ParseTasks(flags.tasks, lengths));
  ASSIGN_OR_RETURN(run.policies, ParsePolicySpecs(flags.policies));
  run.seed = static_cast<uint64_t>(flags.seed);
  run.prompts = flags.prompts;
  run.answer_limit = flags.answer_limit;
  run.concurrency = flags.concurrency;
  run.haystack = haystack;
  return run;
}

absl::StatusOr<Haystack> ReadHaystack(const std::string& path) {
  if (path.empty()) return Haystack();
  ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  return Haystack(path.substr(path.rfind('/') + 1), text);
}

// Asks the server what it serves.
absl::Status Meet(Client* client, const EvalFlags& flags, TaskRun* run) {
  ASSIGN_OR_RETURN(run->model, client->GetModel(run->call));
  ASSIGN_OR_RETURN(const v1::GetServerResponse server, client->GetServer(run->call));
  run->server = ServerName(run->model, server);
  const bool has_template = !run->model.chat_template().empty();
  run->chat = flags.format == "chat" || (flags.format == "auto" && has_template);
  for (const TaskJob& job : run->jobs) {
    if (job.length > run->model.context_tokens()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--lengths: ", job.length, " is more than the ", run->model.context_tokens(),
                       " tokens that this server takes"));
    }
  }
  return absl::OkStatus();
}

// Progress on a terminal's stderr.
std::function<void(int, int)> Progress() {
  if (isatty(STDERR_FILENO) == 0) return {};
  return [](int done, int all) {
    std::fprintf(stderr, "\r%d of %d prompts%s", done, all, done == all ? "\n" : "");
  };
}

void PrintTasks(const TaskRun& run, const std::vector<TaskRecord>& records) {
  std::printf("%s\n\n", run.server.c_str());
  std::printf("%s\n", TaskTable(TaskCells(records)).c_str());
  std::printf(
      "n: prompts. Intervals: 95 %%, Wilson's score interval; differences over the same prompts, "
      "Newcombe's paired\n"
      "interval. attention: executed of dense attention FLOPs of the prefill. kv kept: bytes after "
      "compression.\n"
      "compressed: how many prompts' caches were. prefill s: mean, at concurrency %d.\n",
      run.concurrency);
}

int RunIt(const EvalFlags& flags, TaskRun* run, Client* client, CancelToken* cancel) {
  absl::Status status = Meet(client, flags, run);
  if (!status.ok()) return Report(status);
  const absl::StatusOr<std::unique_ptr<RecordFile>> records =
      RecordFile::Open(flags.output, flags.resume, run->server);
  if (!records.ok()) return ReportUsage(std::string(records.status().message()));
  status = RunTasks(client, *run, records->get());
  if (isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\n");
  PrintTasks(*run, (*records)->task_records());
  if (cancel->cancelled()) return kExitInterrupted;
  if (!status.ok() && !flags.output.empty()) {
    std::fprintf(stderr, "entropyserve-client: the run ended early; --resume goes on from %s\n",
                 flags.output.c_str());
  }
  return Report(status);
}

}  // namespace

int RunEval(const std::vector<std::string>& args) {
  EvalFlags flags;
  FlagSet set(kUsage, kClientEnvPrefix);
  AddFlags(&set, &flags);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 0, &positional, &exit_code)) return exit_code;
  if (flags.list_tasks) {
    ListTasks();
    return kExitOk;
  }
  const absl::StatusOr<Haystack> haystack = ReadHaystack(flags.haystack);
  if (!haystack.ok()) return ReportUsage(std::string(haystack.status().message()));
  absl::StatusOr<TaskRun> run = MakeRun(flags, &*haystack);
  if (!run.ok()) return ReportUsage(std::string(run.status().message()));
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags.connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  InterruptGuard guard;
  CancelToken cancel;
  guard.Watch(&cancel);
  const auto begin = std::chrono::steady_clock::now();
  run->call = {flags.connection.deadline_seconds, &cancel};
  run->on_prompt = Progress();
  if (flags.minutes > 0) {
    run->out_of_time = [begin, minutes = flags.minutes] {
      return std::chrono::steady_clock::now() - begin > std::chrono::duration<double>(60 * minutes);
    };
  }
  exit_code = RunIt(flags, &*run, client->get(), &cancel);
  guard.Watch(nullptr);
  return exit_code;
}

}  // namespace entropyserve
