// Work of one launch: an item is one (segment, kv head); it holds ceil(rows / 128) * group tiles,
// each 128 query rows of one head, which all read the same keys. Tiles of an item are neighbours in
// the schedule, so that the keys come from L2 all but once; longer items come first, so that none
// starts late.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace entropyserve::sm90 {

inline constexpr int kTileRows = 128;  // query rows of a tile: two warpgroups of 64
inline constexpr int kTileKeys = 128;  // keys per step: two pages

struct WorkItem {
  const int32_t* pages;   // page table of the head
  const int32_t* blocks;  // its block list, ascending
  int32_t count;          // blocks in the list; -1: dense
  int32_t block;          // B, tokens
  int32_t past;           // tokens of the past run
  int32_t turn_page;      // index into pages of the turn run's first page
  int32_t own;            // turn tokens before the segment
  int32_t row_begin;      // first row of the batch
  int32_t rows;           // of the segment
  int32_t head;           // first query head of the group
  int32_t correction;     // stride r, tokens; 0: none
  int32_t key_tiles;      // before the segment's own keys: what the order goes by
};
static_assert(sizeof(WorkItem) == 56);

struct WorkTile {
  int32_t item;
  int32_t sub;  // (row tile from the last to the first) * group + head of the group
};

struct WorkList {
  WorkItem* items = nullptr;   // [segments, kv_heads]
  WorkTile* tiles = nullptr;   // [total]
  int32_t* claimed = nullptr;  // tiles taken beyond each CTA's first one
  int32_t total = 0;           // tiles
  int32_t group = 1;           // query heads per kv head
};

struct BuildWorkParams {
  WorkList work;
  const BatchSeq* seqs = nullptr;          // [num_seqs]
  const BatchSegment* segments = nullptr;  // [num_segments]
  int32_t num_segments = 0;
  int32_t layer = 0;
  AttentionShape shape;
  BlockLists lists;
  bool has_probes = false;
};

// 32 buckets per factor of two: items of a bucket differ by at most 3 %.
inline constexpr int kLengthBuckets = 32 * 28;

// Bucket 0 is the longest.
__device__ inline int LengthBucket(int32_t key_tiles) {
  const uint32_t bits = __float_as_uint(float(key_tiles + 1));
  const int bucket = int(bits >> 18) - (127 << 5);  // 5 mantissa bits
  return kLengthBuckets - 1 - min(bucket, kLengthBuckets - 1);
}

__device__ inline WorkItem MakeWorkItem(const BuildWorkParams& p, int32_t index) {
  const int32_t kv_heads = p.shape.kv_heads;
  const int32_t kv_head = index % kv_heads;
  const BatchSegment segment = p.segments[index / kv_heads];
  const BatchSeq& seq = p.seqs[segment.seq];
  const int64_t head = int64_t{p.layer} * kv_heads + kv_head;
  const HeadLength length = seq.lengths[head];

  WorkItem item;
  item.pages = seq.pages + head * seq.max_pages;
  item.blocks = p.lists.blocks + int64_t{index} * p.lists.capacity;
  item.count = p.lists.counts ? p.lists.counts[index] : -1;
  item.block = seq.policy.block;
  item.past = length.past;
  item.turn_page = (length.past + kPageTokens - 1) / kPageTokens;
  item.own = length.base + seq.appended + segment.row_begin - seq.row_begin;
  item.row_begin = segment.row_begin;
  item.rows = segment.rows;
  item.head = kv_head * (p.shape.heads / kv_heads);
  item.correction = item.count >= 0 && p.has_probes ? seq.policy.correction : 0;
  const int64_t turn_keys = item.count < 0 ? item.own : int64_t{item.count} * item.block;
  item.key_tiles =
      (item.past + kTileKeys - 1) / kTileKeys + int32_t((turn_keys + kTileKeys - 1) / kTileKeys);
  return item;
}

// One CTA: a counting sort of the items by length, spread out into tiles. In prefill_attention.cu.
__global__ void __launch_bounds__(1024, 1) BuildWorkKernel(const BuildWorkParams p);

}  // namespace entropyserve::sm90
