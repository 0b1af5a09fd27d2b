// entropyserve-client eval: what policies cost, on generated tasks with known answers and on text.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/command.h"
#include "client/eval/compare_runner.h"
#include "client/eval/page.h"
#include "client/eval/plot.h"
#include "client/eval/policy_spec.h"
#include "client/eval/record.h"
#include "client/eval/report.h"
#include "client/eval/task_runner.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client eval [flags]\n"
    "Measures what policies cost on your model. Without --text: generated tasks with known "
    "answers, "
    "each prompt under\n"
    "every policy, with scores, intervals and paired differences to dense attention. With "
    "--text=FILE: how far the\n"
    "predictions on that text lie from dense attention's (the server wants --allow-compare). Both "
    "with attention\n"
    "computed, cache kept and seconds.\n";

struct EvalFlags {
  ConnectionFlags connection;
  std::string policies = "full+full,entropy+latent,coverage+latent";
  std::string tasks, lengths = "4K", haystack, text, sweep_kv = "full";
  std::string format = "auto", answers = "generated", output, html;
  int64_t windows = 8, score = 256, decode = 128;
  int prompts = 20, concurrency = 1, answer_limit = 0;
  int64_t seed = 1;
  double minutes = 0;
  std::string svg;
  bool report = false, resume = false, list_tasks = false, sweep = false;
};

void AddFlags(FlagSet* set, EvalFlags* flags) {
  set->Section("What to compare");
  set->Add(
      "policies", &flags->policies,
      "PREFILL+KV pairs, e.g. full+full,entropy:base=1024:dense_prefix=1024+latent:budget=1024; "
      "keys as in generate's flags; correction=0|32 stands for one policy each");
  set->Add("sweep", &flags->sweep,
           "add a grid of estimators, budgets, corrections, dense prefixes and segment sizes");
  set->Add("sweep-kv", &flags->sweep_kv, "the grid's other half");
  set->Add("lengths", &flags->lengths,
           "tokens of prompt and answer, or of a window of --text, e.g. 4K,32K");
  set->Section("Tasks");
  set->Add("tasks", &flags->tasks,
           "names, ruler or all; empty: a choice of them, none with --text; with /hidden (question "
           "after the text was compressed), /forked "
           "(one reading for all KV policies) or /turns (further questions)");
  set->Add("list-tasks", &flags->list_tasks, "print the tasks and stop; asks no server");
  set->Add("n", &flags->prompts, "prompts of each task and length");
  set->Add("seed", &flags->seed, "the same seed gives the same prompts");
  set->Add("haystack", &flags->haystack,
           "text to hide things in, for tasks that want text; empty: generated sentences");
  set->AddChoice("format", &flags->format, {"auto", "chat", "text"},
                 "with the model's chat template or plain; auto: chat where it has one");
  set->Add("answer-tokens", &flags->answer_limit,
           "score at most this many tokens of an answer; 0: the task's own number");
  set->AddChoice(
      "answers", &flags->answers, {"generated", "given"},
      "given: feed the right answers and report how likely their tokens were, which tells "
      "policies apart with fewer prompts");
  set->Section("Text");
  set->Add("text", &flags->text, "compare policies with full+full on this text");
  set->Add("windows", &flags->windows, "parts of the text, at most");
  set->Add("decode", &flags->decode,
           "last tokens of a window, fed one at a time as if they were the answer");
  set->Add("score", &flags->score, "tokens before those that are compared, too");
  set->Section("Run");
  set->Add("concurrency", &flags->concurrency,
           "prompts at the same time; seconds are a lone prompt's at 1 only");
  set->Add("minutes", &flags->minutes, "begin no prompt after this time; 0: no limit");
  set->Section("Output");
  set->Add("output", &flags->output, "write one JSON object per prompt and policy here");
  set->Add("resume", &flags->resume,
           "go on where --output ends: measures only what it lacks, reports all of it");
  set->Add("html", &flags->html, "write a page with plots here");
  set->Add("svg", &flags->svg,
           "write a picture of score minus full+full against prefill seconds here");
  set->Add("report", &flags->report, "only report what --output holds; asks no server");
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
  if (flags.windows < 1) return absl::InvalidArgumentError("--windows: expected at least 1");
  if (flags.decode < 0 || flags.score < 0 || flags.decode + flags.score < 1) {
    return absl::InvalidArgumentError("--decode, --score: expected >= 0 and one of them above");
  }
  if (flags.minutes < 0) return absl::InvalidArgumentError("--minutes: expected >= 0");
  if ((flags.resume || flags.report) && flags.output.empty()) {
    return absl::InvalidArgumentError("--resume, --report: name the file with --output");
  }
  return absl::OkStatus();
}

