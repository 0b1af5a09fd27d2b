// The CUDA backend: every operator of kernels/backend.h on one GPU and one stream.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "kernels/backend.h"

namespace entropyserve {

struct CudaOptions {
  int device = 0;
  // Device memory taken at start, bytes; 0: what is free then, less `reserve_bytes`.
  size_t pool_bytes = 0;
  // Left to the driver, cuBLASLt and other processes when pool_bytes is 0.
  size_t reserve_bytes = size_t{1} << 30;
  // Attention by the portable kernels even where a faster one exists (tests compare both).
  bool portable_only = false;
  // Linears of few rows through cuBLASLt too (kernel_bench compares both).
  bool cublaslt_only = false;
  // Called once after a CUDA error, before the process ends (exit status 70) within 2 seconds. It
  // must not call CUDA.
  std::function<void(const std::string&)> on_error;
};

// Number of CUDA devices that this build can run on (0 without a driver).
int CudaDeviceCount();

// Null, with a reason in *error, when there is no such device, it is older than compute
// capability 8.0, cuBLASLt cannot be loaded, or the memory cannot be had. After that, CUDA errors
// end the process (kernels/cuda/cuda_check.h).
std::unique_ptr<Backend> MakeCudaBackend(const CudaOptions& options, std::string* error);

}  // namespace entropyserve
