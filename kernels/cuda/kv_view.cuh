// Device twin of kernels/kv_view.h: addresses inside the paged cache.
#pragma once

#include "kernels/backend.h"

namespace entropyserve::cuda {

__host__ __device__ __forceinline__ int64_t PageRow(int32_t page, int32_t row) {
  return int64_t{page} * kPageTokens + row;
}
__host__ __device__ __forceinline__ int32_t PagesFor(int32_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// One kv head of one layer of one sequence.
struct HeadView {
  const int32_t* pages;         // [max_pages]
  const int32_t* bounds;        // [max_bounds] or null
  const int32_t* window_pages;  // [max_window_pages] or null
  int32_t past;                 // tokens in the past run
  int32_t turn;                 // tokens in the turn run before this step
  int32_t turn_page;            // index into pages of the turn run's first page

  // Row of the pool of turn token i; of token i counted over both runs.
  __device__ __forceinline__ int64_t TurnRow(int32_t i) const {
    return PageRow(pages[turn_page + i / kPageTokens], i % kPageTokens);
  }
  __device__ __forceinline__ int64_t Row(int32_t i) const {
    return i < past ? PageRow(pages[i / kPageTokens], i % kPageTokens) : TurnRow(i - past);
  }
  // Row of block j's bounds: max in the K half, min in the V half.
  __device__ __forceinline__ int64_t BoundsRow(int32_t j) const {
    return PageRow(bounds[j / kPageTokens], j % kPageTokens);
  }
};

__device__ __forceinline__ HeadView ViewHead(const BatchSeq& seq, int32_t kv_heads, int32_t layer,
                                             int32_t kv_head) {
  const int64_t head = int64_t{layer} * kv_heads + kv_head;
  const HeadLength length = seq.lengths[head];
  HeadView view;
  view.pages = seq.pages + head * seq.max_pages;
  view.bounds = seq.bounds ? seq.bounds + head * seq.max_bounds : nullptr;
  view.window_pages = seq.window_pages ? seq.window_pages + head * seq.max_window_pages : nullptr;
  view.past = length.past;
  view.turn = length.base + seq.appended;
  view.turn_page = PagesFor(length.past);
  return view;
}

// Vector i = (position % W) * group + (head within the group) of a head's window queries.
struct WindowSlot {
  bool k_half;
  int64_t row;
};
__device__ __forceinline__ WindowSlot WindowRow(const int32_t* window_pages, int32_t i) {
  const int32_t in_page = i % (2 * kPageTokens);
  return {in_page < kPageTokens,
          PageRow(window_pages[i / (2 * kPageTokens)], in_page % kPageTokens)};
}

}  // namespace entropyserve::cuda
