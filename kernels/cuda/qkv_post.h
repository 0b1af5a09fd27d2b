// q/k norm, RoPE, writes to the paged cache, block bounds, window queries.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace entropyserve::cuda {

// head_dim: a power of two, 16 to 256.
void LaunchQkvPost(const QkvParams& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
