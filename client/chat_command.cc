// entropyserve-client chat: a conversation at the terminal. With a session on the server only the
// new message travels; without, the whole history does.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/command.h"
#include "client/request_flags.h"
#include "client/terminal.h"
#include "engine/base/read_file.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client chat [flags]\n"
    "Reads a message per line from standard input and streams the answers. /file PATH adds a file "
    "to the next\n"
    "message, /receipt prints what the last answer cost, /quit or end of input ends.\n";

struct ChatFlags {
  ConnectionFlags connection;
  std::string system, session = "auto";
  v1::GenerateRequest request;
};

class Chat {
 public:
  Chat(const ChatFlags& flags, Client* client, InterruptGuard* guard)
      : flags_(flags), client_(client), guard_(guard) {}

  int Run() {
    if (const absl::Status status = OpenSession(); !status.ok()) return Report(status);
    if (!flags_.system.empty()) Append("system", flags_.system);
    guard_->OnEnd([this, session = session_] {
      constexpr double kPatienceSeconds = 2;  // somebody waits for the program to end
      if (!session.empty()) (void)client_->DeleteSession(session, {kPatienceSeconds});
    });
    const bool prompt = isatty(STDIN_FILENO) != 0;
    std::string line;
    while (!over_) {
      if (prompt) std::fputs("> ", stderr);
      if (!std::getline(std::cin, line) || line == "/quit") break;
      if (!line.empty()) Handle(line);
    }
    guard_->OnEnd(nullptr);
    if (!session_.empty()) (void)client_->DeleteSession(session_);
    return exit_code_;
  }

 private:
  absl::Status OpenSession() {
    if (flags_.session == "off") return absl::OkStatus();
    const absl::StatusOr<v1::Session> session = client_->CreateSession();
    if (session.ok()) {
      session_ = session->id();
      return absl::OkStatus();
    }
    if (flags_.session == "auto" && session.status().code() == absl::StatusCode::kUnimplemented) {
      return absl::OkStatus();
    }
    return session.status();
  }

  void Handle(const std::string& line) {
    constexpr std::string_view kFile = "/file ";
    if (line.substr(0, kFile.size()) == kFile) {
      const absl::StatusOr<std::string> text = ReadFile(line.substr(kFile.size()));
      if (!text.ok()) {
        ReportUsage(std::string(text.status().message()));
      } else {
        attachment_ += *text + "\n\n";
        std::fprintf(stderr, "(%zu bytes go with the next message)\n", text->size());
      }
      return;
    }
    if (line == "/receipt") {
      std::fputs(receipt_.c_str(), stderr);
      return;
    }
    if (line[0] == '/') {
      ReportUsage("no such command: " + line);
      return;
    }
    Append("user", attachment_ + line);
    attachment_.clear();
    Ask();
  }

  void Append(const char* role, const std::string& content) {
    v1::Message& message = *messages_.add_messages();
    message.set_role(role);
    message.set_content(content);
  }

  void Ask() {
    v1::GenerateRequest request = flags_.request;
    request.set_session_id(session_);
    request.set_progress(true);
    *request.mutable_messages() = messages_;
    ProgressBar bar(isatty(STDERR_FILENO) != 0);
    const bool is_terminal = isatty(STDOUT_FILENO) != 0;
    std::string answer;
    CancelToken cancel;
    guard_->Watch(&cancel);
    const absl::Status status =
        client_->Generate(request,
                          [&](const v1::GenerateEvent& event) {
                            if (event.has_progress()) bar.Update(event.progress());
                            if (event.has_tokens()) {
                              bar.Clear();
                              const std::string& text = event.tokens().text();
                              answer += text;
                              std::fputs((is_terminal ? Printable(text) : text).c_str(), stdout);
                              std::fflush(stdout);
                            }
                            if (event.has_finished()) receipt_ = FormatReceipt(event.finished());
                          },
                          {flags_.connection.deadline_seconds, &cancel});
    guard_->Watch(nullptr);
    bar.Clear();
    std::fputs("\n", stdout);
    std::fflush(stdout);
    exit_code_ = cancel.cancelled() ? kExitOk : Report(status);
    if (status.ok()) {
      Remember(answer);
      ++turns_;
    } else {
      AfterFailure(status, answer);
    }
  }

  // The server's session keeps what was said; without one it is kept here.
  void Remember(const std::string& answer) {
    if (session_.empty()) {
      Append("assistant", answer);
    } else {
      messages_.clear_messages();
    }
  }

  // A turn that was refused, or stopped before it was read, is as if it had not been: its message
  // is dropped, and what the server does not have yet (the system message) goes with the next one.
  void AfterFailure(const absl::Status& status, const std::string& answer) {
    constexpr absl::StatusCode kOfThisTurn[] = {
        absl::StatusCode::kInvalidArgument, absl::StatusCode::kResourceExhausted,
        absl::StatusCode::kDeadlineExceeded, absl::StatusCode::kCancelled};
    over_ = std::find(std::begin(kOfThisTurn), std::end(kOfThisTurn), status.code()) ==
            std::end(kOfThisTurn);
    if (over_) return;
    if (session_.empty() ? !answer.empty() : TurnCounted()) {
      Remember(answer);
    } else {
      messages_.mutable_messages()->RemoveLast();
    }
  }

  // Whether the session on the server took the turn that has just been stopped.
  bool TurnCounted() {
    constexpr int kTries = 200;  // of 50 ms: a cancel acts between two steps
    for (int i = 0; i < kTries; ++i) {
      const absl::StatusOr<v1::Session> session = client_->GetSession(session_);
      if (!session.ok()) {
        exit_code_ = Report(session.status());
        over_ = true;
        return true;
      }
      if (!session->busy()) {
        const bool counted = session->turns() > turns_;
        turns_ = session->turns();
        return counted;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    return true;
  }

  const ChatFlags& flags_;
  Client* const client_;
  InterruptGuard* const guard_;
  std::string session_, attachment_, receipt_;
  v1::Messages messages_;  // that the server does not have yet
  int64_t turns_ = 0;      // that the session on the server has taken
  int exit_code_ = kExitOk;
  bool over_ = false;
};

}  // namespace

int RunChat(const std::vector<std::string>& args) {
  ChatFlags flags;
  FlagSet set(kUsage, kClientEnvPrefix);
  set.Section("Conversation");
  set.Add("system", &flags.system, "the system message");
  set.AddChoice("session", &flags.session, {"auto", "on", "off"},
                "keep the conversation on the server; auto: where it can");
  AddRequestFlags(&set, &flags.request);
  AddConnectionFlags(&set, &flags.connection);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 0, &positional, &exit_code)) return exit_code;
  // So that a balancer sends the session's calls where it was created.
  std::string& affinity = flags.connection.options.affinity;
  std::random_device random;
  if (affinity.empty()) affinity = absl::StrCat("chat-", random(), "-", random());
  InterruptGuard guard;
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags.connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  return Chat(flags, client->get(), &guard).Run();
}

}  // namespace entropyserve
