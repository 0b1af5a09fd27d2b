// The server program as a child process, on a free port of the loopback address.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "entropyserve/v1/entropyserve.grpc.pb.h"

namespace entropyserve {

// Polls until `condition` holds; false after two minutes: something is broken, not slow.
bool WaitUntil(const std::function<bool()>& condition);

class ServerProcess {
 public:
  using Stub = v1::EntropyServe::Stub;

  // `program --model=synthetic:tiny` and `flags`; its log goes to a file in `folder`. Ends this
  // program when the server does not come up.
  ServerProcess(const std::string& program, const std::string& folder,
                const std::vector<std::string>& flags);
  ~ServerProcess();  // kills it
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

  // One of a few connections, in turn: a connection may have so many streams.
  Stub& stub();
  v1::GetServerResponse State();
  void Signal(int signal) const;
  double CpuSeconds() const;  // of all its threads so far
  // The exit status; 128 + n for signal n.
  int Wait();

 private:
  bool Ended();
  void Connect(const std::string& port);

  const std::string log_;
  pid_t pid_ = 0;
  int code_ = -1;
  std::vector<std::unique_ptr<Stub>> stubs_;
  size_t next_stub_ = 0;
};

}  // namespace entropyserve
