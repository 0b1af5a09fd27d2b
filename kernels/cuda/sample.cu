#include <cfloat>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/topk.cuh"
#include "kernels/cuda/vec.cuh"
#include "kernels/noise.h"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = kTopKThreads;
constexpr uint32_t kInSession = 1u << 31;  // of SampleRow::history
constexpr float kFixedPoint =
    1099511627776.0f;  // 2^40: sums of 2^18 values up to 1 stay exact in 64 bits

// Calls body(i, load(i)) for i < n, several loads in flight. All threads of the block.
template <typename Load, typename Body>
__device__ __forceinline__ void ForEach(int64_t n, Load load, Body body) {
  constexpr int kBatch = 8;
  for (int64_t base = threadIdx.x; base < n; base += kBatch * kThreads) {
    float x[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      x[u] = base + u * kThreads < n ? load(base + u * kThreads) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (base + u * kThreads < n) body(base + u * kThreads, x[u]);
    }
  }
}
// The same over x[0..n), 16 bytes a load where x is aligned: one block alone must keep enough of
// them in flight.
template <typename Body>
__device__ __forceinline__ void ForEachOf(const float* x, int64_t n, Body body) {
  const int64_t vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? n / 4 : 0;
  constexpr int kBatch = 4;
  for (int64_t base = threadIdx.x; base < vectors; base += kBatch * kThreads) {
    float4 v[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < vectors) v[u] = reinterpret_cast<const float4*>(x)[i];
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t i = base + u * kThreads;
      if (i >= vectors) continue;
      body(4 * i, v[u].x);
      body(4 * i + 1, v[u].y);
      body(4 * i + 2, v[u].z);
      body(4 * i + 3, v[u].w);
    }
  }
  const float* const rest = x + 4 * vectors;
  ForEach(
      n - 4 * vectors, [=](int64_t i) { return rest[i]; },
      [&](int64_t i, float y) { body(4 * vectors + i, y); });
}

struct Shared {
  TopKShared topk;
  float reduce[33];
  double warp_double[32];
  double total_double;
  unsigned long long warp_mass[33];
  int32_t top_ids[kMaxTopLogprobs];
  float top_values[kMaxTopLogprobs];
  int32_t token;
};

__device__ double BlockSumDouble(double x, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (threadIdx.x % 32 == 0) shared.warp_double[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += shared.warp_double[w];
    shared.total_double = sum;
  }
  __syncthreads();
  return shared.total_double;
}

__device__ float Penalize(const SampleRow& row, float x, uint32_t history) {
  x = x > 0 ? x / row.repetition : x * row.repetition;
  x = fminf(x, FLT_MAX);  // a tiny penalty must not make it infinite
  const uint32_t count = history & ~kInSession;
  if (count > 0) x -= row.presence + row.frequency * float(count);
  return x;
}

// Writes the adjusted logits; returns the largest.
__device__ float Adjust(const SampleRow& row, const float* raw, int64_t vocab, float* adjusted,
                        Shared& shared) {
  const bool penalties =
      row.history && (row.repetition != 1 || row.presence != 0 || row.frequency != 0);
  const auto adjust = [=](int64_t i) {
    const uint32_t history = penalties ? row.history[i] : 0;
    return history != 0 ? Penalize(row, raw[i], history) : raw[i];
  };
  float high = -INFINITY;
  ForEach(vocab, adjust, [&](int64_t i, float x) {
    adjusted[i] = x;
    high = fmaxf(high, x);
  });
  if (row.num_banned > 0) {
    __syncthreads();
    for (int32_t i = threadIdx.x; i < row.num_banned; i += kThreads)
      adjusted[row.banned[i]] = -INFINITY;
    __syncthreads();
    high = -INFINITY;
    ForEachOf(adjusted, vocab, [&](int64_t, float x) { high = fmaxf(high, x); });
  }
  return BlockMax(high, shared.reduce);  // a barrier: `adjusted` is complete
}

// The lowest id whose value is `value`.
__device__ int32_t FirstEqual(const float* x, int64_t n, float value, Shared& shared) {
  if (threadIdx.x == 0) shared.token = INT32_MAX;
  __syncthreads();
  ForEachOf(x, n, [&](int64_t i, float y) {
    if (y == value) atomicMin(&shared.token, int32_t(i));
  });
  __syncthreads();
  return shared.token;
}

__device__ __forceinline__ unsigned long long Mass(float weight) {
  return (unsigned long long)(weight * kFixedPoint);
}

