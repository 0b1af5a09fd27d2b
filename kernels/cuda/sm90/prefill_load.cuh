// What a CTA of the prefill attention kernel shares, and the warps that feed it: one claims tiles,
// one loads Q and K, one loads V.
//
// A tile's keys come in steps of 128 tokens: the past run, the turn's earlier tokens (all, or the
// selected blocks), the segment's own tokens up to the tile's last row. In shared memory every step
// has the same form, [16 groups][head_dim / 64][8 tokens][64] with 128-byte swizzle, because both
// copies write it: a page of 64 tokens (box {64, 8, head_dim / 64, 8}) and 8 tokens of a block (box
// {.., 1}).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/work.cuh"

namespace entropyserve::sm90 {

inline constexpr int kThreads = 384;
inline constexpr int kGroupKeys = 8;  // tokens of the smallest copy
inline constexpr int kGroupsPerStep = kTileKeys / kGroupKeys;
inline constexpr int kGroupsPerPage = kPageTokens / kGroupKeys;
inline constexpr int kMinTileStride = 16;  // correction strides that a tile handles alone
inline constexpr int kTileProbes = kTileRows / kMinTileStride;
// Steps before a tile's end at which the next tile is claimed: late enough to go to an idle CTA,
// early enough to hide the three dependent loads of a claim.
inline constexpr int kClaimAhead = 4;

// Probes of one sequence: its rows row_begin, row_begin + stride, ... of which each reads
// everything before it. A tile holds `per_tile` consecutive ones, each with all heads of a group:
// row = probe * group + head.
struct ProbeRun {
  const BatchSeq* seq = nullptr;  // in device memory
  int32_t layer = 0;
  int32_t kv_heads = 1;
  int32_t row_begin = 0;
  int32_t tokens = 0;  // rows from the first probe to the end of the last one's stride
  int32_t stride = 1;
  int32_t per_tile = 0;
  int32_t tiles = 0;  // per kv head
  int32_t parts = 1;  // of the longest tile
  int32_t part_steps = 0;
  // Of tiles with several parts: normalised outputs and log2 of the softmax denominators.
  float* part_out = nullptr;   // [tiles * kv_heads, parts, 128, head_dim]
  float* part_sums = nullptr;  // [tiles * kv_heads, parts, 128]
};

struct AttentionKernelParams {
  // {64, rows, head_dim / 64, heads}, box {64, 128, head_dim / 64, 1}; probes: {64, group, probes,
  // head_dim / 64, kv_heads}, box {64, group, per_tile, 1, 1}.
  CUtensorMap q;
  CUtensorMap k_page;  // {64, 8, head_dim / 64, pages * 8}, box {64, 8, head_dim / 64, 8}
  CUtensorMap v_page;
  CUtensorMap k_group;  // the same, box {64, 8, head_dim / 64, 1}
  CUtensorMap v_group;
  uint16_t* out;     // bf16 [rows, heads, head_dim]
  float* probe_out;  // [rows, heads, head_dim] or null
  WorkList work;     // probes: `claimed`, `total` and `group` only
  ProbeRun run;
  int32_t heads;
  float scale_log2;  // log2(e) / sqrt(head_dim)
};

// What the warps of a CTA know about a tile.
struct TileTask {
  const int32_t* pages;
  const int32_t* blocks;
  int32_t steps;       // of 128 keys in all; 0: no more work
  int32_t first_step;  // those before it belong to other parts of the tile
  int32_t past_steps;  // of all parts' steps, over the past run
  int32_t turn_steps;  // then, over the turn's earlier tokens
  int32_t past;        // tokens
  int32_t turn_keys;   // tokens read of the turn before the segment
  int32_t turn_page;
  int32_t block_shift;  // log2 of B; -1: dense
  int32_t count;        // blocks in the list
  int32_t own;          // turn tokens before the segment
  int32_t own_keys;     // cached from there on
  int32_t own_tail;     // of them in the last step
  int32_t row;          // batch row of the first query
  int32_t row_offset;   // the same, of the segment
  int32_t rows;         // valid ones of the tile, <= 128
  int32_t head;         // query head; probes: first head of the group
  int32_t correction;   // stride; 0: none
  int32_t parts;        // of the tile; probes only
  int64_t part;         // index into ProbeRun::part_sums, in tiles
};

template <int kD>
struct Smem {
  static constexpr int kStages = kD == 128 ? 2 : 4;
  static constexpr int kTileBytes = 128 * kD * 2;
  alignas(1024) uint8_t q[2][kTileBytes];
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t v[kStages][kTileBytes];
  alignas(128) float probes[2][kTileProbes][kD];
  alignas(16) int32_t groups[2][2][kGroupsPerStep];  // [K, V][parity]
  TileTask task[2];
  uint64_t task_full[2], q_full[2], q_empty[2], claim;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Position in a ring of kStages buffers.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---- the warp that claims tiles ----

__device__ inline TileTask MakeTask(const WorkItem& item, int32_t sub, int32_t group) {
  TileTask t = {};
  const int32_t row_tiles = (item.rows + kTileRows - 1) / kTileRows;
  const int32_t row_tile = row_tiles - 1 - sub / group;
  t.pages = item.pages;
  t.blocks = item.blocks;
  t.past = item.past;
  t.turn_page = item.turn_page;
  t.count = item.count;
  t.own = item.own;
  t.block_shift = item.count < 0 ? -1 : 31 - __clz(item.block);
  t.turn_keys = item.count < 0 ? item.own : item.count * item.block;
  t.past_steps = (item.past + kTileKeys - 1) / kTileKeys;
  t.turn_steps = (t.turn_keys + kTileKeys - 1) / kTileKeys;
  t.steps = t.past_steps + t.turn_steps + row_tile + 1;
  t.own_keys = item.rows;
  t.row_offset = row_tile * kTileRows;
  t.row = item.row_begin + t.row_offset;
  t.rows = min(kTileRows, item.rows - t.row_offset);
  t.own_tail = t.rows;
  t.first_step = 0;
  t.head = item.head + sub % group;
  t.correction = item.correction;
  return t;
}

// `unit`: tile * kv_heads + kv head. A part that the tile does not have gets steps <= 0.
__device__ inline TileTask MakeProbeTask(const ProbeRun& run, int32_t unit, int32_t part,
                                         int32_t group) {
  const int32_t tile = unit / run.kv_heads, kv_head = unit % run.kv_heads;
  const int64_t head = int64_t{run.layer} * run.kv_heads + kv_head;
  const BatchSeq& seq = *run.seq;
  const HeadLength length = seq.lengths[head];
  TileTask t = {};
  t.pages = seq.pages + head * seq.max_pages;
  t.past = length.past;
  t.turn_page = (length.past + kPageTokens - 1) / kPageTokens;
  t.own = length.base + seq.appended + run.row_begin - seq.row_begin;
  t.block_shift = -1;
  t.turn_keys = t.own;
  t.past_steps = (t.past + kTileKeys - 1) / kTileKeys;
  t.turn_steps = (t.own + kTileKeys - 1) / kTileKeys;
  const int32_t first = tile * run.per_tile;
  const int32_t probes = min(run.per_tile, (run.tokens + run.stride - 1) / run.stride - first);
  const int32_t own_steps = (first + probes - 1) * run.stride / kTileKeys + 1;
  const int32_t steps = t.past_steps + t.turn_steps + own_steps;
  t.first_step = part * run.part_steps;
  t.steps = min(steps - t.first_step, run.part_steps);
  t.parts = (steps + run.part_steps - 1) / run.part_steps;
  t.part = int64_t{unit} * run.parts + part;
  t.own_keys = run.tokens;
  t.own_tail =
      part == t.parts - 1 ? min(kTileKeys, run.tokens - (own_steps - 1) * kTileKeys) : kTileKeys;
  t.row_offset = first * run.stride;
  t.row = run.row_begin + t.row_offset;
  t.rows = probes * group;
  t.head = kv_head * group;
  return t;
}

// The task of a ticket. Prefill: the work list's order. Probes: part by part, so that the tiles
// that share keys run together, and from the last tile to the first.
template <bool kProbes>
__device__ TileTask TaskOf(const AttentionKernelParams& p, int32_t ticket) {
  if constexpr (kProbes) {
    const int32_t units = p.run.tiles * p.run.kv_heads;
    return MakeProbeTask(p.run, units - 1 - ticket % units, ticket / units, p.work.group);
  } else {
    const WorkTile tile = p.work.tiles[ticket];
    return MakeTask(p.work.items[tile.item], tile.sub, p.work.group);
  }
}

template <int kD, bool kProbes>
__device__ void ClaimTiles(Smem<kD>& s, const AttentionKernelParams& p) {
  if (threadIdx.x % 32 != 0) return;
  auto next = [&] { return int32_t(gridDim.x) + atomicAdd(p.work.claimed, 1); };
  for (int32_t i = 0;; ++i) {
    const int slot = i & 1;
    int32_t ticket = blockIdx.x;
    if (i > 0) {
      BarrierWait(&s.claim, (i - 1) & 1);
      ticket = next();
    }
    BarrierWait(&s.q_empty[slot], ((i >> 1) & 1) ^ 1);
    TileTask task = {};
    for (; ticket < p.work.total; ticket = next()) {
      task = TaskOf<kProbes>(p, ticket);
      if (task.steps > 0) break;
    }
    if (ticket >= p.work.total) task.steps = 0;
    s.task[slot] = task;
    BarrierArrive(&s.task_full[slot]);
    if (task.steps == 0) return;
  }
}

// ---- the warps that load ----

// What lane `lane` copies in step `step` of this part: the 8-token group it starts at, counted
// through the head's page table; -1: nothing.
__device__ inline int32_t GroupInTable(const TileTask& t, int32_t step, int32_t lane) {
  if (step >= t.steps || lane >= kGroupsPerStep) return -1;
  step += t.first_step - t.past_steps;
  const bool in_past = step < 0;
  if (!in_past && step < t.turn_steps && t.block_shift >= 0) {
    const int32_t token = step * kTileKeys + lane * kGroupKeys;
    const int32_t entry = token >> t.block_shift;
    if (entry >= t.count) return -1;
    const int32_t first = t.blocks[entry] << t.block_shift;
    return t.turn_page * kGroupsPerPage +
           (first + (token & ((1 << t.block_shift) - 1))) / kGroupKeys;
  }
  if (lane >= kTileKeys / kPageTokens) return -1;
  int32_t token = lane * kPageTokens, end;
  if (in_past) {
    token += (step + t.past_steps) * kTileKeys;
    end = t.past;
  } else if (step < t.turn_steps) {
    token += step * kTileKeys;
    end = t.own;
  } else {
    token += t.own + (step - t.turn_steps) * kTileKeys;
    end = t.own + t.own_keys;
  }
  if (token >= end) return -1;
  return ((in_past ? 0 : t.turn_page) + token / kPageTokens) * kGroupsPerPage;
}

// The same in the pool. Copies outside of it (negative) fill with zeros.
__device__ inline int32_t GroupInPool(const TileTask& t, int32_t group) {
  if (group < 0) return -kGroupsPerPage;
  return t.pages[group / kGroupsPerPage] * kGroupsPerPage + group % kGroupsPerPage;
}

// Q and, where the tile corrects by itself, the probes' exact outputs. One thread.
template <int kD>
__device__ void LoadQueries(Smem<kD>& s, const AttentionKernelParams& p, const TileTask& t,
                            int slot) {
  const bool probes = t.correction >= kMinTileStride && t.correction <= kTileRows;
  const int32_t count = probes ? (t.rows + t.correction - 1) / t.correction : 0;
  const uint32_t barrier = SmemAddress(&s.q_full[slot]);
  BarrierArriveExpect(&s.q_full[slot], Smem<kD>::kTileBytes + count * kD * sizeof(float));
  TensorCopy4D(SmemAddress(s.q[slot]), &p.q, barrier, 0, t.row, 0, t.head);
  for (int32_t i = 0; i < count; ++i) {
    const int64_t row = t.row + i * t.correction;
    BulkCopy(SmemAddress(s.probes[slot][i]), p.probe_out + (row * p.heads + t.head) * kD,
             kD * sizeof(float), barrier);
  }
}

// A tile's probes with the heads of their group. One thread.
template <int kD>
__device__ void LoadProbes(Smem<kD>& s, const AttentionKernelParams& p, const TileTask& t,
                           int slot) {
  constexpr int kRowBytes = 128;
  const int32_t rows = p.run.per_tile * p.work.group;  // the box; beyond the run it brings zeros
  const uint32_t barrier = SmemAddress(&s.q_full[slot]);
  BarrierArriveExpect(&s.q_full[slot], rows * kD * 2);
#pragma unroll
  for (int span = 0; span < kD / 64; ++span)
    TensorCopy5D(SmemAddress(s.q[slot]) + span * kTileRows * kRowBytes, &p.q, barrier, 0, 0,
                 t.row_offset / p.run.stride, span, t.head / p.work.group);
}

template <int kD, bool kKeys, bool kProbes>
__device__ void LoadSteps(Smem<kD>& s, const AttentionKernelParams& p) {
  constexpr int kGroupBytes = kGroupKeys * kD * 2;
  const int32_t lane = threadIdx.x % 32;
  const CUtensorMap* page_map = kKeys ? &p.k_page : &p.v_page;
  const CUtensorMap* group_map = kKeys ? &p.k_group : &p.v_group;
  Ring<Smem<kD>::kStages> ring;
  uint32_t parity = 0;
  for (int32_t i = 0;; ++i) {
    const int slot = i & 1;
    BarrierWait(&s.task_full[slot], (i >> 1) & 1);
    const TileTask& t = s.task[slot];
    if (t.steps == 0) {
      if (kKeys && lane == 0) BarrierArrive(&s.q_full[slot]);
      return;
    }
    if (kKeys && ElectOne()) {
      if constexpr (kProbes)
        LoadProbes(s, p, t, slot);
      else
        LoadQueries(s, p, t, slot);
    }
    // Table lookups run ahead: `group` is resolved one step early, its list entry read two steps
    // early.
    int32_t group = GroupInPool(t, GroupInTable(t, 0, lane));
    int32_t next = GroupInTable(t, 1, lane);
    for (int32_t step = 0; step < t.steps; ++step) {
      int32_t* groups = s.groups[kKeys ? 0 : 1][parity];
      if (lane < kGroupsPerStep) groups[lane] = group;
      __syncwarp();
      group = GroupInPool(t, next);
      next = GroupInTable(t, step + 2, lane);
      const bool in_turn = step >= t.past_steps && step < t.past_steps + t.turn_steps;
      if (ElectOne()) {
        uint64_t* full = kKeys ? &s.k_full[ring.stage] : &s.v_full[ring.stage];
        uint64_t* empty = kKeys ? &s.k_empty[ring.stage] : &s.v_empty[ring.stage];
        const uint32_t dst = SmemAddress(kKeys ? s.k[ring.stage] : s.v[ring.stage]);
        const uint32_t barrier = SmemAddress(full);
        if (kKeys && step == max(0, t.steps - kClaimAhead)) BarrierArrive(&s.claim);
        BarrierWait(empty, ring.phase ^ 1);
        BarrierArriveExpect(full, Smem<kD>::kTileBytes);
        if (in_turn && t.block_shift >= 0) {
#pragma unroll
          for (int g = 0; g < kGroupsPerStep; g += 8) {
            const int4 a = *reinterpret_cast<const int4*>(groups + g);
            const int4 b = *reinterpret_cast<const int4*>(groups + g + 4);
            const int32_t at[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
              TensorCopy4D(dst + (g + i) * kGroupBytes, group_map, barrier, 0, 0, 0, at[i]);
          }
        } else {
          const int2 at = *reinterpret_cast<const int2*>(groups);
          TensorCopy4D(dst, page_map, barrier, 0, 0, 0, at.x);
          TensorCopy4D(dst + kGroupsPerPage * kGroupBytes, page_map, barrier, 0, 0, 0, at.y);
        }
      }
      ring.Next();
      parity ^= 1;
    }
  }
}

}  // namespace entropyserve::sm90
