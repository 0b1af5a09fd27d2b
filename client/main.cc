// entropyserve-client: subcommands in a table. Exit codes: 0 done, 1 the server refused or failed,
// or standard output could not be written, 2 wrong usage, 130 interrupted.
#include <google/protobuf/stubs/logging.h>
#include <grpc/support/log.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "client/command.h"

namespace entropyserve {
namespace {

constexpr Command kCommands[] = {
    {"generate", "stream an answer to a prompt", RunGenerate},
    {"inspect", "draw what a request read and kept", RunInspect},
    {"eval", "measure what policies cost on this model", RunEval},
    {"chat", "talk to the model", RunChat},
    {"session", "create, list, fork and delete sessions", RunSession},
    {"models", "show the model, the load and the memory", RunModels},
    {"bench", "measure a server under load", RunBench},
    {"tokenize", "text to token ids", RunTokenize},
    {"detokenize", "token ids to text", RunDetokenize},
};

void PrintHelp() {
  std::puts(
      "entropyserve-client COMMAND [flags]\n"
      "Talks to an EntropyServe server.\n\nCommands (each has --help):");
  for (const Command& command : kCommands)
    std::printf("  %-12s %s\n", command.name, command.summary);
}

// What was printed arrived: a full disk shows only now.
bool OutputWritten() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return true;
  std::fputs("entropyserve-client: standard output cannot be written\n", stderr);
  return false;
}

int Main(const std::vector<std::string>& args) {
  // The libraries' own messages would mix with the answer; every failure is reported once, by us.
  gpr_set_log_function([](gpr_log_func_args*) {});
  google::protobuf::SetLogHandler(nullptr);
  signal(SIGPIPE, SIG_DFL);
  if (args.empty()) return ReportUsage("expected a command; --help lists them");
  if (args[0] == "--help" || args[0] == "-h" || args[0] == "help") {
    PrintHelp();
    return kExitOk;
  }
  for (const Command& command : kCommands) {
    if (args[0] != command.name) continue;
    const int exit_code = command.run({args.begin() + 1, args.end()});
    return OutputWritten() ? exit_code : std::max(exit_code, kExitServer);
  }
  return ReportUsage("no such command: " + args[0] + "; --help lists them");
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  return entropyserve::Main(std::vector<std::string>(argv + 1, argv + argc));
}