// Sets x to `dropped` where an element is not among the best; keys reads x.
template <typename Keys>
__device__ void DropOthers(Keys keys, const Threshold& best, int64_t n, float* x, float dropped,
                           Shared& shared) {
  if (threadIdx.x == 0) shared.token = -1;
  __syncthreads();
  ForChosen(keys, n, best, shared.topk, [&](int32_t, int32_t i, uint32_t key) {
    if (key == best.key) atomicMax(&shared.token, i);
  });
  __syncthreads();
  const int32_t last_tie = shared.token;  // ties after it have no place
  ForEachKey(keys, n, [&](uint32_t key, int64_t i, bool valid) {
    if (valid && (key < best.key || (key == best.key && i > last_tie))) x[i] = dropped;
  });
  __syncthreads();
}

// What can still be drawn: `count` weights and their ids (null: the position is the id), ids
// ascending.
struct Candidates {
  float* x;
  int32_t* ids;
  int64_t count;
};

// Keeps the best k, at the front: all that follows reads only these.
__device__ void KeepTopK(int32_t k, Candidates* c, int32_t* ids, Shared& shared) {
  float* const x = c->x;
  const auto keys = [=](int64_t i) { return OrderedKey(x[i]); };
  const Threshold best = FindThreshold(keys, c->count, k, shared.topk);
  ForChosen(keys, c->count, best, shared.topk, [&](int32_t position, int32_t i, uint32_t key) {
    x[position] = FloatOfKey(key);
    ids[position] = i;
  });
  __syncthreads();
  c->ids = ids;
  c->count = k;
}

// Turns adjusted logits into weights e^((x - high) / temperature), 0 for what min-p drops.
__device__ void Weigh(const SampleRow& row, float high, const Candidates& c) {
  const float temperature = row.temperature, min_p = row.min_p;
  float* const x = c.x;
  ForEachOf(x, c.count, [&](int64_t i, float logit) {
    const float weight = expf((logit - high) / temperature);
    x[i] = min_p > 0 && weight < min_p ? 0.0f : weight;
  });
  __syncthreads();
}

__device__ unsigned long long TotalMass(const float* weights, int64_t n, Shared& shared) {
  unsigned long long sum = 0;
  ForEachOf(weights, n, [&](int64_t, float weight) { sum += Mass(weight); });
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) shared.warp_mass[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += shared.warp_mass[w];
    shared.warp_mass[32] = total;
  }
  __syncthreads();
  return shared.warp_mass[32];
}

// Zeroes all but the shortest list of best weights whose mass reaches top_p of the whole.
__device__ void CutToTopP(float top_p, int64_t vocab, float* weights, Shared& shared) {
  const unsigned long long total = TotalMass(weights, vocab, shared);
  const auto target = (unsigned long long)(double(top_p) * double(total));
  const auto keys = [&](int64_t i) { return __float_as_uint(weights[i]); };  // weights are >= 0
  // Weights below this floor do not make up the rest together: the list does not need them.
  const unsigned long long floor = (total - target) / (unsigned long long)vocab;
  const auto masses = [&](int64_t i) {
    const unsigned long long mass = Mass(weights[i]);
    return mass >= floor ? mass : 0;
  };
  const Threshold best = FindMassThreshold(keys, masses, vocab, max(target, 1ull), shared.topk);
  DropOthers(keys, best, vocab, weights, 0.0f, shared);
}

// By inversion, in the order of ids: the warps sum pieces of a range, the piece that holds the
// drawn mass is the next range, until one warp can walk through it.
__device__ int32_t Pick(const SampleRow& row, const float* weights, int64_t vocab, Shared& shared) {
  constexpr int kWarps = kThreads / 32;
  constexpr int64_t kWalk = 128;  // ids
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t low = 0, high = vocab;
  unsigned long long before = 0, target = 0;
  for (bool first = true; first || high - low > kWalk; first = false) {
    const int64_t span = (high - low + kWarps * 32 - 1) / (kWarps * 32) * 32;
    const int64_t begin = min(high, low + warp * span), end = min(high, begin + span);
    unsigned long long sum = 0;
#pragma unroll 8
    for (int64_t i = begin + lane; i < end; i += 32) sum += Mass(weights[i]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    __syncthreads();
    if (lane == 0) shared.warp_mass[warp] = sum;
    __syncthreads();
    if (first) {
      unsigned long long total = 0;
      for (int w = 0; w < kWarps; ++w) total += shared.warp_mass[w];
      target = (unsigned long long)(double(SampleNoise(row.seed, row.position)) * double(total));
    }
    int piece = 0;
    while (piece + 1 < kWarps && before + shared.warp_mass[piece] <= target) {
      before += shared.warp_mass[piece++];
    }
    low = min(high, low + piece * span);
    high = min(high, low + span);
  }
  if (warp == 0) {
    for (int64_t base = low; base < high; base += 32) {
      const int64_t i = base + lane;
      unsigned long long mass = i < high ? Mass(weights[i]) : 0;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned long long other = __shfl_up_sync(~0u, mass, offset);
        if (lane >= offset) mass += other;
      }
      const unsigned past = __ballot_sync(~0u, before + mass > target);
      if (past) {
        if (lane == 0) shared.token = int32_t(base + __ffs(past) - 1);
        break;
      }
      before += __shfl_sync(~0u, mass, 31);
    }
  }
  __syncthreads();
  return shared.token;
}

