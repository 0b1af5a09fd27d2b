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

inline constexpr uint32_t kEverything = ~0u;

// The float that an OrderedKey was made of (a NaN's is -inf).
__device__ __forceinline__ float FloatOfKey(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

struct TopKShared {
  uint32_t counts[256];
  unsigned long long masses[256];
  uint32_t warp_sums[33];
  uint32_t prefix, above, bin;  // of a digit's round
  unsigned long long mass_above;
};

// Calls each(key, i, valid) for keys(i), i < n, several loads in flight. All threads of the block;
// whole warps call together, lanes beyond n with valid == false.
template <typename Keys, typename Each>
__device__ __forceinline__ void ForEachKey(Keys keys, int64_t n, Each each) {
  constexpr int kBatch = 8;
  for (int64_t base = 0; base < n; base += int64_t{kBatch} * blockDim.x) {
    uint32_t key[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t i = base + int64_t{u} * blockDim.x + threadIdx.x;
      key[u] = i < n ? keys(i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t i = base + int64_t{u} * blockDim.x + threadIdx.x;
      each(key[u], i, i < n);
    }
  }
}

// Adds 1 to counts[bin] for the valid lanes; lanes with one bin add together. Leading digits take
// few values: without this, a warp's additions would queue for one address. The whole warp, without
// divergence: lanes that went their own way here would not meet again before the next call.
__device__ __forceinline__ void CountTogether(uint32_t* counts, uint32_t bin, bool valid) {
  const int lane = threadIdx.x % 32;
  unsigned todo = __ballot_sync(~0u, valid);
  while (todo) {
    const int leader = __ffs(todo) - 1;
    const uint32_t first = __shfl_sync(~0u, bin, leader);
    const unsigned same = __ballot_sync(~0u, valid && bin == first);
    if (lane == leader) atomicAdd(&counts[first], uint32_t(__popc(same)));
    todo &= ~same;
  }
}

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
    if (shift == 24) {
      ForEachKey(keys, n, [&](uint32_t key, int64_t, bool valid) {
        CountTogether(shared.counts, key >> 24, valid);
      });
    } else {
      ForEachKey(keys, n, [&](uint32_t key, int64_t, bool valid) {
        if (valid && key >> (shift + 8) == prefix)
          atomicAdd(&shared.counts[key >> shift & 255], 1u);
      });
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
// elements at the threshold. masses(i): fixed point, so that sums are exact; elements without mass
// are passed over. Every element when the whole mass is less than target.
template <typename Keys, typename Masses>
__device__ Threshold FindMassThreshold(Keys keys, Masses masses, int64_t n,
                                       unsigned long long target, TopKShared& shared) {
  uint32_t prefix = 0, tied = 0, all_above = 0;
  unsigned long long left = target, tied_mass = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) shared.counts[i] = 0, shared.masses[i] = 0;
    __syncthreads();
    ForEachKey(keys, n, [&](uint32_t key, int64_t i, bool valid) {
      if (!valid) return;
      if (shift != 24 && key >> (shift + 8) != prefix) return;
      const unsigned long long mass = masses(i);
      if (mass == 0) return;
      atomicAdd(&shared.counts[key >> shift & 255], 1u);
      atomicAdd(&shared.masses[key >> shift & 255], mass);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      int b = 255;
      unsigned long long above = 0;
      uint32_t counted = 0;
      for (; b >= 0 && above + shared.masses[b] < left; --b) {
        above += shared.masses[b], counted += shared.counts[b];
      }
      shared.bin = uint32_t(max(b, 0));
      shared.mass_above = above;
      shared.above = b < 0 ? kEverything : counted;
    }
    __syncthreads();
    if (shared.above == kEverything) return {0, int32_t(n), 0};  // in the first round only
    prefix = prefix << 8 | shared.bin;
    left -= shared.mass_above;
    all_above += shared.above;
    tied = shared.counts[shared.bin];
    tied_mass = shared.masses[shared.bin];
    __syncthreads();
  }
  // All tied elements have one key and, for what this serves, one mass.
  const unsigned long long each = max(tied_mass / tied, 1ull);
  const unsigned long long ties = min((unsigned long long)tied, (left + each - 1) / each);
  return {prefix, int32_t(ties), int32_t(all_above)};
}

// Calls take(position, i, key) for the chosen elements; positions ascend with i. A tile's keys are
// read before any of it is taken: `take` may write at `position` where keys() reads. All threads of
// the block.
template <typename Keys, typename Take>
__device__ void ForChosen(Keys keys, int64_t n, const Threshold& threshold, TopKShared& shared,
                          Take take) {
  constexpr int kPer = 8;  // consecutive elements of a thread
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t quota = uint32_t(threshold.ties);
  uint32_t ties_before = 0, above_before = 0;  // of earlier tiles
  for (int64_t base = 0; base < n; base += int64_t{kPer} * blockDim.x) {
    const int64_t first = base + int64_t{kPer} * threadIdx.x;
    uint32_t key[kPer],
        own = 0;  // counts: above the threshold in the low half, ties in the high half
#pragma unroll
    for (int u = 0; u < kPer; ++u) {
      const bool valid = first + u < n;
      key[u] = valid ? keys(first + u) : 0;
      own += valid && key[u] > threshold.key ? 1u : 0u;
      own += valid && key[u] == threshold.key ? 1u << 16 : 0u;
    }
    uint32_t sum = own;  // inclusive, over the warp
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == 31) shared.warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      const uint32_t of_warp = lane < warps ? shared.warp_sums[lane] : 0;
      uint32_t until = of_warp;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, until, offset);
        if (lane >= offset) until += other;
      }
      shared.warp_sums[lane] = until - of_warp;
      if (lane == 31) shared.warp_sums[32] = until;
    }
    __syncthreads();
    const uint32_t before = shared.warp_sums[warp] + sum - own, tile = shared.warp_sums[32];
    uint32_t above = above_before + (before & 0xffff), ties = ties_before + (before >> 16);
    if (own != 0) {
#pragma unroll
      for (int u = 0; u < kPer; ++u) {
        if (first + u >= n || key[u] < threshold.key) continue;
        const bool tie = key[u] == threshold.key;
        if (!tie || ties < quota)
          take(int32_t(above + min(ties, quota)), int32_t(first + u), key[u]);
        tie ? ++ties : ++above;
      }
    }
    above_before += tile & 0xffff;
    ties_before += tile >> 16;
    __syncthreads();
  }
}

}  // namespace entropyserve::cuda
