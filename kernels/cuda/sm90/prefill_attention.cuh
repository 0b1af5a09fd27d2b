// The kernel behind LaunchPrefillAttention. Online softmax after FlashAttention-3 (arXiv
// 2407.08608, sections 3.1 and 3.2), over keys that a page table and a block list name.
//
// A CTA has three warpgroups. The first one feeds (prefill_load.cuh). The other two each own 64
// query rows and go at their own pace: the hardware lets one multiply while the other does its
// softmax, which measured 1 % faster than taking turns by named barriers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/sm90/prefill_load.cuh"
#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/wgmma.cuh"

namespace entropyserve::sm90 {

// ---- the warpgroups that compute ----

// Running maximum and sum of two rows (l/4 and l/4 + 8 of the warp's 16) over the columns seen so
// far.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};  // of unscaled scores
  float sum[2] = {0, 0};                  // this thread's columns only
};

// Which of a tile's keys its queries may not see: the ends of the past run and of the block list,
// where a step is not full, and the segment's own later tokens. For this thread's two rows.
struct KeyMask {
  int32_t past_last, past_tail;  // last step over the past run; its keys
  int32_t turn_last, turn_tail;  // the same for the turn's earlier tokens
  int32_t causal_first;          // first step that holds keys after some query
  int32_t query[2];              // where the rows' queries stand among the segment's tokens

  __device__ KeyMask(const TileTask& t, int32_t first, int32_t second)
      : past_last(t.past_steps - 1 - t.first_step),
        past_tail(t.past - (t.past_steps - 1) * kTileKeys),
        turn_last(past_last + t.turn_steps),
        turn_tail(t.turn_keys - (t.turn_steps - 1) * kTileKeys),
        causal_first(turn_last + 1 + t.row_offset / kTileKeys),
        query{t.row_offset + first, t.row_offset + second} {}

  __device__ bool EndsPast(int32_t step) const {
    return step == past_last && past_tail < kTileKeys;
  }

  __device__ void Apply(float (&s)[64], int32_t step) const {
    const bool causal = step >= causal_first;
    int32_t keys = kTileKeys;
    if (step == past_last) keys = past_tail;
    if (step == turn_last) keys = min(keys, turn_tail);
    if (!causal && keys == kTileKeys) return;
    const int32_t before = (step - turn_last - 1) * kTileKeys;  // own keys in earlier steps
    const int32_t limit[2] = {causal ? query[0] + 1 - before : keys,
                              causal ? query[1] + 1 - before : keys};
    const int32_t column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (column + i / 4 * 8 + (i & 1) >= limit[i / 2 % 2]) s[i] = -INFINITY;
    }
  }
};

// Scores to weights in place; `decay` is what earlier sums and outputs shrink by. kEmptyRows: a row
// may have seen no key yet.
template <bool kEmptyRows>
__device__ inline void SoftmaxStep(float (&s)[64], RowState& state, float (&decay)[2],
                                   float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
    top = fmaxf(top, state.max[r]);
    const float shift = kEmptyRows && top == -INFINITY ? 0 : top * scale_log2;
    decay[r] = kEmptyRows && top == -INFINITY ? 1.0f : Exp2((state.max[r] - top) * scale_log2);
    state.max[r] = top;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * r + e];
        x = Exp2(fmaf(x, scale_log2, -shift));
        sum += x;
      }
    }
    state.sum[r] = state.sum[r] * decay[r] + sum;
  }
}

__device__ inline void PackWeights(const float (&s)[64], uint32_t (&w)[8][4]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) w[i / 4][i % 4] = PackBF16(s[2 * i], s[2 * i + 1]);
}

template <int kN>
__device__ inline void ScaleRows(float (&o)[kN], float first, float second) {
#pragma unroll
  for (int i = 0; i < kN; ++i) o[i] *= (i & 2) ? second : first;
}

// s = Q K^T: issues, does not wait. `q`, `k`: descriptors of the warpgroup's rows and of the stage.
template <int kD>
__device__ inline void IssueQK(float (&s)[64], uint64_t q, uint64_t k) {
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    const uint64_t a = Advance(q, i / 4 * (kTileRows * 128) + i % 4 * 32);
    const uint64_t b = Advance(k, i / 4 * 1024 + i % 4 * 32);
    if (i == 0)
      WgmmaQK<false>(s, a, b);
    else
      WgmmaQK<true>(s, a, b);
  }
  WgmmaCommit();
}