__device__ int32_t Choose(const SampleRow& row, const float* raw, int64_t vocab, float* adjusted,
                          int32_t* ids, float raw_high, Shared& shared) {
  if (row.temperature <= 0 && !row.history && row.num_banned == 0) {
    return FirstEqual(raw, vocab, raw_high, shared);
  }
  const float high = Adjust(row, raw, vocab, adjusted, shared);
  if (row.temperature <= 0 || high == -INFINITY) return FirstEqual(adjusted, vocab, high, shared);
  Candidates c = {adjusted, nullptr, vocab};
  if (row.top_k > 0 && row.top_k < vocab) KeepTopK(row.top_k, &c, ids, shared);
  Weigh(row, high, c);
  if (row.top_p < 1) CutToTopP(row.top_p, c.count, c.x, shared);
  const int32_t position = Pick(row, c.x, c.count, shared);
  return c.ids ? c.ids[position] : position;
}

// The best raw logits, sorted, as logprobs.
__device__ void TopLogprobs(int32_t wanted, const float* raw, int64_t vocab, double log_sum,
                            SampleResult* result, Shared& shared) {
  const int32_t k = int32_t(min(int64_t{min(wanted, kMaxTopLogprobs)}, vocab));
  const auto keys = [&](int64_t i) { return OrderedKey(raw[i]); };
  const Threshold best = FindThreshold(keys, vocab, k, shared.topk);
  ForChosen(keys, vocab, best, shared.topk, [&](int32_t position, int32_t i, uint32_t) {
    shared.top_ids[position] = i;
    shared.top_values[position] = raw[i];
  });
  __syncthreads();
  if (int(threadIdx.x) < k) {  // ids ascend, so an equal value with a lower position comes first
    const float own = shared.top_values[threadIdx.x];
    int rank = 0;
    for (int j = 0; j < k; ++j) {
      rank += shared.top_values[j] > own || (shared.top_values[j] == own && j < int(threadIdx.x));
    }
    result->top_ids[rank] = shared.top_ids[threadIdx.x];
    result->top_logprobs[rank] = float(double(own) - log_sum);
  }
  if (threadIdx.x == 0) result->num_top = k;
}

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleLaunch p) {
  __shared__ Shared shared;
  const SampleRow& row = p.rows[blockIdx.x];
  const float* const raw = p.logits + int64_t{row.logits_row} * p.vocab;
  SampleResult* const result = p.results + blockIdx.x;
  float high = -INFINITY;
  bool broken = false;
  ForEachOf(raw, p.vocab, [&](int64_t, float x) {
    broken |= !(x <= FLT_MAX);  // NaN or +inf; -inf is allowed
    high = fmaxf(high, x);
  });
  broken = __syncthreads_or(broken);
  high = BlockMax(high, shared.reduce);
  if (threadIdx.x == 0) {
    *result = SampleResult{};
    result->finite = !broken && high > -INFINITY;
    result->token = row.forced >= 0 ? row.forced : 0;
  }
  if (broken || high == -INFINITY) return;

  double sum = 0;
  ForEachOf(raw, p.vocab, [&](int64_t, float x) { sum += double(expf(x - high)); });
  const double log_sum = log(BlockSumDouble(sum, shared)) + double(high);
  const int32_t token = row.forced >= 0
                            ? row.forced
                            : Choose(row, raw, p.vocab, p.adjusted + int64_t{blockIdx.x} * p.vocab,
                                     p.ids + int64_t{blockIdx.x} * p.vocab, high, shared);
  if (threadIdx.x == 0) {
    result->token = token;
    result->logprob = float(double(raw[token]) - log_sum);
  }
  __syncthreads();
  if (row.logprobs > 0) TopLogprobs(row.logprobs, raw, p.vocab, log_sum, result, shared);
}

}  // namespace

void LaunchSample(const SampleLaunch& p, cudaStream_t stream) {
  if (p.n == 0) return;
  SampleKernel<<<unsigned(p.n), kThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