constexpr char kDefaultTasks[] = "ruler,passkey,kv_retrieval,qa_facts";

// What the command line means.
absl::StatusOr<TaskRun> MakeRun(const EvalFlags& flags, const Haystack* haystack) {
  RETURN_IF_ERROR(CheckFlags(flags));
  TaskRun run;
  ASSIGN_OR_RETURN(const std::vector<int64_t> lengths, ParseLengths(flags.lengths));
  if (flags.text.empty() || !flags.tasks.empty()) {
    ASSIGN_OR_RETURN(run.jobs,
                     ParseTasks(flags.tasks.empty() ? kDefaultTasks : flags.tasks, lengths));
  }
  ASSIGN_OR_RETURN(run.policies,
                   ParsePolicySpecs(flags.sweep ? absl::StrCat(flags.policies, ",",
                                                               SweepPolicies(flags.sweep_kv))
                                                : flags.policies));
  run.seed = static_cast<uint64_t>(flags.seed);
  run.prompts = flags.prompts;
  run.answer_limit = flags.answer_limit;
  run.give_answers = flags.answers == "given";
  run.concurrency = flags.concurrency;
  run.haystack = haystack;
  return run;
}

absl::StatusOr<Haystack> ReadHaystack(const std::string& path) {
  if (path.empty()) return Haystack();
  ASSIGN_OR_RETURN(const std::string text, ReadText("haystack", path));
  return Haystack(path.substr(path.rfind('/') + 1), text);
}

// Asks the server what it serves.
absl::Status Meet(Client* client, const EvalFlags& flags, TaskRun* run) {
  ASSIGN_OR_RETURN(run->model, client->GetModel(run->call));
  ASSIGN_OR_RETURN(const v1::GetServerResponse server, client->GetServer(run->call));
  run->server = ServerName(run->model, server);
  const bool has_template = !run->model.chat_template().empty();
  run->chat = flags.format == "chat" || (flags.format == "auto" && has_template);
  ASSIGN_OR_RETURN(const std::vector<int64_t> lengths, ParseLengths(flags.lengths));
  for (const int64_t length : lengths) {
    if (length > run->model.context_tokens()) {
      return absl::InvalidArgumentError(absl::StrCat("--lengths: ", length, " is more than the ",
                                                     run->model.context_tokens(),
                                                     " tokens that this server takes"));
    }
  }
  return absl::OkStatus();
}

// Progress on a terminal's stderr.
std::function<void(int, int)> Progress() {
  if (isatty(STDERR_FILENO) == 0) return {};
  return [](int done, int all) { std::fprintf(stderr, "\r%d of %d", done, all); };
}

// The text's windows at one length, from the server's tokenizer.
absl::StatusOr<CompareRun> MakeCompare(const EvalFlags& flags, const TaskRun& run, int64_t length,
                                       Client* client) {
  ASSIGN_OR_RETURN(const std::string text, ReadText("text", flags.text));
  v1::TokenizeRequest request;
  request.set_text(text);
  request.set_add_bos(true);
  ASSIGN_OR_RETURN(const v1::TokenizeResponse ids, client->Tokenize(request, run.call));
  CompareRun compare;
  compare.text = Haystack(flags.text.substr(flags.text.rfind('/') + 1), text).name();
  ASSIGN_OR_RETURN(compare.windows, CutWindows({ids.ids().begin(), ids.ids().end()},
                                               run.model.bos_token_id(), length, flags.windows));
  if (flags.decode + 2 > length) {
    return absl::InvalidArgumentError("--decode: it is no part of a window of --lengths");
  }
  compare.policies = run.policies;
  compare.score = flags.score;
  compare.decode = flags.decode;
  compare.server = run.server;
  compare.call = run.call;
  compare.out_of_time = run.out_of_time;
  compare.on_window = run.on_prompt;
  return compare;
}

absl::Status RunText(const EvalFlags& flags, const TaskRun& run, Client* client,
                     RecordFile* records) {
  if (flags.text.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::vector<int64_t> lengths, ParseLengths(flags.lengths));
  for (const int64_t length : lengths) {
    ASSIGN_OR_RETURN(const CompareRun compare, MakeCompare(flags, run, length, client));
    RETURN_IF_ERROR(RunCompare(client, compare, records));
  }
  return absl::OkStatus();
}

std::vector<std::string> TaskNotes(int concurrency) {
  return {absl::StrCat(
      "n: prompts. Intervals are at 95 %: Wilson's score interval; for differences, over the "
      "prompts "
      "that both policies answered, Newcombe's paired interval, or a percentile bootstrap over "
      "prompts where scores are shares. nats/token: mean negative log-likelihood of given answers, "
      "whose score is the share of tokens that were the likeliest. attention: executed of dense "
      "attention FLOPs of the prefill. kv kept: bytes after compression. compressed: how many "
      "prompts' caches were. prefill s: mean; this run had ",
      concurrency, concurrency == 1 ? " prompt" : " prompts", " at a time.")};
}

