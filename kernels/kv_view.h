// Addresses inside the paged cache. Used by every CPU kernel and by tests; CUDA has its own twin.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace entropyserve {

// Index into KvPool::k, v (in vectors of head_dim) and positions.
inline int64_t PageRow(int32_t page, int32_t row) { return int64_t{page} * kPageTokens + row; }

inline int32_t PagesFor(int64_t tokens) { return int32_t(CeilDiv<int64_t>(tokens, kPageTokens)); }

// One kv head of one layer of one sequence.
struct HeadView {
  const int32_t* pages = nullptr;   // [max_pages]
  const int32_t* bounds = nullptr;  // [max_bounds] or null
  const int32_t* window_pages = nullptr;
  int32_t past = 0;  // tokens in the past run
  int32_t turn = 0;  // tokens in the turn run before this step
  int32_t turn_page = 0;  // index into pages of the turn run's first page

  // Row of past token i, turn token i, token i counted over both runs.
  int64_t PastRow(int32_t i) const { return PageRow(pages[i / kPageTokens], i % kPageTokens); }
  int64_t TurnRow(int32_t i) const {
    return PageRow(pages[turn_page + i / kPageTokens], i % kPageTokens);
  }
  int64_t Row(int32_t i) const { return i < past ? PastRow(i) : TurnRow(i - past); }
  // Row of block j's bounds: max in the K half, min in the V half.
  int64_t BoundsRow(int32_t j) const { return PageRow(bounds[j / kPageTokens], j % kPageTokens); }
};

inline HeadView ViewHead(const BatchSeq& seq, int32_t kv_heads, int32_t layer, int32_t kv_head) {
  const int64_t head = int64_t{layer} * kv_heads + kv_head;
  HeadView view;
  view.pages = seq.pages + head * seq.max_pages;
  if (seq.bounds) view.bounds = seq.bounds + head * seq.max_bounds;
  if (seq.window_pages) view.window_pages = seq.window_pages + head * seq.max_window_pages;
  view.past = seq.lengths[head].past;
  view.turn = seq.lengths[head].base + seq.appended;
  view.turn_page = PagesFor(view.past);
  return view;
}

// Vector i = (position % W) * group + (head within the group) of a head's window queries.
struct WindowSlot {
  bool k_half;
  int64_t row;
};
inline WindowSlot WindowRow(const int32_t* window_pages, int32_t i) {
  const int32_t in_page = i % (2 * kPageTokens);
  return {in_page < kPageTokens, PageRow(window_pages[i / (2 * kPageTokens)], in_page % kPageTokens)};
}

// Whether segment `segment` reads everything before it.
inline bool IsDense(const BatchSeq& seq, const BatchSegment& segment, int32_t layer) {
  const PrefillParams& p = seq.policy;
  if (p.full || layer < p.first_sparse_layer) return true;
  const int64_t begin = int64_t{segment.index} * p.segment;
  if (p.whole_prompt) {  // the released code: only the last segment is dense at the end
    const int64_t segments = CeilDiv<int64_t>(seq.turn_total, p.segment);
    return begin < p.dense_prefix || segment.index == segments - 1;
  }
  return begin < p.dense_prefix || begin + segment.rows > seq.turn_total - p.dense_suffix;
}

}  // namespace entropyserve
