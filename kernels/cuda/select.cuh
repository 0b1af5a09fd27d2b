// What the kernels of SelectBlocks share.
#pragma once

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/select_blocks.h"

namespace entropyserve::cuda {

// Whether anything is estimated on this layer for the sequence.
__device__ __forceinline__ bool Acts(const BatchSeq& seq, int32_t layer) {
  return !seq.policy.full && layer >= seq.policy.first_sparse_layer;
}

// Blocks of strictly earlier segments.
__device__ __forceinline__ int32_t VisibleBlocks(const BatchSeq& seq, const BatchSegment& segment) {
  return segment.index * (seq.policy.segment / seq.policy.block);
}

// Sparse segments, and full dense ones whose entropy the budget rule remembers.
__device__ __forceinline__ bool IsEstimated(const BatchSeq& seq, const BatchSegment& segment,
                                            int32_t layer) {
  const PrefillParams& p = seq.policy;
  const bool remembered =
      p.whole_prompt || (p.budget == BudgetRule::kEntropy && segment.rows == p.segment);
  return Acts(seq, layer) && segment.index > 0 && (remembered || !IsDense(seq, segment, layer));
}

// Attention mass of a block from its score.
__device__ __forceinline__ float BlockMass(float score, bool box, const RowStat& stat) {
  return box ? expf(score - stat.high) * stat.inverse : score;
}

}  // namespace entropyserve::cuda
