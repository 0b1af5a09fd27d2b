// Two passes of 64 rows x 128 keys a step, scores only: (1) each row's softmax denominator, split
// over keys and merged; (2) weights, summed over rows and groups of 8 keys. A CTA is one warpgroup
// that computes and one warp that loads; two CTAs share an SM, so that one's products run beside
// the other's exponentials. Neighbouring CTAs work on the same keys of neighbouring segments: they
// come from L2.
#include "kernels/cuda/sm90/block_mass.h"

#include <cuda.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/sm90/ptx.cuh"
#include "kernels/cuda/sm90/tensor_map.h"
#include "kernels/cuda/sm90/wgmma.cuh"
#include "kernels/policy_params.h"

namespace entropyserve::sm90 {
namespace {

using cuda::MassItem;
using cuda::MassParams;

constexpr int kComputeThreads = 128;
constexpr int kThreads = kComputeThreads + 32;
constexpr int kRows = 64;      // rows of a step
constexpr int kKeys = 128;     // keys of a step: two pages
constexpr int kGroupKeys = 8;  // columns that one accumulator group holds; divides every bin
constexpr int kStages = 2;
// cuda::MassScratchBytes has room for one split per 4096 keys; a past and a turn run may each end
// in part of a step, so n splits hold up to 32 n + 1 steps.
constexpr int kSplitKeys = 4096;
constexpr int kSplitSteps = kSplitKeys / kKeys + 1;
constexpr int kRangeSteps = 32;  // of a CTA in the second pass
constexpr int kRangeGroups = kRangeSteps * kKeys / kGroupKeys;

struct KernelParams {
  CUtensorMap k_page;  // as AttentionKernelParams
  const MassItem* items;
  float2* partial;  // [items, splits, max_rows]: max (log2 units), sum of 2^(x - max)
  float* log_sums;  // [items, max_rows], log2
  float* mass;      // [items, mass_stride]
  int64_t mass_stride;
  int32_t max_rows;
  int32_t splits;
  int32_t groups;  // of kRows rows, of an item with max_rows
  float scale_log2;
};

template <int kD>
struct Smem {
  alignas(1024) uint8_t q[kRows * kD * 2];
  alignas(1024) uint8_t k[kStages][kKeys * kD * 2];
  float sums[4][kRangeGroups];  // second pass: of each warp's rows
  uint64_t full[kStages], empty[kStages];
};

// Steps [begin, end) over an item's runs: the past in steps of its own, then the turn.
struct Steps {
  int32_t past_steps;
  int32_t turn_keys;  // that exist
  int32_t begin, end;
};

__device__ int32_t Limit(const MassItem& item, int32_t row) {
  return item.first_limit + row / item.group * item.limit_step;
}

// First of the 8-token groups of page `half` of a step, in the pool; negative: the copy brings
// zeros.
__device__ int32_t PageGroup(const MassItem& item, const Steps& steps, int32_t step, int32_t half) {
  constexpr int32_t kGroups = kPageTokens / kGroupKeys;
  const bool in_past = step < steps.past_steps;
  const int32_t page = (in_past ? step : step - steps.past_steps) * (kKeys / kPageTokens) + half;
  if (page * kPageTokens >= (in_past ? item.past : steps.turn_keys)) return -kGroups;
  const int32_t turn_page = (item.past + kPageTokens - 1) / kPageTokens;
  return item.pages[in_past ? page : turn_page + page] * kGroups;
}

// The loading warp: keys of all steps, `repeats` times.
template <int kD>
__device__ void LoadKeys(Smem<kD>& s, const KernelParams& p, const MassItem& item,
                         const Steps& steps, int32_t repeats) {
  constexpr int kPageBytes = kPageTokens * kD * 2;
  constexpr int kAhead = 16;  // steps whose table entries one warp-wide load brings
  const int32_t lane = threadIdx.x % 32;
  uint32_t count = 0;
  for (int32_t repeat = 0; repeat < repeats; ++repeat) {
    for (int32_t first = steps.begin; first < steps.end; first += kAhead) {
      const int32_t step = first + lane / 2;
      const int32_t group = step < steps.end ? PageGroup(item, steps, step, lane % 2) : 0;
      for (int32_t i = 0; i < kAhead && first + i < steps.end; ++i, ++count) {
        const int32_t low = __shfl_sync(0xffffffff, group, 2 * i);
        const int32_t high = __shfl_sync(0xffffffff, group, 2 * i + 1);
        if (ElectOne()) {
          const uint32_t stage = count % kStages;
          BarrierWait(&s.empty[stage], count / kStages % 2 ^ 1);
          BarrierArriveExpect(&s.full[stage], 2 * kPageBytes);
          const uint32_t barrier = SmemAddress(&s.full[stage]), dst = SmemAddress(s.k[stage]);
          TensorCopy4D(dst, &p.k_page, barrier, 0, 0, 0, low);
          TensorCopy4D(dst + kPageBytes, &p.k_page, barrier, 0, 0, 0, high);
        }
        __syncwarp();
      }
    }
  }
}

// The computing warpgroup: rows [first, first + 64) into shared memory, zeros beyond the last.
template <int kD>
__device__ void LoadRows(Smem<kD>& s, const MassItem& item, int32_t first) {
  constexpr int kChunks = kD / 8;  // of 16 bytes in a row
  NamedSync(1, kComputeThreads);   // nobody's products read the rows before any more
  for (int32_t i = threadIdx.x; i < kRows * kChunks; i += kComputeThreads) {
    const int32_t at = i / kChunks, chunk = i % kChunks, row = first + at;
    uint4 value = {0, 0, 0, 0};
    if (row < item.rows) {
      const int64_t vector = int64_t{row / item.group} * item.q_stride + row % item.group;
      value = reinterpret_cast<const uint4*>(item.q)[vector * kChunks + chunk];
    }
    *reinterpret_cast<uint4*>(s.q + chunk / 8 * (kRows * 128) + at * 128 +
                              ((chunk ^ at) & 7) * 16) = value;
  }
  FenceAsyncProxy();
  NamedSync(1, kComputeThreads);
}

// Scores of the rows and the next step's keys. `count`: steps so far.
template <int kD>
__device__ void Multiply(Smem<kD>& s, uint32_t count, float (&scores)[64]) {
  const uint32_t stage = count % kStages;
  const uint64_t q = MakeDescriptor(SmemAddress(s.q), 16, 1024);
  const uint64_t k = MakeDescriptor(SmemAddress(s.k[stage]), 16, kGroupKeys * kD * 2);
  BarrierWait(&s.full[stage], count / kStages % 2);
  FenceRegisters(scores);
  WgmmaFence();
#pragma unroll
  for (int i = 0; i < kD / 16; ++i) {
    const uint64_t a = Advance(q, i / 4 * (kRows * 128) + i % 4 * 32);
    const uint64_t b = Advance(k, i / 4 * 1024 + i % 4 * 32);
    if (i == 0)
      WgmmaQK<false>(scores, a, b);
    else
      WgmmaQK<true>(scores, a, b);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  FenceRegisters(scores);
  if (threadIdx.x % 32 == 0) BarrierArrive(&s.empty[stage]);
}

template <int kD>
__device__ void InitBarriers(Smem<kD>& s) {
  if (threadIdx.x == 0) {
    if (SmemAddress(&s) % 1024 != 0) __trap();  // descriptors count on it
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&s.full[i], 1);
      BarrierInit(&s.empty[i], kComputeThreads / 32);
    }
    FenceBarrierInit();
  }
  __syncthreads();
}

// One step of the running maximum and sum of this thread's two rows; columns >= limit take no part.
__device__ void AddStep(float (&scores)[64], const int32_t (&limit)[2], float scale,
                        float (&top)[2], float (&sum)[2]) {
  const int32_t column = threadIdx.x % 4 * 2;
  if (__any_sync(0xffffffff, min(limit[0], limit[1]) < kKeys)) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (column + i / 4 * 8 + (i & 1) >= limit[i / 2 % 2]) scores[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float higher = top[r];
#pragma unroll
    for (int j = 0; j < 16; ++j)
      higher = fmaxf(higher, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
    const float shift = higher == -INFINITY ? 0 : higher * scale;  // no key yet: all weights are 0
    float added = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j)
      added += Exp2(fmaf(scores[4 * j + 2 * r], scale, -shift)) +
               Exp2(fmaf(scores[4 * j + 2 * r + 1], scale, -shift));
    sum[r] = sum[r] * Exp2(fmaf(top[r], scale, -shift)) + added;
    top[r] = higher;
  }
}

// Grid: (items, row groups, splits).
template <int kD>
__global__ void __launch_bounds__(kThreads, 2)
    DenominatorKernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  Smem<kD>& s = *reinterpret_cast<Smem<kD>*>(raw);
  const MassItem item = p.items[blockIdx.x];
  const int32_t first = blockIdx.y * kRows;
  if (first >= item.rows) return;
  const int32_t last = min(first + kRows, item.rows) - 1;
  Steps steps;
  steps.past_steps = (item.past + kKeys - 1) / kKeys;
  steps.turn_keys = Limit(item, last) - item.past;
  steps.begin = blockIdx.z * kSplitSteps;
  steps.end =
      min(steps.begin + kSplitSteps, steps.past_steps + (steps.turn_keys + kKeys - 1) / kKeys);
  InitBarriers(s);
  if (threadIdx.x >= kComputeThreads) return LoadKeys(s, p, item, steps, 1);

