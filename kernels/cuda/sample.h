// The sampler: one block of threads per row. Same order of steps as kernels/cpu/sample.cc.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace entropyserve::cuda {

inline constexpr int kSampleRows = 32;  // rows of one launch: bounds the scratch

struct SampleLaunch {
  const float* logits = nullptr;  // [*, vocab] raw
  int64_t vocab = 0;
  const SampleRow* rows = nullptr;  // [n], device
  int32_t n = 0;                    // at most kSampleRows
  int32_t* ids = nullptr;           // scratch [kSampleRows, vocab]
  float* adjusted = nullptr;        // scratch [kSampleRows, vocab]
  SampleResult* results = nullptr;  // [n], device
};

void LaunchSample(const SampleLaunch& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