// o += weights V: issues, does not wait.
template <int kD>
__device__ inline void IssuePV(float (&o)[kD / 2], const uint32_t (&w)[8][4], uint64_t v) {
#pragma unroll
  for (int i = 0; i < kTileKeys / 16; ++i)
    WgmmaPV(o, w[i], Advance(v, i * 2 * kGroupKeys * kD * 2));
  WgmmaCommit();
}

// Zeroes rows [first, 128) of a V stage: the weights there are 0, but 0 x NaN is NaN, and pages
// keep what their last owner left. Both warpgroups write the same zeros, so neither waits for the
// other.
template <int kD>
__device__ void ZeroTail(uint8_t* v, int32_t first, int32_t warpgroup) {
  constexpr int kChunks = kD / 8;  // of 16 bytes in a row
  for (int32_t i = threadIdx.x % 128; i < (kTileKeys - first) * kChunks; i += 128) {
    const int32_t row = first + i / kChunks, chunk = i % kChunks;
    uint8_t* at =
        v + row / 8 * (kGroupKeys * kD * 2) + chunk / 8 * 1024 + row % 8 * 128 + chunk % 8 * 16;
    *reinterpret_cast<uint4*>(at) = uint4{0, 0, 0, 0};
  }
  FenceAsyncProxy();
  NamedSync(1 + warpgroup, 128);
}

// Delta Attention's correction (arXiv 2505.11254): o[i] += probe[m] - o[m], m the last probe at or
// before i. `row`: this thread's first row of the tile.
template <int kD>
__device__ void Correct(Smem<kD>& s, const AttentionKernelParams& p, const TileTask& t, int slot,
                        float (&o)[kD / 2], int32_t row, int32_t warpgroup) {
  const int32_t r = t.correction, column = threadIdx.x % 4 * 2;
  if (r < kMinTileStride || r > kTileRows) {  // finished by CorrectRowsKernel
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t at = row + 8 * half;
      if (at >= t.rows || (t.row_offset + at) % r != 0) continue;
      float* exact = p.probe_out + ((int64_t{t.row} + at) * p.heads + t.head) * kD + column;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) {
        exact[8 * j] -= o[4 * j + 2 * half];
        exact[8 * j + 1] -= o[4 * j + 2 * half + 1];
      }
    }
    return;
  }
  // A warp's 16 rows share one probe, which is the first of them or an earlier warp's.
  const int32_t strip = row - row % 16;
  float* probe = s.probes[slot][strip / r] + column;
  if (row == strip && strip % r == 0) {
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      probe[8 * j] -= o[4 * j];
      probe[8 * j + 1] -= o[4 * j + 1];
    }
  }
  NamedSync(1 + warpgroup, 128);
  if (r == kTileRows) {
    // The second warpgroup's rows follow the first one's probe. A barrier per slot: the first
    // warpgroup may be a whole short tile ahead, but not two.
    const int id = 3 + slot;
    if (warpgroup == 0)
      NamedArrive(id, 256);
    else
      NamedSync(id, 256);
  }
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) o[i] += probe[i / 4 * 8 + (i & 1)];
}

// Writes the warp's 16 rows through its own part of the query buffer, which nobody reads any more.
template <int kD>
__device__ void StoreRows(Smem<kD>& s, const AttentionKernelParams& p, const TileTask& t, int slot,
                          const float (&o)[kD / 2], int32_t strip) {
  constexpr int kChunks = kD / 8;  // of 16 bytes in a row
  const int32_t lane = threadIdx.x % 32;
  auto address = [&](int32_t row, int32_t chunk) {
    return s.q[slot] + chunk / 8 * (kTileRows * 128) + row * 128 + ((chunk ^ row) & 7) * 16;
  };
#pragma unroll
  for (int j = 0; j < kChunks; j += 2) {
    const int32_t row = strip + lane % 16;
    StoreMatrix4(SmemAddress(address(row, j + lane / 16)), PackBF16(o[4 * j], o[4 * j + 1]),
                 PackBF16(o[4 * j + 2], o[4 * j + 3]), PackBF16(o[4 * j + 4], o[4 * j + 5]),
                 PackBF16(o[4 * j + 6], o[4 * j + 7]));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; ++i) {
    const int32_t row = strip + (i * 32 + lane) / kChunks, chunk = lane % kChunks;
    if (row < t.rows) {
      uint16_t* out = p.out + ((int64_t{t.row} + row) * p.heads + t.head) * kD + chunk * 8;
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(address(row, chunk));
    }
  }
}

