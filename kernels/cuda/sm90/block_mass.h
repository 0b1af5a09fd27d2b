// Where the attention of a segment's probes falls, on Hopper (sm_90a): cuda::LaunchMass for bins of
// whole key groups, through wgmma.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/mass.h"

namespace entropyserve::sm90 {

size_t BlockMassScratchBytes(int64_t items, int64_t max_rows, int64_t max_keys);

// As cuda::LaunchMass, for items with
//   - bf16 and head_dim 64 or 128, on compute capability 9.0;
//   - bin_size 8, 16, 32 or 64, bin_begin == past (bins lie in the turn's run);
// Scratch: BlockMassScratchBytes or cuda::MassScratchBytes (the same), 256-byte aligned. Sums have
// a fixed order; how keys are split depends on an item's own lengths only.
//
// Returns the first CUDA error of the launches; cudaErrorInvalidValue for a type or head_dim that
// is not supported.
cudaError_t LaunchBlockMass(const cuda::MassParams& p, cudaStream_t stream);

}  // namespace entropyserve::sm90
