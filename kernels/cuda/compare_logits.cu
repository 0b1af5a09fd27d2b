#include <cfloat>

#include "kernels/cuda/compare_logits.h"
#include "kernels/cuda/cuda_check.h"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

struct Best {
  float value;
  int32_t id;
};

// The larger value; of equal ones the lower id.
__device__ __forceinline__ Best Better(Best x, Best y) {
  return y.value > x.value || (y.value == x.value && y.id < x.id) ? y : x;
}

struct Shared {
  Best best[kWarps];
  double sum[kWarps];
};

// All threads get the result.
__device__ Best BlockBest(Best x, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = Better(x, {__shfl_xor_sync(~0u, x.value, offset), __shfl_xor_sync(~0u, x.id, offset)});
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = Better(x, shared.best[w]);
  return x;
}

// Partial sums meet in a fixed order: equal rows give equal sums.
__device__ double BlockSum(double x, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.sum[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.sum[w];
  return total;
}

// As Prediction in kernels/cpu/compare_logits.cc.
struct Prediction {
  int32_t best;
  double log_sum;
  bool finite;
};

__device__ Prediction Predict(const float* x, int64_t n, Shared& shared) {
  Best best = {-INFINITY, INT32_MAX};
  bool broken = false;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    broken |= !(x[i] <= FLT_MAX);  // NaN or +inf; -inf is allowed
    best = Better(best, {x[i], int32_t(i)});
  }
  broken = __syncthreads_or(broken);
  best = BlockBest(best, shared);
  if (broken || best.value == -INFINITY) return {0, 0, false};
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += exp(double(x[i]) - double(best.value));
  return {best.id, log(BlockSum(sum, shared)) + double(best.value), true};
}

__global__ void __launch_bounds__(kThreads) CompareLogitsKernel(CompareLogitsParams p) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  const float* const x = p.a + row * p.vocab;
  const float* const y = p.b + row * p.vocab;
  const Prediction a = Predict(x, p.vocab, shared), b = Predict(y, p.vocab, shared);
  LogitsComparison result;
  result.finite = a.finite && b.finite;
  if (result.finite) {
    double kl = 0;
    for (int64_t i = threadIdx.x; i < p.vocab; i += kThreads) {
      const double log_p = double(x[i]) - a.log_sum, share = exp(log_p);
      if (share > 0) kl += share * (log_p - (double(y[i]) - b.log_sum));
    }
    result.kl = fmax(0.0, BlockSum(kl, shared));
    result.top1_equal = a.best == b.best;
    const int32_t target = p.targets[row];
    result.logprob_a = double(x[target]) - a.log_sum;
    result.logprob_b = double(y[target]) - b.log_sum;
  }
  if (threadIdx.x == 0) p.results[row] = result;
}

}  // namespace

void LaunchCompareLogits(const CompareLogitsParams& p, cudaStream_t stream) {
  if (p.n == 0) return;
  CompareLogitsKernel<<<unsigned(p.n), kThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
