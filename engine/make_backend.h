// Which backends this build has: make_backend_cuda.cc where nvcc was found, make_backend_cpu.cc
// else.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace entropyserve {

struct BackendChoice {
  std::string name;  // "cpu" or "cuda"
  std::unique_ptr<Backend> backend;
};

// `name`: auto (the best there is), cpu, cuda. INVALID_ARGUMENT: another name. FAILED_PRECONDITION:
// cuda was asked for by name and this build or this machine has none.
absl::StatusOr<BackendChoice> MakeBackend(const std::string& name, int threads);

}  // namespace entropyserve