  LoadRows(s, item, first);
  const int32_t lane = threadIdx.x % 32, row = first + threadIdx.x / 32 * 16 + lane / 4;
  const int32_t seen[2] = {Limit(item, min(row, last)) - item.past,
                           Limit(item, min(row + 8, last)) - item.past};  // of the turn
  float scores[64], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int32_t step = steps.begin; step < steps.end; ++step) {
    Multiply(s, step - steps.begin, scores);
    const bool in_past = step < steps.past_steps;
    const int32_t before = (in_past ? step : step - steps.past_steps) * kKeys;
    const int32_t limit[2] = {(in_past ? item.past : seen[0]) - before,
                              (in_past ? item.past : seen[1]) - before};
    AddStep(scores, limit, p.scale_log2, top, sum);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = top[r] * p.scale_log2;
    for (int offset = 1; offset < 4; offset *= 2) {  // the four threads of a row, pairwise
      const float other_high = __shfl_xor_sync(0xffffffff, high, offset);
      const float other_sum = __shfl_xor_sync(0xffffffff, sum[r], offset);
      const float higher = fmaxf(high, other_high);
      if (higher > -INFINITY)
        sum[r] = sum[r] * Exp2(high - higher) + other_sum * Exp2(other_high - higher);
      high = higher;
    }
    if (lane % 4 == 0 && row + 8 * r <= last)
      p.partial[(int64_t{blockIdx.x} * p.splits + blockIdx.z) * p.max_rows + row + 8 * r] = {
          high, sum[r]};
  }
}

