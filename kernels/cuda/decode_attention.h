// Attention of one new token per sequence over everything it has cached, split over keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/backend.h"

namespace entropyserve::cuda {

// Device memory that launches of at most `seqs` decoding sequences need; it starts zeroed.
size_t DecodeScratchBytes(const AttentionShape& shape, int64_t seqs);

// Tensor cores for bf16, head_dim 64 or 128 and at most 16 heads a group; else fp32 arithmetic.
// How keys are split depends on a head's own length only.
// max_seqs: what `scratch` was sized for.
void LaunchDecodeAttention(const DecodeAttentionParams& p, void* scratch, int64_t max_seqs,
                           cudaStream_t stream);

}  // namespace entropyserve::cuda