// Writes the probes' exact outputs, or those of a part.
template <int kD>
__device__ void StoreProbes(const AttentionKernelParams& p, const TileTask& t,
                            const float (&o)[kD / 2], const RowState& state, int32_t row) {
  const int32_t group = p.work.group, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t at = row + 8 * half;
    if (at >= t.rows) continue;
    const int64_t query = t.row + at / group * p.run.stride;
    float* out = p.probe_out + (query * p.heads + t.head + at % group) * kD;
    if (t.parts > 1) {
      out = p.run.part_out + (t.part * kTileRows + at) * kD;
      if (column == 0)
        p.run.part_sums[t.part * kTileRows + at] =
            state.max[half] * p.scale_log2 + log2f(state.sum[half]);
    }
#pragma unroll
    for (int j = 0; j < kD / 8; ++j)
      *reinterpret_cast<float2*>(out + column + 8 * j) = {o[4 * j + 2 * half],
                                                          o[4 * j + 2 * half + 1]};
  }
}

// Adds up the parts of a tile, in their order. One CTA per (tile, kv head).
template <int kD>
__global__ void MergePartsKernel(const __grid_constant__ AttentionKernelParams p) {
  const TileTask t = MakeProbeTask(p.run, blockIdx.x, 0, p.work.group);
  if (t.parts == 1) return;
  for (int32_t i = threadIdx.x; i < t.rows * kD; i += blockDim.x) {
    const int32_t at = i / kD, column = i % kD;
    const float* sums = p.run.part_sums + t.part * kTileRows + at;
    const float* outs = p.run.part_out + (t.part * kTileRows + at) * kD + column;
    float top = -INFINITY, sum = 0, out = 0;
    for (int32_t part = 0; part < t.parts; ++part) top = fmaxf(top, sums[part * kTileRows]);
    for (int32_t part = 0; part < t.parts; ++part) {
      const float weight = Exp2(sums[part * kTileRows] - top);
      sum += weight;
      out += weight * outs[part * kTileRows * kD];
    }
    const int64_t query = t.row + at / p.work.group * p.run.stride;
    p.probe_out[(query * p.heads + t.head + at % p.work.group) * kD + column] = out / sum;
  }
}

template <int kD, bool kProbes>
__device__ void ComputeTiles(Smem<kD>& s, const AttentionKernelParams& p, int32_t warpgroup) {
  constexpr int kStages = Smem<kD>::kStages;
  constexpr int kGroupBytes = kGroupKeys * kD * 2;
  const int32_t lane = threadIdx.x % 32;
  const int32_t strip = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  const int32_t row = strip + lane / 4;
  Ring<kStages> k_ring, v_ring;
  auto release = [&](uint64_t* barrier) {
    if (lane == 0) BarrierArrive(barrier);
  };

  for (int32_t i = 0;; ++i) {
    const int slot = i & 1;
    BarrierWait(&s.q_full[slot], (i >> 1) & 1);
    const TileTask& t = s.task[slot];
    const int32_t steps = t.steps;
    if (steps == 0) return;
    // Rows of probes hold the heads of a group next to each other.
    const KeyMask mask = kProbes ? KeyMask(t, row / p.work.group * p.run.stride,
                                           (row + 8) / p.work.group * p.run.stride)
                                 : KeyMask(t, row, row + 8);
    float scores[64], o[kD / 2];
    uint32_t weights[8][4];
    RowState state;
    float decay[2];
#pragma unroll
    for (int j = 0; j < kD / 2; ++j) o[j] = 0;

    const uint64_t q = MakeDescriptor(SmemAddress(s.q[slot]) + warpgroup * 64 * 128, 16, 1024);
    auto k_descriptor = [&] {
      return MakeDescriptor(SmemAddress(s.k[k_ring.stage]), 16, kGroupBytes);
    };
    auto v_descriptor = [&] {
      return MakeDescriptor(SmemAddress(s.v[v_ring.stage]), 1024, kGroupBytes);
    };

    BarrierWait(&s.k_full[k_ring.stage], k_ring.phase);
    WgmmaFence();
    IssueQK<kD>(scores, q, k_descriptor());
    WgmmaWait<0>();
    FenceRegisters(scores);
    release(&s.k_empty[k_ring.stage]);
    k_ring.Next();
    mask.Apply(scores, 0);
    SoftmaxStep<kProbes>(scores, state, decay, p.scale_log2);
    PackWeights(scores, weights);
    BarrierWait(&s.v_full[v_ring.stage], v_ring.phase);

    for (int32_t step = 1; step < steps; ++step) {
      BarrierWait(&s.k_full[k_ring.stage], k_ring.phase);
      if (mask.EndsPast(step - 1)) ZeroTail<kD>(s.v[v_ring.stage], mask.past_tail, warpgroup);
      FenceRegisters(scores);
      FenceRegisters(o);
      WgmmaFence();
      IssueQK<kD>(scores, q, k_descriptor());
      IssuePV<kD>(o, weights, v_descriptor());
      WgmmaWait<1>();
      FenceRegisters(scores);
      release(&s.k_empty[k_ring.stage]);
      k_ring.Next();
      mask.Apply(scores, step);
      SoftmaxStep<kProbes>(scores, state, decay, p.scale_log2);
      // V of this step, needed in the next turn, is awaited here because the loop of the wait keeps
      // ptxas from moving the softmax behind the end of the products that it is to overlap with.
      uint64_t* v_done = &s.v_empty[v_ring.stage];
      v_ring.Next();
      BarrierWait(&s.v_full[v_ring.stage], v_ring.phase);
      WgmmaWait<0>();
      FenceRegisters(o);
      release(v_done);
      // Maxima rarely move after the first steps.
      if (__any_sync(0xffffffff, decay[0] != 1.0f || decay[1] != 1.0f))
        ScaleRows(o, decay[0], decay[1]);
      PackWeights(scores, weights);
    }

    if (t.own_tail < kTileKeys) ZeroTail<kD>(s.v[v_ring.stage], t.own_tail, warpgroup);
    FenceRegisters(o);
    WgmmaFence();
    IssuePV<kD>(o, weights, v_descriptor());
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.sum[r] += __shfl_xor_sync(0xffffffff, state.sum[r], 1);
      state.sum[r] += __shfl_xor_sync(0xffffffff, state.sum[r], 2);
    }
    WgmmaWait<0>();
    FenceRegisters(o);
    release(&s.v_empty[v_ring.stage]);
    v_ring.Next();
    if constexpr (kProbes) {
      // A part may hold no key that a row sees.
      ScaleRows(o, state.sum[0] > 0 ? 1.0f / state.sum[0] : 0,
                state.sum[1] > 0 ? 1.0f / state.sum[1] : 0);
      StoreProbes<kD>(p, t, o, state, row);
    } else {
      ScaleRows(o, 1.0f / state.sum[0], 1.0f / state.sum[1]);
      if (t.correction > 0) Correct<kD>(s, p, t, slot, o, row, warpgroup);
      StoreRows<kD>(s, p, t, slot, o, strip);
      FenceAsyncProxy();  // the next queries arrive where we staged
    }
    __syncwarp();
    release(&s.q_empty[slot]);
  }
}

