// The best k of n floats by one block of threads: radix select, ties to the lower index, result
// ascending by index. Nothing depends on the order in which threads run.
#pragma once

#include <cstdint>

namespace entropyserve::cuda {

inline constexpr int kTopKThreads = 1024;

// Order of floats as order of integers; -0 equals 0, a NaN counts as -inf. Never 0.
__device__ __forceinline__ uint32_t OrderedKey(float x) {
  if (x != x) x = __int_as_float(0xff800000);
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

struct TopKShared {
  uint32_t counts[256];
  unsigned long long masses[256];
  uint32_t warp_sums[33];
  uint32_t prefix, above, bin;
  unsigned long long mass_above;
};

// Elements with key > key are in; of those with key == key, the first `ties`.
struct Threshold {
  uint32_t key;
  int32_t ties;
  int32_t above = 0;  // how many have key > key; FindMassThreshold only
};

// Of keys(i), i < n, the threshold of the best k >= 1 (k <= n). All threads of the block.
template <typename Keys>
__device__ Threshold FindThreshold(Keys keys, int64_t n, int32_t k, TopKShared& shared) {
  uint32_t prefix = 0, left = uint32_t(k);
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared.counts[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t key = keys(i);
      if (shift == 24 || key >> (shift + 8) == prefix) {
        atomicAdd(&shared.counts[key >> shift & 255], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l looks at bins 255 - 8l down to 248 - 8l
      const int first = 255 - 8 * int(threadIdx.x);
      uint32_t own = 0;
      for (int b = 0; b < 8; ++b) own += shared.counts[first - b];
      uint32_t before = own;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, before, offset);
        if (int(threadIdx.x) >= offset) before += other;
      }
      before -= own;
      if (before < left && before + own >= left) {
        int b = 0;
        while (before + shared.counts[first - b] < left) before += shared.counts[first - b++];
        shared.prefix = prefix << 8 | uint32_t(first - b);
        shared.above = before;
      }
    }
    __syncthreads();
    prefix = shared.prefix;
    left -= shared.above;
    __syncthreads();
  }
  return {prefix, int32_t(left)};
}

// The shortest list of best keys whose mass reaches `target`: its threshold, ties = how many of the
// elements at the threshold. mass(i): fixed point, so that sums are exact. Everything when the
// whole mass is less than target.
template <typename Keys, typename Masses>
__device__ Threshold FindMassThreshold(Keys keys, Masses masses, int64_t n,
                                       unsigned long long target, TopKShared& shared) {
  uint32_t prefix = 0;
  unsigned long long left = target;
  uint32_t tied = 0, all_above = 0;
  unsigned long long tied_mass = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared.counts[i] = 0, shared.masses[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const uint32_t key = keys(i);
      if (shift == 24 || key >> (shift + 8) == prefix) {
        atomicAdd(&shared.counts[key >> shift & 255], 1u);
        atomicAdd(&shared.masses[key >> shift & 255], masses(i));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int b = 255, last = -1;
      unsigned long long above = 0, above_last = 0;
      uint32_t counted = 0, counted_last = 0;
      for (; b >= 0; --b) {
        if (shared.counts[b] == 0) continue;
        last = b, above_last = above, counted_last = counted;
        if (above + shared.masses[b] >= left) break;
        above += shared.masses[b], counted += shared.counts[b];
      }
      shared.prefix = prefix << 8 | uint32_t(last < 0 ? 0 : last);
      shared.mass_above = above_last;
      shared.bin = uint32_t(last < 0 ? 0 : last);
      shared.above = counted_last;
    }
    __syncthreads();
    prefix = shared.prefix;
    left -= shared.mass_above;
    all_above += shared.above;
    tied = shared.counts[shared.bin];
    tied_mass = shared.masses[shared.bin];
    __syncthreads();
  }
  // All tied elements have one key and, for what this serves, one mass.
  const unsigned long long each = tied > 0 ? tied_mass / tied : 0;
  uint32_t ties = tied;
  if (each > 0) ties = uint32_t(min((unsigned long long)tied, (left + each - 1) / each));
  return {prefix, int32_t(max(ties, 1u)), int32_t(all_above)};
}

// Calls take(position, i) for the chosen elements, ascending by i. All threads of the block.
template <typename Keys, typename Take>
__device__ void ForChosen(Keys keys, int64_t n, const Threshold& threshold, TopKShared& shared,
                          Take take) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t ties_before = 0, taken_before = 0;
  // A tile's sums: chosen above the threshold in the low half, ties in the high half.
  for (int64_t base = 0; base < n; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const uint32_t key = i < n ? keys(i) : 0;
    const bool above = i < n && key > threshold.key, tie = i < n && key == threshold.key;
    const unsigned above_mask = __ballot_sync(~0u, above), tie_mask = __ballot_sync(~0u, tie);
    if (lane == 0)
      shared.warp_sums[warp] = uint32_t(__popc(above_mask)) | uint32_t(__popc(tie_mask)) << 16;
    __syncthreads();
    if (warp == 0) {
      const uint32_t own = lane < warps ? shared.warp_sums[lane] : 0;
      uint32_t sum = own;
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
      }
      shared.warp_sums[lane] = sum - own;
      if (lane == 31) shared.warp_sums[32] = sum;
    }
    __syncthreads();
    const unsigned before = (1u << lane) - 1;
    const uint32_t start = shared.warp_sums[warp], tile = shared.warp_sums[32];
    const uint32_t tie_rank = ties_before + (start >> 16) + __popc(tie_mask & before);
    const uint32_t quota = uint32_t(threshold.ties);
    if (above || (tie && tie_rank < quota)) {
      const uint32_t above_rank = taken_before + (start & 0xffff) + __popc(above_mask & before);
      take(int32_t(above_rank + min(tie_rank, quota)), int32_t(i));
    }
    taken_before += tile & 0xffff;
    ties_before += tile >> 16;
    __syncthreads();
  }
}

}  // namespace entropyserve::cuda
