// Kernels that start before the one in front of them has ended (programmatic dependent launch,
// compute capability 9.0). A linear spends the time that its input's kernel takes, and its own
// launch, on fetching weights.
//
// Only in recorded steps (Backend::Replay): there no operator writes what LaunchEarly's kernels
// read before WaitForEarlier(), while in general the kernel in front may have written just that.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_check.h"

namespace entropyserve::cuda {

// Once every block has called it or ended, the next kernel may start if it was launched early.
__device__ __forceinline__ void LetNextStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns when all earlier kernels have ended and what they wrote can be read.
__device__ __forceinline__ void WaitForEarlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// `kernel` must call WaitForEarlier() in every thread.
template <typename... Params>
void LaunchEarly(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                 Params... params) {
  cudaStreamCaptureStatus recording;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &recording));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  cudaLaunchAttribute early = {};
  if (recording == cudaStreamCaptureStatusActive) {
    // What was compiled for older cards does not wait.
    cudaFuncAttributes compiled;
    CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = compiled.ptxVersion >= 90;
  }
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params...));
}

}  // namespace entropyserve::cuda
