#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/early_start.cuh"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = 256;

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kThreads) EmbedKernel(EmbedParams p) {
  const int64_t row = blockIdx.x, hidden = p.table.cols;
  const T* in = static_cast<const T*>(p.table.data) + p.tokens[row] * hidden;
  float* out = p.out + row * hidden;
  if (hidden % 8 == 0) {
    for (int64_t i = threadIdx.x * 8; i < hidden; i += kThreads * 8) {
      float x[8];
      Load8(in + i, x);
      Store8(out + i, x);
    }
  } else {
    for (int64_t i = threadIdx.x; i < hidden; i += kThreads) out[i] = ToFloat(in[i]);
  }
}

// One block per row. The row is read twice; the second time it comes from L1.
template <typename T>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNormParams p) {
  LetNextStart();
  __shared__ float shared[33];
  const int64_t row = blockIdx.x;
  const float* x = p.x + (p.row_index ? int64_t{p.row_index[row]} : row) * p.hidden;
  T* out = static_cast<T*>(p.out) + row * p.hidden;
  const bool vectors = p.hidden % 8 == 0;
  float sum = 0;
  if (vectors) {
    for (int64_t i = threadIdx.x * 8; i < p.hidden; i += kThreads * 8) {
      float v[8];
      Load8(x + i, v);
#pragma unroll
      for (float e : v) sum += e * e;
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.hidden; i += kThreads) sum += x[i] * x[i];
  }
  const float scale = rsqrtf(BlockSum(sum, shared) / float(p.hidden) + p.eps);
  if (vectors) {
    for (int64_t i = threadIdx.x * 8; i < p.hidden; i += kThreads * 8) {
      float v[8], w[8];
      Load8(x + i, v);
      Load8(p.weight + i, w);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] *= scale * w[e];
      Store8(out + i, v);
    }
  } else {
    for (int64_t i = threadIdx.x; i < p.hidden; i += kThreads) {
      out[i] = FromFloat<T>(x[i] * scale * p.weight[i]);
    }
  }
}

__device__ __forceinline__ float Silu(float x) { return x / (1.0f + __expf(-x)); }

// A thread makes 8 outputs (or one, where ffn is no multiple of 8).
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads) SwiGluKernel(SwiGluParams p) {
  LetNextStart();
  constexpr int kPer = kVectors ? 8 : 1;
  const int64_t per_row = p.ffn / kPer;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.rows * per_row) return;
  const int64_t row = index / per_row, column = index % per_row * kPer;
  const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.ffn + column;
  T* out = static_cast<T*>(p.out) + row * p.ffn + column;
  if constexpr (kVectors) {
    float g[8], u[8];
    Load8(gate, g);
    Load8(gate + p.ffn, u);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = Silu(g[i]) * u[i];
    Store8(out, g);
  } else {
    *out = FromFloat<T>(Silu(ToFloat(gate[0])) * ToFloat(gate[p.ffn]));
  }
}

// One block per row.
template <typename T>
__global__ void __launch_bounds__(kThreads) GatherRowsKernel(GatherRowsParams p) {
  const int64_t words = p.row_bytes / int64_t{sizeof(T)};
  const T* in = static_cast<const T*>(p.x) + p.row_index[blockIdx.x] * words;
  T* out = static_cast<T*>(p.out) + blockIdx.x * words;
  for (int64_t i = threadIdx.x; i < words; i += kThreads) out[i] = in[i];
}

__global__ void __launch_bounds__(kThreads) ToBf16Kernel(const float* in, bf16* out, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) out[i] = FromFloat<bf16>(in[i]);
}

template <typename T>
void RunSwiGlu(const SwiGluParams& p, cudaStream_t stream) {
  const bool vectors = p.ffn % 8 == 0;
  const unsigned blocks =
      unsigned(CeilDiv<int64_t>(p.rows * (vectors ? p.ffn / 8 : p.ffn), kThreads));
  if (vectors) {
    SwiGluKernel<T, true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    SwiGluKernel<T, false><<<blocks, kThreads, 0, stream>>>(p);
  }
}

}  // namespace

void LaunchEmbed(const EmbedParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.table.dtype == DType::kF32) {
    EmbedKernel<float><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  } else {
    EmbedKernel<bf16><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  }
  CUDA_CHECK(cudaGetLastError());
}

void LaunchRmsNorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.out_dtype == DType::kE4M3) return LaunchRmsNormE4M3(p, stream);
  if (p.out_dtype == DType::kF32) {
    RmsNormKernel<float><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  } else {
    RmsNormKernel<bf16><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  }
  CUDA_CHECK(cudaGetLastError());
}

void LaunchSwiGlu(const SwiGluParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.scales) return LaunchSwiGluE4M3(p, stream);
  if (p.dtype == DType::kF32) {
    RunSwiGlu<float>(p, stream);
  } else {
    RunSwiGlu<bf16>(p, stream);
  }
  CUDA_CHECK(cudaGetLastError());
}

void LaunchGatherRows(const GatherRowsParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.row_bytes % 16 == 0) {
    GatherRowsKernel<uint4><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  } else {
    GatherRowsKernel<uint16_t><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  }
  CUDA_CHECK(cudaGetLastError());
}

void LaunchToBf16(const float* in, void* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  ToBf16Kernel<<<unsigned(CeilDiv<int64_t>(n, kThreads)), kThreads, 0, stream>>>(
      in, static_cast<bf16*>(out), n);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
