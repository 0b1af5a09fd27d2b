#include "tests/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

namespace entropyserve {

bool WaitUntil(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

ChildProcess::ChildProcess(std::string program, std::vector<std::string> args,
                           const Streams& streams) {
  std::vector<char*> argv = {program.data()};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ != 0) return;
  constexpr int kAppend = O_CREAT | O_APPEND | O_WRONLY;
  if (!streams.in.empty()) dup2(open(streams.in.c_str(), O_RDONLY), 0);
  if (!streams.out.empty()) dup2(open(streams.out.c_str(), kAppend, 0600), 1);
  if (!streams.err.empty()) dup2(open(streams.err.c_str(), kAppend, 0600), 2);
  execv(program.c_str(), argv.data());
  _exit(127);
}

ChildProcess::~ChildProcess() {
  Signal(SIGKILL);
  Wait();
}

int ChildProcess::Wait() {
  Reap(0);
  return code_;
}

bool ChildProcess::Ended() {
  Reap(WNOHANG);
  return pid_ <= 0;
}

void ChildProcess::Signal(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

void ChildProcess::Reap(int options) {
  int status = 0;
  if (pid_ <= 0 || waitpid(pid_, &status, options) == 0) return;
  code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  pid_ = 0;
}

}  // namespace entropyserve
