// Which backends this build has: make_backend_cuda.cc where nvcc was found, make_backend_cpu.cc
// else.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace entropyserve {

struct BackendChoice {
  std::string name;  // "cpu" or "cuda"
  std::unique_ptr<Backend> backend;
  std::string gpu_unused;  // auto took the CPU although there is a GPU: why; else empty
};

// `name`: auto (a GPU that can be used, else the CPU), cpu, cuda. INVALID_ARGUMENT: another name.
// FAILED_PRECONDITION: cuda was asked for by name and this build or this machine has none that can
// be used.
//
// on_device_error: called once, from the thread that met it, when a device fails; the process ends
// within 2 seconds then, with exit status 70, whether or not the call returns.
absl::StatusOr<BackendChoice> MakeBackend(
    const std::string& name, int threads,
    std::function<void(const std::string&)> on_device_error = nullptr);

}  // namespace entropyserve
