// entropyserve-client generate: one prompt, one streamed answer, the receipt.
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "client/command.h"
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
  std::string file, system, token_ids, progress = "auto";
  bool raw = false, json = false, receipt = true;
  std::optional<bool> thinking;
  v1::GenerateRequest request;
};

void AddFlags(FlagSet* set, GenerateFlags* flags) {
  set->Section("Prompt");
  set->Add("file", &flags->file, "read the prompt from this file; - is standard input");
  set->Add("raw", &flags->raw, "send plain text, without the model's chat template");
  set->Add("system", &flags->system, "a system message before the prompt");
  set->Add("thinking", &flags->thinking,
           "whether the model may think first, where it has a switch");
  set->Add("token-ids", &flags->token_ids, "the prompt as ids, e.g. 1,2,3");
  set->AddCustom("parse-special", "", "true: with --raw, read control tokens from the text",
                 [flags](std::string_view text) -> absl::Status {
                   ASSIGN_OR_RETURN(const bool value, ParseBool(text));
                   flags->request.set_parse_special(value);
                   return absl::OkStatus();
                 });
  set->AddCustom("session", "", "continue this session", [flags](std::string_view text) {
    flags->request.set_session_id(std::string(text));
    return absl::OkStatus();
  });
  set->AddCustom("request-id", "", "a name for the server's log", [flags](std::string_view text) {
    flags->request.set_request_id(std::string(text));
    return absl::OkStatus();
  });
  set->Section("Output");
  set->AddChoice("progress", &flags->progress, {"auto", "on", "off"},
                 "progress bar; auto: when stderr is a terminal");
  set->Add("receipt", &flags->receipt, "print what the request cost");
  set->Add("json", &flags->json, "one JSON object per event on stdout instead");
  set->AddCustom("trace", "", "true: ask for trace events; with --json",
                 [flags](std::string_view text) -> absl::Status {
                   ASSIGN_OR_RETURN(const bool value, ParseBool(text));
                   flags->request.set_trace(value);
                   return absl::OkStatus();
                 });
  AddRequestFlags(set, &flags->request);
  AddConnectionFlags(set, &flags->connection);
}

// A document and the question about it, or either alone.
absl::StatusOr<std::string> PromptText(const GenerateFlags& flags, const std::string& argument,
                                       bool has_argument) {
  if (flags.file.empty() && has_argument && argument != "-") return argument;
  ASSIGN_OR_RETURN(std::string text, ReadText(flags.file.empty() ? "-" : flags.file));
  if (!flags.file.empty() && has_argument) text += "\n\n" + argument;
  return text;
}

absl::Status FillPrompt(const std::vector<std::string>& positional, GenerateFlags* flags) {
  v1::GenerateRequest& request = flags->request;
  if (!flags->token_ids.empty()) {
    return ParseIds(flags->token_ids, request.mutable_token_ids()->mutable_ids());
  }
  const std::string argument = positional.empty() ? "" : positional[0];
  ASSIGN_OR_RETURN(std::string text, PromptText(*flags, argument, !positional.empty()));
  if (flags->raw) {
    request.set_text(std::move(text));
    return absl::OkStatus();
  }
  v1::Messages& messages = *request.mutable_messages();
  if (flags->thinking.has_value()) messages.set_enable_thinking(*flags->thinking);
  const auto add = [&messages](const char* role, const std::string& content) {
    v1::Message& message = *messages.add_messages();
    message.set_role(role);
    message.set_content(content);
  };
  if (!flags->system.empty()) add("system", flags->system);
  add("user", text);
  return absl::OkStatus();
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
        if (receipt_) std::fputs(("\n" + FormatReceipt(event.finished())).c_str(), stderr);
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
  if (const absl::Status status = FillPrompt(positional, &flags); !status.ok()) {
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
  const absl::Status status = (*client)->Generate(flags.request,
                                                  [&](const v1::GenerateEvent& event) {
                                                    if (!flags.json) return screen.Show(event);
                                                    std::printf("%s\n", ToJson(event).c_str());
                                                    std::fflush(stdout);
                                                  },
                                                  {flags.connection.deadline_seconds, &cancel});
  guard.Watch(nullptr);
  screen.Close();
  if (cancel.cancelled()) return kExitInterrupted;
  return Report(status);
}

}  // namespace entropyserve
