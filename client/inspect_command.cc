// entropyserve-client inspect: one request with a trace, or a saved one, drawn as a page.
#include <google/protobuf/util/json_util.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/command.h"
#include "client/prompt_flags.h"
#include "client/request_flags.h"
#include "client/terminal.h"
#include "client/trace_page.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client inspect [PROMPT] [flags]\n"
    "Draws what a request read and what it kept: entropies and budgets per head and segment, the "
    "kept tokens'\n"
    "places, the receipt. Takes a prompt as generate does, or a trace that was saved before. The "
    "page is one\n"
    "file that loads nothing.\n";

struct InspectFlags {
  ConnectionFlags connection;
  PromptFlags prompt;
  std::string output = "inspect.html", trace_file, save_trace, progress = "auto";
  bool include_text = false;
  v1::GenerateRequest request;
};

void AddFlags(FlagSet* set, InspectFlags* flags) {
  set->Section("Output");
  set->Add("output", &flags->output, "the page; - is standard output");
  set->Add("include-text", &flags->include_text,
           "put prompt and answer into the page, the answer into the saved trace");
  set->Add("save-trace", &flags->save_trace,
           "write the trace here, too: one event as JSON per line");
  set->Add("trace-file", &flags->trace_file,
           "draw this saved trace, or what generate --json --trace=true printed; asks no server");
  set->AddChoice("progress", &flags->progress, {"auto", "on", "off"},
                 "progress bar; auto: when stderr is a terminal");
  AddPromptFlags(set, &flags->prompt, &flags->request);
  AddRequestFlags(set, &flags->request);
  AddConnectionFlags(set, &flags->connection);
}

absl::Status ReadEvents(const std::string& path, TraceReport* report) {
  ASSIGN_OR_RETURN(const std::string text, ReadText("trace-file", path));
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;  // of a later version
  int number = 0;
  bool finished = false;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    if (line.empty()) continue;
    const auto at = [&](absl::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat("--trace-file: ", path, ", line ", number, ": ", what));
    };
    v1::GenerateEvent event;
    if (!google::protobuf::util::JsonStringToMessage({line.data(), line.size()}, &event, options)
             .ok()) {
      return at("expected one event as JSON, as --save-trace writes it");
    }
    const absl::Status added = AddEvent(event, report);
    if (!added.ok()) return at(added.message());
    finished = finished || event.has_finished();
  }
  if (!finished) {
    return absl::InvalidArgumentError(
        absl::StrCat("--trace-file: ", path, " ends early: it has no finished event"));
  }
  const absl::Status complete = CheckComplete(*report);
  if (complete.ok()) return complete;
  return absl::InvalidArgumentError(absl::StrCat("--trace-file: ", path, ": ", complete.message()));
}

std::string PromptOf(const v1::GenerateRequest& request) {
  std::string out = request.text();
  for (const v1::Message& message : request.messages().messages()) {
    absl::StrAppend(&out, out.empty() ? "" : "\n\n", message.role(), ":\n", message.content());
  }
  return out;
}

// Asks the server; every event that belongs to a saved trace goes to `saved`, a line each.
absl::Status Ask(const InspectFlags& flags, Client* client, CancelToken* cancel,
                 TraceReport* report, std::string* saved) {
  ProgressBar bar(flags.request.progress());
  absl::Status added = absl::OkStatus();
  const absl::Status called = client->Generate(flags.request,
                                               [&](const v1::GenerateEvent& event) {
                                                 if (event.has_progress())
                                                   return bar.Update(event.progress());
                                                 bar.Clear();
                                                 if (event.has_tokens() && !flags.include_text)
                                                   return;
                                                 added.Update(AddEvent(event, report));
                                                 if (!flags.save_trace.empty())
                                                   absl::StrAppend(saved, ToJson(event), "\n");
                                               },
                                               {flags.connection.deadline_seconds, cancel});
  bar.Clear();
  RETURN_IF_ERROR(called);
  RETURN_IF_ERROR(added);
  if (flags.include_text) report->prompt = PromptOf(flags.request);
  return CheckComplete(*report);
}

// 0 when the request is done, with its trace in `report` and its saved form where that was asked.
int Record(InspectFlags* flags, const std::vector<std::string>& positional, TraceReport* report) {
  InterruptGuard guard;  // until the request is sent, Ctrl-C ends the program
  if (const absl::Status status = FillPrompt(flags->prompt, positional, &flags->request);
      !status.ok()) {
    return ReportUsage(std::string(status.message()));
  }
  flags->request.set_trace(true);
  flags->request.set_progress(flags->progress == "on" ||
                              (flags->progress == "auto" && isatty(STDERR_FILENO) != 0));
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags->connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  CancelToken cancel;
  guard.Watch(&cancel);
  std::string saved;
  const absl::Status status = Ask(*flags, client->get(), &cancel, report, &saved);
  guard.Watch(nullptr);
  if (cancel.cancelled()) return kExitInterrupted;
  if (!status.ok()) return Report(status);
  if (flags->save_trace.empty()) return kExitOk;
  const absl::Status written = WriteFile("save-trace", flags->save_trace, saved);
  return written.ok() ? kExitOk : ReportUsage(std::string(written.message()));
}

int Load(const InspectFlags& flags, TraceReport* report) {
  const absl::Status status = ReadEvents(flags.trace_file, report);
  if (!status.ok()) return ReportUsage(std::string(status.message()));
  if (!flags.include_text) report->answer.clear();
  return kExitOk;
}

}  // namespace

int RunInspect(const std::vector<std::string>& args) {
  InspectFlags flags;
  FlagSet set(kUsage, kClientEnvPrefix);
  AddFlags(&set, &flags);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 1, &positional, &exit_code)) return exit_code;
  if (!flags.trace_file.empty() && (!positional.empty() || !flags.save_trace.empty())) {
    return ReportUsage("--trace-file draws a saved trace: give no prompt and no --save-trace");
  }
  absl::Status writable = CheckWritable("output", flags.output);
  writable.Update(CheckWritable("save-trace", flags.save_trace));
  if (!writable.ok()) return ReportUsage(std::string(writable.message()));
  TraceReport report;
  exit_code = flags.trace_file.empty() ? Record(&flags, positional, &report) : Load(flags, &report);
  if (exit_code != kExitOk) return exit_code;
  const absl::Status written = WriteFile("output", flags.output, TracePage(report));
  if (!written.ok()) return ReportUsage(std::string(written.message()));
  if (flags.output != "-") {
    std::fprintf(stderr, "%s\nwrote %s\n", FormatReceipt(report.finished).c_str(),
                 flags.output.c_str());
  }
  return kExitOk;
}

}  // namespace entropyserve