std::vector<std::string> TextNotes() {
  return {
      "n: windows. KL(full || policy) in nats, mean over windows, with a percentile bootstrap's "
      "95 % interval over them. decoded: the window's last tokens, fed one at a time, so that the "
      "KV policy has acted and nothing is seen ahead of its time. prompt: positions before them; a "
      "sparse segment is selected by all of its tokens, so these see ahead inside it.",
      "front: A, S: nothing here diverges less at no more attention, or at no more seconds."};
}

// Everything that the file holds, this run's and earlier ones'.
absl::Status Show(const EvalFlags& flags, const TaskRun& run, const RecordFile& records) {
  const std::vector<TaskCell> tasks = TaskCells(records.task_records());
  const std::vector<CompareCell> compares = CompareCells(records.compare_records());
  std::vector<std::string> notes;
  std::printf("%s\n", run.server.c_str());
  const auto show = [&notes](const std::string& table, std::vector<std::string> more) {
    std::printf("\n%s\n", table.c_str());
    for (std::string& note : more) {
      std::printf("%s\n", note.c_str());
      notes.push_back(std::move(note));
    }
  };
  if (!tasks.empty()) show(TaskTable(tasks), TaskNotes(run.concurrency));
  if (!compares.empty()) show(CompareTable(compares), TextNotes());
  if (tasks.empty() && compares.empty()) std::printf("nothing was measured\n");
  absl::Status status;
  if (!flags.html.empty()) {
    status.Update(WriteFile("html", flags.html, EvalPage(run.server, notes, tasks, compares)));
  }
  if (flags.svg.empty()) return status;
  const std::string plot = DifferencePlot(tasks);
  if (plot.empty()) {
    status.Update(absl::InvalidArgumentError(
        "--svg: two policies are needed, one of them full+full, and tasks"));
    return status;
  }
  status.Update(WriteFile("svg", flags.svg, PlotFile(plot)));
  return status;
}

// What earlier runs measured, with the policies and tasks that they had.
int ReportOnly(const EvalFlags& flags, TaskRun run) {
  if (const auto there = ReadText("output", flags.output); !there.ok()) {
    return ReportUsage(std::string(there.status().message()));
  }
  const auto records = RecordFile::Open(flags.output, true, "");
  if (!records.ok()) return ReportUsage(std::string(records.status().message()));
  for (const TaskRecord& record : (*records)->task_records()) {
    run.server = record.server;
    run.concurrency = record.concurrency;
  }
  for (const CompareRecord& record : (*records)->compare_records()) run.server = record.server;
  const absl::Status shown = Show(flags, run, **records);
  return shown.ok() ? kExitOk : ReportUsage(std::string(shown.message()));
}

int RunIt(const EvalFlags& flags, TaskRun* run, Client* client, CancelToken* cancel) {
  absl::Status status = Meet(client, flags, run);
  if (!status.ok()) return Report(status);
  const absl::StatusOr<std::unique_ptr<RecordFile>> records =
      RecordFile::Open(flags.output, flags.resume, run->server);
  if (!records.ok()) return ReportUsage(std::string(records.status().message()));
  status = RunTasks(client, *run, records->get());
  if (status.ok()) status = RunText(flags, *run, client, records->get());
  if (isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\n");
  const absl::Status shown = Show(flags, *run, **records);
  if (cancel->cancelled()) return kExitInterrupted;
  if (!status.ok() && !flags.output.empty()) {
    std::fprintf(stderr, "entropyserve-client: the run ended early; --resume goes on from %s\n",
                 flags.output.c_str());
  }
  if (!status.ok()) return Report(status);
  return shown.ok() ? kExitOk : ReportUsage(std::string(shown.message()));
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
  absl::Status writable = CheckWritable("html", flags.html);
  writable.Update(CheckWritable("svg", flags.svg));
  if (!writable.ok()) return ReportUsage(std::string(writable.message()));
  const absl::StatusOr<Haystack> haystack = ReadHaystack(flags.haystack);
  if (!haystack.ok()) return ReportUsage(std::string(haystack.status().message()));
  absl::StatusOr<TaskRun> run = MakeRun(flags, &*haystack);
  if (!run.ok()) return ReportUsage(std::string(run.status().message()));
  if (flags.report) return ReportOnly(flags, *std::move(run));
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags.connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  InterruptGuard guard(/*terminate=*/true);
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
