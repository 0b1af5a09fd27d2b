// CUDA errors. Every CUDA call goes through CUDA_CHECK; a failure is sticky by nature (the context
// is lost), so the process ends: first the registered handler (health turns NOT_SERVING), then
// _Exit. No CUDA call is made after the failure.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <string>

#include "kernels/cuda/cublaslt_library.h"

namespace entropyserve::cuda {

// Exit status after a CUDA error (sysexits' EX_SOFTWARE), so that a supervisor can tell it apart.
inline constexpr int kCudaErrorExit = 70;

// Called once, from the thread that met the error, with a message for the log. It must not call
// CUDA and has 2 seconds: a watchdog ends the process if it does not return. The one piece of
// process-wide state here: a failing call has no context to carry it.
void SetCudaErrorHandler(std::function<void(const std::string&)> handler);

[[noreturn]] void CudaFailed(const char* what, const char* error, const char* file, int line);

inline void CheckCuda(cudaError_t error, const char* what, const char* file, int line) {
  if (error != cudaSuccess) [[unlikely]]
    CudaFailed(what, cudaGetErrorString(error), file, line);
}
inline void CheckCuda(cublasStatus_t status, const char* what, const char* file, int line) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]]
    CudaFailed(what, CublasStatusName(status), file, line);
}

}  // namespace entropyserve::cuda

// For cudaError_t and cublasStatus_t. After a launch: CUDA_CHECK(cudaGetLastError()).
#define CUDA_CHECK(expr) ::entropyserve::cuda::CheckCuda((expr), #expr, __FILE__, __LINE__)
