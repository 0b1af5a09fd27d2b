// SelectTokens and Compact: which cached tokens survive, and their move into fresh pages.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/backend.h"

namespace entropyserve::cuda {

// Scratch for sequences within these limits and windows of at most kMaxWindow queries.
inline constexpr int32_t kMaxWindow = 1024;
size_t SelectTokensScratchBytes(const Backend::Limits& limits);

void RunSelectTokens(const SelectTokensParams& p, void* scratch, size_t scratch_bytes,
                     cudaStream_t stream);
void LaunchCompact(const CompactParams& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
