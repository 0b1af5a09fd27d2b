// The server program as a child process, on a free port of the loopback address.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "entropyserve/v1/entropyserve.grpc.pb.h"
#include "tests/child_process.h"

namespace entropyserve {

class ServerProcess : public ChildProcess {
 public:
  using Stub = v1::EntropyServe::Stub;

  // `program --model=synthetic:tiny` and `flags`; its log goes to a file in `folder`. Ends this
  // program when the server does not come up.
  ServerProcess(const std::string& program, const std::string& folder,
                const std::vector<std::string>& flags);
  // One of a few connections, in turn: a connection may have so many streams.
  Stub& stub();
  v1::GetServerResponse State();
  double CpuSeconds() const;  // of all its threads so far

 private:
  void Connect(const std::string& port);

  std::vector<std::unique_ptr<Stub>> stubs_;
  size_t next_stub_ = 0;
};

}  // namespace entropyserve
