#include "client/command.h"

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/mutex.h"
#include "engine/base/read_file.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "engine/text/utf8.h"

namespace entropyserve {

void AddConnectionFlags(FlagSet* flags, ConnectionFlags* connection) {
  flags->Section("Connection");
  flags->AddCustom("server", connection->options.server, "HOST:PORT of the server",
                   [connection](std::string_view text) -> absl::Status {
                     if (text.empty()) return absl::InvalidArgumentError("expected HOST:PORT");
                     connection->options.server = std::string(text);
                     return absl::OkStatus();
                   });
  flags->Add("api-key", &connection->options.api_key,
             "bearer key; better from the environment than from here");
  flags->Add(
      "affinity", &connection->options.affinity,
      "with several servers: calls of one value reach one server; give a session's calls the "
      "value that created it");
  flags->Add("tls-ca", &connection->options.tls_ca, "PEM roots; empty: plaintext");
  flags->Add("tls-cert", &connection->options.tls_cert, "PEM client certificate, for mTLS");
  flags->Add("tls-key", &connection->options.tls_key, "its PEM private key");
  flags->AddCustom("deadline-seconds", "0", "give up after this; 0: never",
                   [connection](std::string_view text) -> absl::Status {
                     constexpr double kMost = 1e9;  // what clocks count without overflow
                     ASSIGN_OR_RETURN(connection->deadline_seconds, ParseNumber(text));
                     if (connection->deadline_seconds >= 0 && connection->deadline_seconds <= kMost)
                       return absl::OkStatus();
                     return absl::InvalidArgumentError("expected 0 (never) to 1e9");
                   });
  flags->AddCustom("attempts", absl::StrCat(connection->options.max_attempts),
                   "attempts in all while the server is full or away",
                   [connection](std::string_view text) -> absl::Status {
                     ASSIGN_OR_RETURN(const int64_t attempts, ParseInt(text));
                     if (attempts < 1 || attempts > std::numeric_limits<int>::max())
                       return absl::InvalidArgumentError("expected at least 1");
                     connection->options.max_attempts = static_cast<int>(attempts);
                     return absl::OkStatus();
                   });
}

bool ParseCommandLine(FlagSet* flags, const std::vector<std::string>& args, size_t max_positional,
                      std::vector<std::string>* positional, int* exit_code) {
  absl::StatusOr<std::vector<std::string>> parsed = flags->Parse(args);
  if (flags->help_requested()) {
    std::fputs(flags->Help().c_str(), stdout);
    *exit_code = kExitOk;
    return false;
  }
  if (!parsed.ok()) {
    *exit_code = ReportUsage(std::string(parsed.status().message()));
    return false;
  }
  if (parsed->size() > max_positional) {
    *exit_code = ReportUsage(absl::StrCat("unexpected argument \"", (*parsed)[max_positional],
                                          max_positional == 0
                                              ? "\"; everything here is a flag, --help lists them"
                                              : "\"; quote a text of several words"));
    return false;
  }
  *positional = *std::move(parsed);
  return true;
}

int Report(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  std::string hint;
  if (Reason(status) == kNoChatTemplate) hint = " (try --raw)";
  std::fprintf(stderr, "entropyserve-client: %s: %s%s\n",
               absl::StatusCodeToString(status.code()).c_str(),
               std::string(status.message()).c_str(), hint.c_str());
  return kExitServer;
}

int ReportUsage(const std::string& message) {
  std::fprintf(stderr, "entropyserve-client: %s\n", message.c_str());
  return kExitUsage;
}

struct InterruptGuard::Impl {
  std::atomic<bool> stop = false;
  Mutex mutex;
  CancelToken* token ABSL_GUARDED_BY(mutex) = nullptr;
  std::function<void()> on_end ABSL_GUARDED_BY(mutex);
  std::thread thread;

  void OnInterrupt() {
    MutexLock lock(&mutex);
    if (token == nullptr || token->cancelled()) {
      if (on_end) on_end();
      _exit(kExitInterrupted);
    }
    token->Cancel();
  }
};

InterruptGuard::InterruptGuard(bool terminate) : impl_(std::make_unique<Impl>()) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  if (terminate) sigaddset(&set, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  impl_->thread = std::thread([impl = impl_.get(), set] {
    const timespec poll = {0, 50'000'000};  // how late the guard's end may be noticed
    const timespec none = {0, 0};
    while (!impl->stop.load()) {
      if (sigtimedwait(&set, nullptr, &poll) < 0) continue;
      impl->OnInterrupt();
      // timeout(1) sends its signal twice: to the program and to its process group. The copy is not
      // somebody who has lost patience.
      nanosleep(&poll, nullptr);
      while (sigtimedwait(&set, nullptr, &none) >= 0) {
      }
    }
  });
}

InterruptGuard::~InterruptGuard() {
  impl_->stop.store(true);
  impl_->thread.join();
}

void InterruptGuard::OnEnd(std::function<void()> run) {
  MutexLock lock(&impl_->mutex);
  impl_->on_end = std::move(run);
}

void InterruptGuard::Watch(CancelToken* token) {
  MutexLock lock(&impl_->mutex);
  impl_->token = token;
}

absl::Status CheckUtf8(std::string_view name, std::string_view text) {
  if (IsValidUtf8(text)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      std::string(name),
      " is not UTF-8; convert it, e.g. with iconv --from-code=ISO-8859-1 --to-code=UTF-8"));
}

absl::StatusOr<std::string> ReadText(const char* flag, const std::string& path) {
  if (path == "-") {
    std::string text{std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
    RETURN_IF_ERROR(CheckUtf8("standard input", text));
    return text;
  }
  absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok())
    return absl::NotFoundError(absl::StrCat("--", flag, ": ", text.status().message()));
  RETURN_IF_ERROR(CheckUtf8(absl::StrCat("--", flag, ": ", path), *text));
  return text;
}

absl::Status CheckWritable(const char* flag, const std::string& path) {
  if (path.empty() || path == "-") return absl::OkStatus();
  const bool there = access(path.c_str(), F_OK) == 0;
  if (!std::ofstream(path, std::ios::app))
    return absl::NotFoundError(absl::StrCat("--", flag, ": cannot write ", path));
  if (!there) unlink(path.c_str());
  return absl::OkStatus();
}

absl::Status WriteFile(const char* flag, const std::string& path, const std::string& text) {
  if (path == "-") {
    std::fwrite(text.data(), 1, text.size(), stdout);
    return std::fflush(stdout) == 0 ? absl::OkStatus()
                                    : absl::UnavailableError("cannot write standard output");
  }
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (file) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("--", flag, ": cannot write ", path));
}

}  // namespace entropyserve
