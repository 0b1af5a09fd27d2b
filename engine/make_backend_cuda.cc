#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/make_backend.h"
#include "kernels/cuda/cuda_backend.h"

namespace entropyserve {

absl::StatusOr<BackendChoice> MakeBackend(const std::string& name, int threads,
                                          std::function<void(const std::string&)> on_device_error) {
  if (name != "auto" && name != "cpu" && name != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("--backend: '", name, "' is not auto, cpu or cuda"));
  }
  if (name == "cpu" || (name == "auto" && CudaDeviceCount() == 0)) {
    return BackendChoice{"cpu", MakeCpuBackend(threads), ""};
  }
  std::string error = "this machine has no CUDA device that its driver offers";
  std::unique_ptr<Backend> backend;
  if (CudaDeviceCount() > 0)
    backend = MakeCudaBackend({.on_error = std::move(on_device_error)}, &error);
  if (backend) return BackendChoice{"cuda", std::move(backend), ""};
  if (name == "cuda") return absl::FailedPreconditionError(absl::StrCat("--backend=cuda: ", error));
  return BackendChoice{"cpu", MakeCpuBackend(threads), error};
}

}  // namespace entropyserve
