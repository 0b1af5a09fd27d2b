// entropyserve-client generate: one prompt, one streamed answer, the receipt.
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "client/command.h"
#include "client/prompt_flags.h"
#include "client/request_flags.h"
#include "client/terminal.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client generate [PROMPT] [flags]\n"
    "Streams an answer. The prompt is the argument, a file (with the argument as the question "
    "about it), or\n"
    "standard input. The answer goes to stdout, progress and receipt to stderr.\n";

struct GenerateFlags {
  ConnectionFlags connection;
  PromptFlags prompt;
  std::string progress = "auto";
  bool json = false, receipt = true;
  v1::GenerateRequest request;
};

void AddFlags(FlagSet* set, GenerateFlags* flags) {
  AddPromptFlags(set, &flags->prompt, &flags->request);
  set->Section("Output");
  set->AddChoice("progress", &flags->progress, {"auto", "on", "off"},
                 "progress bar; auto: when stderr is a terminal");
  set->Add("receipt", &flags->receipt, "print what the request cost");
  set->Add("json", &flags->json, "one JSON object per event on stdout instead");
  set->AddSwitch("trace", "false", "ask for trace events; with --json",
                 [flags](bool value) { flags->request.set_trace(value); });
  AddRequestFlags(set, &flags->request);
  AddConnectionFlags(set, &flags->connection);
}

// Shows events as a person reads them.
class Screen {
 public:
  Screen(bool progress, bool receipt) : bar_(progress), receipt_(receipt) {}

  void Show(const v1::GenerateEvent& event) {
    switch (event.event_case()) {
      case v1::GenerateEvent::kProgress:
        bar_.Update(event.progress());
        break;
      case v1::GenerateEvent::kTokens:
        bar_.Clear();
        Print(event.tokens().text());
        break;
      case v1::GenerateEvent::kFinished:
        bar_.Clear();
        EndLine();
        if (receipt_) std::fprintf(stderr, "\n%s", FormatReceipt(event.finished()).c_str());
        break;
      default:
        break;
    }
  }

  void Close() {
    bar_.Clear();
    EndLine();
  }

 private:
  // A program gets the bytes, a terminal what cannot drive it.
  void Print(const std::string& text) {
    const std::string shown = is_terminal_ ? Printable(text) : text;
    std::fputs(shown.c_str(), stdout);
    std::fflush(stdout);
    if (!text.empty()) line_open_ = text.back() != '\n';
  }
  void EndLine() {
    if (line_open_) std::fputs("\n", stdout);
    std::fflush(stdout);
    line_open_ = false;
  }

  ProgressBar bar_;
  const bool receipt_;
  const bool is_terminal_ = isatty(STDOUT_FILENO) != 0;
  bool line_open_ = false;
};

}  // namespace

int RunGenerate(const std::vector<std::string>& args) {
  GenerateFlags flags;
  FlagSet set(kUsage, kClientEnvPrefix);
  AddFlags(&set, &flags);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 1, &positional, &exit_code)) return exit_code;
  InterruptGuard guard;  // until the request is sent, Ctrl-C ends the program
  if (const absl::Status status = FillPrompt(flags.prompt, positional, &flags.request);
      !status.ok()) {
    return ReportUsage(std::string(status.message()));
  }
  const bool progress = flags.progress == "on" ||
                        (flags.progress == "auto" && !flags.json && isatty(STDERR_FILENO) != 0);
  flags.request.set_progress(progress);

  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags.connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  Screen screen(progress, flags.receipt);
  CancelToken cancel;
  guard.Watch(&cancel);
  const auto show = [&](const v1::GenerateEvent& event) {
    if (flags.json) {
      std::printf("%s\n", ToJson(event).c_str());
      std::fflush(stdout);
    } else {
      screen.Show(event);
    }
    if (std::ferror(stdout)) cancel.Cancel();  // nobody gets the rest; main reports it
  };
  const absl::Status status =
      (*client)->Generate(flags.request, show, {flags.connection.deadline_seconds, &cancel});
  guard.Watch(nullptr);
  screen.Close();
  if (std::ferror(stdout)) return kExitServer;
  if (cancel.cancelled()) return kExitInterrupted;
  return Report(status);
}

}  // namespace entropyserve
