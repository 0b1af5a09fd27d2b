// Prefill attention on Hopper (sm_90a): segments over block lists and dense segments, one launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/backend.h"

namespace entropyserve::sm90 {

// Whether the kernel runs this shape on a device of this compute capability (major * 10 + minor).
constexpr bool SupportsPrefillAttention(int capability, DType dtype, const AttentionShape& shape) {
  return capability == 90 && dtype == DType::kBF16 &&
         (shape.head_dim == 64 || shape.head_dim == 128) && shape.heads % shape.kv_heads == 0 &&
         shape.group() <= 128;
}

// Device memory that the launches need as scratch, for at most these rows and segments in a step.
size_t PrefillAttentionScratchBytes(const AttentionShape& shape, int64_t rows, int64_t segments);
size_t ProbeAttentionScratchBytes(const AttentionShape& shape, int64_t rows);

// Attention of all segments of p.batch; p.lists.counts may be null (all segments dense).
//
// - q and out are bf16 [rows, heads, head_dim]; only rows of segments are written.
// - scratch: PrefillAttentionScratchBytes, 256-byte aligned, not shared by concurrent launches.
// - correction: o[i] += probe_out[m] - o[m] for sparse segments of policies with correction > 0.
// Strides
//   16 to 128 are applied inside the kernel. For others `probe_out` is scratch too: its probe rows
//   come back as differences.
// - Executed pairs (SeqCounters) are not counted here.
//
// Returns the first CUDA error of the launches; cudaErrorInvalidValue for a shape that is not
// supported or a scratch that is too small.
cudaError_t LaunchPrefillAttention(const PrefillAttentionParams& p, void* scratch,
                                   size_t scratch_bytes, cudaStream_t stream);

// Exact outputs of the correction's probes: rows at offsets 0, r, 2r... (r = the policy's
// correction > 0) of each sequence's sparse segments, over everything before them, to p.probe_out
// (fp32); other rows of it are not touched. Reads p.q and the cache, not p.lists. One launch per
// sequence that has such segments.
//
// Scratch and errors as above.
cudaError_t LaunchProbeAttention(const SelectParams& p, void* scratch, size_t scratch_bytes,
                                 cudaStream_t stream);

}  // namespace entropyserve::sm90
