// A program that a test starts, and ends at the latest with itself.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

namespace entropyserve {

// Polls until `condition` holds; false after two minutes: something is broken, not slow.
bool WaitUntil(const std::function<bool()>& condition);

class ChildProcess {
 public:
  // Files of standard input, output (appended to) and errors (the same); empty: this program's own.
  struct Streams {
    std::string in, out, err;
  };
  ChildProcess(std::string program, std::vector<std::string> args, const Streams& streams);
  ~ChildProcess();  // kills it
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  int Wait();  // the exit status; 128 + n for signal n
  bool Ended();
  void Signal(int signal) const;
  pid_t pid() const { return pid_; }  // 0: it has ended

 private:
  void Reap(int options);

  pid_t pid_ = 0;
  int code_ = -1;
};

}  // namespace entropyserve
