// Attention of one query by one warp, fp32 throughout: lane = key for the scores, lane = channel
// for the values.
#pragma once

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {

inline constexpr int kMaxDim = 256;

// A softmax-weighted sum that is not divided by `sum` yet. o: this lane's channels lane, lane
// + 32...
struct WarpOutput {
  float high = -INFINITY;  // largest score
  float sum = 0;           // of e^(score - high)
  float o[kMaxDim / 32] = {};
};

// Tiles `first`, first + step, ... of 32 keys each, of keys [0, total) of `list`. q: shared,
// head_dim floats.
template <typename T>
__device__ __forceinline__ void AttendKeys(const KeyList& list, int32_t first, int32_t step,
                                           int32_t total, const T* pool_k, const T* pool_v,
                                           const float* q, int dim, WarpOutput* out) {
  const int lane = threadIdx.x % 32;
  const float scale = rsqrtf(float(dim));
  for (int32_t begin = first * 32; begin < total; begin += step * 32) {
    const int32_t key = begin + lane;
    const int32_t row = list.PoolRow(list.Slot(min(key, total - 1)));
    float score = 0;
    for (int c = 0; c < dim; c += 8) {
      float k[8];
      Load8(pool_k + int64_t{row} * dim + c, k);
#pragma unroll
      for (int e = 0; e < 8; ++e) score += q[c + e] * k[e];
    }
    score = key < total ? score * scale : -INFINITY;
    const float now = fmaxf(out->high, WarpMax(score));
    const float keep = expf(out->high - now), p = expf(score - now);
    out->high = now;
    out->sum = out->sum * keep + WarpSum(p);
#pragma unroll
    for (float& x : out->o) x *= keep;
    for (int j = 0; j < min(32, total - begin); ++j) {
      const float pj = __shfl_sync(~0u, p, j);
      const int64_t v = int64_t{__shfl_sync(~0u, row, j)} * dim;
#pragma unroll
      for (int i = 0; i < kMaxDim / 32; ++i) {
        if (i * 32 + lane < dim) out->o[i] += pj * ToFloat(pool_v[v + i * 32 + lane]);
      }
    }
  }
}

}  // namespace entropyserve::cuda
