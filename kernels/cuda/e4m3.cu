// Rows of 8-bit floats, each with its scale: as what feeds a linear is made, or by themselves. One
// block per row: the largest element comes first, then the rounding. The CPU's twins are in
// kernels/cpu/e4m3.cc.
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/early_start.cuh"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float Largest(float max, const float (&x)[8]) {
#pragma unroll
  for (float e : x) max = fmaxf(max, fabsf(e));
  return max;
}

// 8 consecutive elements; p is 8-byte aligned.
__device__ __forceinline__ void Store8(e4m3_t* p, const float (&x)[8], float factor) {
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __nv_fp8x2_storage_t lo = __nv_cvt_float2_to_fp8x2(
        {x[4 * i] * factor, x[4 * i + 1] * factor}, __NV_SATFINITE, __NV_E4M3);
    const __nv_fp8x2_storage_t hi = __nv_cvt_float2_to_fp8x2(
        {x[4 * i + 2] * factor, x[4 * i + 3] * factor}, __NV_SATFINITE, __NV_E4M3);
    words[i] = uint32_t{lo} | uint32_t{hi} << 16;
  }
  *reinterpret_cast<uint2*>(p) = {words[0], words[1]};
}
__device__ __forceinline__ void Store(e4m3_t* p, float x) {
  *p = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// The row is read twice; the second time it comes from L1.
template <typename T>
__global__ void __launch_bounds__(kThreads) QuantizeKernel(QuantizeParams p) {
  LetNextStart();
  __shared__ float shared[33];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.cols;
  e4m3_t* out = p.out + row * p.cols;
  const bool vectors = p.cols % 8 == 0;
  float max = 0;
  if (vectors) {
    for (int64_t i = threadIdx.x * 8; i < p.cols; i += kThreads * 8) {
      float v[8];
      Load8(x + i, v);
      max = Largest(max, v);
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.cols; i += kThreads) max = fmaxf(max, fabsf(ToFloat(x[i])));
  }
  max = BlockMax(max, shared);
  const float factor = E4M3Factor(max);
  if (vectors) {
    for (int64_t i = threadIdx.x * 8; i < p.cols; i += kThreads * 8) {
      float v[8];
      Load8(x + i, v);
      Store8(out + i, v, factor);
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.cols; i += kThreads) Store(out + i, ToFloat(x[i]) * factor);
  }
  if (threadIdx.x == 0) p.scales[row] = E4M3Scale(max);
}

// |x * weight| is largest where |x * weight / rms| is: one pass finds both, a second one rounds.
__global__ void __launch_bounds__(kThreads) RmsNormE4M3Kernel(RmsNormParams p) {
  LetNextStart();
  __shared__ float shared[33];
  const int64_t row = blockIdx.x;
  const float* x = p.x + (p.row_index ? int64_t{p.row_index[row]} : row) * p.hidden;
  e4m3_t* out = static_cast<e4m3_t*>(p.out) + row * p.hidden;
  const bool vectors = p.hidden % 8 == 0;
  float sum = 0, max = 0;
  if (vectors) {
    for (int64_t i = threadIdx.x * 8; i < p.hidden; i += kThreads * 8) {
      float v[8], w[8];
      Load8(x + i, v);
      Load8(p.weight + i, w);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        sum += v[e] * v[e];
        max = fmaxf(max, fabsf(v[e] * w[e]));
      }
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.hidden; i += kThreads) {
      sum += x[i] * x[i];
      max = fmaxf(max, fabsf(x[i] * p.weight[i]));
    }
  }
  const float scale = rsqrtf(BlockSum(sum, shared) / float(p.hidden) + p.eps);
  max = BlockMax(max, shared) * scale;
  const float factor = E4M3Factor(max) * scale;
  if (vectors) {
    for (int64_t i = threadIdx.x * 8; i < p.hidden; i += kThreads * 8) {
      float v[8], w[8];
      Load8(x + i, v);
      Load8(p.weight + i, w);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] *= w[e];
      Store8(out + i, v, factor);
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.hidden; i += kThreads) {
      Store(out + i, x[i] * p.weight[i] * factor);
    }
  }
  if (threadIdx.x == 0) p.scales[row] = E4M3Scale(max);
}

__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return gate / (1.0f + __expf(-gate)) * up;
}

// Between the two passes a thread keeps its products, up to kHold vectors of 8, in registers.
constexpr int kMostThreads = 1024;

template <typename T, int kHold>
__global__ void __launch_bounds__(kMostThreads) SwiGluE4M3Kernel(SwiGluParams p) {
  LetNextStart();
  __shared__ float shared[33];
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.ffn;
  e4m3_t* out = static_cast<e4m3_t*>(p.out) + row * p.ffn;
  float held[kHold][8], max = 0;
#pragma unroll
  for (int h = 0; h < kHold; ++h) {
    const int64_t i = (int64_t{h} * blockDim.x + threadIdx.x) * 8;
    if (i >= p.ffn) continue;
    float up[8];
    Load8(gate + i, held[h]);
    Load8(gate + p.ffn + i, up);
#pragma unroll
    for (int e = 0; e < 8; ++e) held[h][e] = SiluTimes(held[h][e], up[e]);
    max = Largest(max, held[h]);
  }
  max = BlockMax(max, shared);
  const float factor = E4M3Factor(max);
#pragma unroll
  for (int h = 0; h < kHold; ++h) {
    const int64_t i = (int64_t{h} * blockDim.x + threadIdx.x) * 8;
    if (i < p.ffn) Store8(out + i, held[h], factor);
  }
  if (threadIdx.x == 0) p.scales[row] = E4M3Scale(max);
}

// Any ffn: products are made twice.
template <typename T>
__global__ void __launch_bounds__(kThreads) SwiGluE4M3AnyKernel(SwiGluParams p) {
  LetNextStart();
  __shared__ float shared[33];
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.ffn;
  float max = 0;
  for (int64_t i = threadIdx.x; i < p.ffn; i += kThreads) {
    max = fmaxf(max, fabsf(SiluTimes(ToFloat(gate[i]), ToFloat(gate[p.ffn + i]))));
  }
  max = BlockMax(max, shared);
  const float factor = E4M3Factor(max);
  for (int64_t i = threadIdx.x; i < p.ffn; i += kThreads) {
    Store(static_cast<e4m3_t*>(p.out) + row * p.ffn + i,
          SiluTimes(ToFloat(gate[i]), ToFloat(gate[p.ffn + i])) * factor);
  }
  if (threadIdx.x == 0) p.scales[row] = E4M3Scale(max);
}

template <typename T>
void RunSwiGlu(const SwiGluParams& p, cudaStream_t stream) {
  constexpr int kHold = 4;
  const int64_t threads = CeilDiv<int64_t>(CeilDiv<int64_t>(p.ffn, 8 * kHold), 32) * 32;
  if (p.ffn % 8 == 0 && threads <= kMostThreads) {
    SwiGluE4M3Kernel<T, kHold><<<unsigned(p.rows), unsigned(threads), 0, stream>>>(p);
  } else {
    SwiGluE4M3AnyKernel<T><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  }
}

}  // namespace

void LaunchQuantize(const QuantizeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.dtype == DType::kF32) {
    QuantizeKernel<float><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  } else {
    QuantizeKernel<bf16><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  }
  CUDA_CHECK(cudaGetLastError());
}

void LaunchRmsNormE4M3(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  RmsNormE4M3Kernel<<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchSwiGluE4M3(const SwiGluParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.dtype == DType::kF32) {
    RunSwiGlu<float>(p, stream);
  } else {
    RunSwiGlu<bf16>(p, stream);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
