// Linears of a few rows (decode): weights are read once, at the rate at which memory gives them.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace entropyserve::cuda {

// Up to this many rows our kernel takes a linear; more rows are cuBLASLt's. Measured:
// docs/performance.md.
inline constexpr int64_t kFewRows = 16;
constexpr int64_t FewRows(DType weights) { return weights == DType::kE4M3 ? kFewRows : 8; }

// What decides between the two. Rows of x and w are read 16 bytes at a time.
inline bool IsFewRowsLinear(const LinearParams& p) {
  return p.rows <= FewRows(p.w.dtype) && p.w.dtype != DType::kF32 &&
         p.w.cols * int64_t(SizeOf(p.w.dtype)) % 16 == 0;
}

// Products of either type are summed in f32 (cuBLASLt's 8-bit ones keep about 14 bits). A row's
// result depends neither on the other rows nor on how many there are. p: IsFewRowsLinear, rows > 0.
void LaunchLinearFewRows(const LinearParams& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
