#include "absl/strings/str_cat.h"
#include "engine/make_backend.h"

namespace entropyserve {

absl::StatusOr<BackendChoice> MakeBackend(const std::string& name, int threads,
                                          std::function<void(const std::string&)>) {
  if (name == "cuda") {
    return absl::FailedPreconditionError(
        "--backend=cuda: this build has no CUDA backend; build where nvcc is installed");
  }
  if (name != "auto" && name != "cpu") {
    return absl::InvalidArgumentError(
        absl::StrCat("--backend: '", name, "' is not auto, cpu or cuda"));
  }
  return BackendChoice{"cpu", MakeCpuBackend(threads), ""};
}

}  // namespace entropyserve