// Grid: (items, rows / blockDim.x). Splits without keys hold (-inf, 0).
__global__ void MergeKernel(const __grid_constant__ KernelParams p) {
  const int32_t row = blockIdx.y * blockDim.x + threadIdx.x;
  if (row >= p.items[blockIdx.x].rows) return;
  const float2* parts = p.partial + int64_t{blockIdx.x} * p.splits * p.max_rows + row;
  float high = -INFINITY, sum = 0;
  for (int32_t i = 0; i < p.splits; ++i) high = fmaxf(high, parts[int64_t{i} * p.max_rows].x);
  for (int32_t i = 0; i < p.splits; ++i) {
    const float2 part = parts[int64_t{i} * p.max_rows];
    sum += part.y * exp2f(part.x - high);
  }
  p.log_sums[int64_t{blockIdx.x} * p.max_rows + row] = high + log2f(sum);
}

// Sums over the warp's 16 rows of the 16 groups of 8 columns; lane 2 g (and 2 g + 1) gets group
// g's.
__device__ float SumGroups(const float (&weights)[64]) {
  const int32_t lane = threadIdx.x % 32;
  float v[16];
#pragma unroll
  for (int g = 0; g < 16; ++g)
    v[g] = (weights[4 * g] + weights[4 * g + 1]) + (weights[4 * g + 2] + weights[4 * g + 3]);
#pragma unroll
  for (int level = 0; level < 4;
       ++level) {  // each lane keeps half of its groups, its partner the others
    const int half = 8 >> level;
    const bool upper = lane & (2 * half);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= half) continue;
      const float keep = upper ? v[i + half] : v[i], send = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(0xffffffff, send, 2 * half);
    }
  }
  return v[0] + __shfl_xor_sync(0xffffffff, v[0], 1);
}

