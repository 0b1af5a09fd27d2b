// What one segment may read, as one list of keys: the past run, then the turn's earlier tokens (all
// of them, or the selected blocks), then the segment's own tokens, causally.
#pragma once

#include "kernels/cuda/attend.h"
#include "kernels/cuda/kv_view.cuh"

namespace entropyserve::cuda {

// See IsDense in kernels/kv_view.h.
__device__ __forceinline__ bool IsDense(const BatchSeq& seq, const BatchSegment& segment,
                                        int32_t layer) {
  const PrefillParams& p = seq.policy;
  if (p.full || layer < p.first_sparse_layer) return true;
  const int64_t begin = int64_t{segment.index} * p.segment;
  if (p.whole_prompt) {
    const int64_t segments = (seq.turn_total + p.segment - 1) / p.segment;
    return begin < p.dense_prefix || segment.index == segments - 1;
  }
  return begin < p.dense_prefix || begin + segment.rows > seq.turn_total - p.dense_suffix;
}

struct KeyList {
  HeadView view;
  const int32_t* blocks;  // null: dense
  int32_t block;          // B, tokens
  int32_t first;          // turn token of the segment's first row
  int32_t before;         // listed turn tokens before the segment

  // Listed keys before the segment's own.
  __device__ __forceinline__ int32_t own_begin() const { return view.past + before; }

  // Key i as an index into the head's page table, in tokens.
  __device__ __forceinline__ int32_t Slot(int32_t i) const {
    if (i < view.past) return i;
    int32_t t = i - view.past;
    if (t >= before) {
      t += first - before;
    } else if (blocks) {
      t = blocks[t / block] * block + t % block;
    }
    return view.turn_page * kPageTokens + t;
  }
  // Row of the pool. 32 bits hold it: 2^31 rows of 64 bf16 channels are 512 GB.
  __device__ __forceinline__ int32_t PoolRow(int32_t slot) const {
    return view.pages[slot / kPageTokens] * kPageTokens + slot % kPageTokens;
  }
};

// count: blocks of this (segment, kv head), -1: dense.
__device__ __forceinline__ KeyList ListKeys(const BatchSeq& seq, const BatchSegment& segment,
                                            const AttentionShape& shape, int32_t layer,
                                            int32_t kv_head, int32_t count, const int32_t* blocks) {
  KeyList list;
  list.view = ViewHead(seq, shape.kv_heads, layer, kv_head);
  list.block = seq.policy.block;
  list.first = segment.index * seq.policy.segment;
  list.blocks = count < 0 ? nullptr : blocks;
  list.before = count < 0 ? list.first : count * list.block;
  return list;
}

}  // namespace entropyserve::cuda