template <int kD, bool kProbes>
__global__ void __launch_bounds__(kThreads, 1)
    PrefillAttentionKernel(const __grid_constant__ AttentionKernelParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  Smem<kD>& s = *reinterpret_cast<Smem<kD>*>(raw);
  constexpr int kComputeWarps = 8;
  if (threadIdx.x == 0) {
    if (SmemAddress(raw) % 1024 != 0) __trap();  // descriptors count on it
    BarrierInit(&s.claim, 1);
    for (int i = 0; i < 2; ++i) {
      BarrierInit(&s.task_full[i], 1);
      BarrierInit(&s.q_full[i], 1);
      BarrierInit(&s.q_empty[i], kComputeWarps);
    }
    for (int i = 0; i < Smem<kD>::kStages; ++i) {
      BarrierInit(&s.k_full[i], 1);
      BarrierInit(&s.v_full[i], 1);
      BarrierInit(&s.k_empty[i], kComputeWarps);
      BarrierInit(&s.v_empty[i], kComputeWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();

  const int32_t warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ShrinkRegisters<40>();
    const int32_t warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    if (warp == 0)
      LoadSteps<kD, true, kProbes>(s, p);
    else if (warp == 1)
      LoadSteps<kD, false, kProbes>(s, p);
    else if (warp == 2)
      ClaimTiles<kD, kProbes>(s, p);
  } else {
    GrowRegisters<232>();
    ComputeTiles<kD, kProbes>(s, p, warpgroup - 1);
  }
}

template <int kD, bool kProbes>
cudaError_t LaunchAttentionKernel(const AttentionKernelParams& p, int ctas, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Smem<kD>);
  if (cudaError_t e = cudaFuncSetAttribute(PrefillAttentionKernel<kD, kProbes>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      e != cudaSuccess)
    return e;
  PrefillAttentionKernel<kD, kProbes><<<ctas, kThreads, kBytes, stream>>>(p);
  if constexpr (kProbes) {
    if (p.run.parts > 1) MergePartsKernel<kD><<<p.run.tiles * p.run.kv_heads, 512, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace entropyserve::sm90