// Grid: (items, ranges of the turn's visible keys).
template <int kD>
__global__ void __launch_bounds__(kThreads, 2) MassKernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  Smem<kD>& s = *reinterpret_cast<Smem<kD>*>(raw);
  const MassItem item = p.items[blockIdx.x];
  Steps steps;
  steps.past_steps = (item.past + kKeys - 1) / kKeys;
  steps.turn_keys = item.bins * item.bin_size;
  const int32_t range = blockIdx.y * kRangeSteps;  // within the turn
  const int32_t turn_steps = (steps.turn_keys + kKeys - 1) / kKeys;
  if (item.rows == 0 || range >= turn_steps) return;
  steps.begin = steps.past_steps + range;
  steps.end = steps.past_steps + min(range + kRangeSteps, turn_steps);
  const int32_t row_groups = (item.rows + kRows - 1) / kRows;
  InitBarriers(s);
  if (threadIdx.x >= kComputeThreads) return LoadKeys(s, p, item, steps, row_groups);

  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* log_sums = p.log_sums + int64_t{blockIdx.x} * p.max_rows;
  float scores[64];
  uint32_t count = 0;
  for (int32_t first = 0; first < item.rows; first += kRows) {
    LoadRows(s, item, first);
    const int32_t row = first + warp * 16 + lane / 4;
    const float shift[2] = {row < item.rows ? log_sums[row] : INFINITY,
                            row + 8 < item.rows ? log_sums[row + 8] : INFINITY};
    for (int32_t step = steps.begin; step < steps.end; ++step, ++count) {
      Multiply(s, count, scores);
#pragma unroll
      for (int i = 0; i < 64; ++i)
        scores[i] = Exp2(fmaf(scores[i], p.scale_log2, -shift[i / 2 % 2]));
      const float sum = SumGroups(scores);
      float* total = &s.sums[warp][(step - steps.begin) * (kKeys / kGroupKeys) + lane / 2];
      if (lane % 2 == 0) *total = first == 0 ? sum : *total + sum;
    }
  }
  NamedSync(1, kComputeThreads);
  const int32_t per_bin = item.bin_size / kGroupKeys;
  const int32_t first_bin = range * kKeys / item.bin_size;
  const int32_t bins = min(item.bins - first_bin, kRangeGroups / per_bin);
  for (int32_t bin = threadIdx.x; bin < bins; bin += kComputeThreads) {
    float sum = 0;
    for (int32_t g = bin * per_bin; g < (bin + 1) * per_bin; ++g)
      sum += (s.sums[0][g] + s.sums[1][g]) + (s.sums[2][g] + s.sums[3][g]);
    p.mass[int64_t{blockIdx.x} * p.mass_stride + first_bin + bin] = sum / float(item.rows);
  }
}

template <int kD>
cudaError_t Run(const KernelParams& k, const MassParams& p, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Smem<kD>);
  for (const auto kernel : {DenominatorKernel<kD>, MassKernel<kD>}) {
    if (cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
        e != cudaSuccess)
      return e;
  }
  const unsigned items = unsigned(p.num_items);
  constexpr int kMergeThreads = 128;
  DenominatorKernel<kD><<<dim3(items, k.groups, k.splits), kThreads, kBytes, stream>>>(k);
  MergeKernel<<<dim3(items, (p.max_rows + kMergeThreads - 1) / kMergeThreads), kMergeThreads, 0,
                stream>>>(k);
  const unsigned ranges = (p.max_keys + kRangeSteps * kKeys - 1) / (kRangeSteps * kKeys);
  MassKernel<kD><<<dim3(items, ranges), kThreads, kBytes, stream>>>(k);
  return cudaGetLastError();
}

}  // namespace

size_t BlockMassScratchBytes(int64_t items, int64_t max_rows, int64_t max_keys) {
  const int64_t splits = (max_keys + kSplitKeys - 1) / kSplitKeys;
  return size_t(items * max_rows) * (size_t(splits) * sizeof(float2) + sizeof(float));
}

cudaError_t LaunchBlockMass(const MassParams& p, cudaStream_t stream) {
  if (p.num_items == 0 || p.max_rows == 0 || p.max_bins == 0) return cudaSuccess;
  if (p.dtype != DType::kBF16 || (p.head_dim != 64 && p.head_dim != 128))
    return cudaErrorInvalidValue;
  KernelParams k = {};
  // The pool's size is not known here, nor needed: page numbers are valid, or negative.
  constexpr int64_t kAnyPages = int64_t{1} << 27;
  if (!EncodePages(&k.k_page, p.pool_k, p.head_dim, kAnyPages, kPageTokens / kGroupKeys))
    return cudaErrorInvalidValue;
  k.items = p.items;
  k.splits = (p.max_keys + kSplitKeys - 1) / kSplitKeys;
  k.partial = static_cast<float2*>(p.scratch);
  k.log_sums = reinterpret_cast<float*>(k.partial + int64_t{p.num_items} * k.splits * p.max_rows);
  k.mass = p.mass;
  k.mass_stride = p.mass_stride;
  k.max_rows = p.max_rows;
  k.groups = (p.max_rows + kRows - 1) / kRows;
  k.scale_log2 = float(M_LOG2E / std::sqrt(double(p.head_dim)));
  return p.head_dim == 128 ? Run<128>(k, p, stream) : Run<64>(k, p, stream);
}

}  // namespace entropyserve::sm90
