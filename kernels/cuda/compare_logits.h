// Two predictions against each other: one block of threads per row.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace entropyserve::cuda {

void LaunchCompareLogits(const CompareLogitsParams& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
