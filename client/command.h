// A subcommand of entropyserve-client: one file each, listed in main.cc.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "engine/base/flag_set.h"

namespace entropyserve {

// Exit codes of every subcommand.
inline constexpr int kExitOk = 0, kExitServer = 1, kExitUsage = 2, kExitInterrupted = 130;

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const std::vector<std::string>& args);
};

int RunBench(const std::vector<std::string>& args);
int RunGenerate(const std::vector<std::string>& args);
int RunInspect(const std::vector<std::string>& args);
int RunEval(const std::vector<std::string>& args);
int RunChat(const std::vector<std::string>& args);
int RunSession(const std::vector<std::string>& args);
int RunModels(const std::vector<std::string>& args);
int RunTokenize(const std::vector<std::string>& args);
int RunDetokenize(const std::vector<std::string>& args);

// --server, --api-key and so on, also from ENTROPYSERVE_CLIENT_SERVER ... and --config=FILE.
struct ConnectionFlags {
  ClientOptions options;
  double deadline_seconds = 0;
};
inline constexpr char kClientEnvPrefix[] = "ENTROPYSERVE_CLIENT_";
void AddConnectionFlags(FlagSet* flags, ConnectionFlags* connection);

// Parses; when the subcommand is over already (--help, a wrong flag), says so on the terminal and
// sets `exit_code`. At most `max_positional` arguments.
bool ParseCommandLine(FlagSet* flags, const std::vector<std::string>& args, size_t max_positional,
                      std::vector<std::string>* positional, int* exit_code);

// One line on stderr; returns the exit code that belongs to the status.
int Report(const absl::Status& status);
int ReportUsage(const std::string& message);

// What Ctrl-C does while it lives: cancels the watched token, or ends the program when none is
// watched or the token was cancelled already. Made before any other thread starts, so that all of
// them leave the signal to it.
class InterruptGuard {
 public:
  // `terminate`: SIGTERM does the same; for programs that end soon after a cancelled token.
  explicit InterruptGuard(bool terminate = false);
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  // Runs before Ctrl-C ends the program, on a thread of the guard; null: nothing does.
  void OnEnd(std::function<void()> run);
  // nullptr: none. A token is watched until the next call; it outlives that.
  void Watch(CancelToken* token);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// INVALID_ARGUMENT: `text`, which errors call `name`, is not UTF-8.
absl::Status CheckUtf8(std::string_view name, std::string_view text);
// A file's text, or standard input's for "-". NOT_FOUND: it cannot be read; INVALID_ARGUMENT: it is
// not UTF-8. Both name the flag.
absl::StatusOr<std::string> ReadText(const char* flag, const std::string& path);
// Whether WriteFile will work, sooner than after a long run; it leaves no file. An empty
// path is none.
absl::Status CheckWritable(const char* flag, const std::string& path);
// To a file, or standard output for "-". NOT_FOUND: it cannot be written; names the flag.
absl::Status WriteFile(const char* flag, const std::string& path, const std::string& text);

}  // namespace entropyserve
