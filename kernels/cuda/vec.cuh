// 16-byte accesses, warp and block reductions, conversions between storage and fp32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace entropyserve::cuda {

using bf16 = __nv_bfloat16;

template <typename T>
__device__ __forceinline__ float ToFloat(T x);
template <>
__device__ __forceinline__ float ToFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float ToFloat<bf16>(bf16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 FromFloat<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float2 UnpackBf16(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t PackBf16(float lo, float hi) {
  const __nv_bfloat162 packed = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// 8 consecutive elements; p is 16-byte aligned.
__device__ __forceinline__ void Load8(const bf16* p, float (&x)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = UnpackBf16(words[i]);
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}
__device__ __forceinline__ void Load8(const float* p, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ __forceinline__ void Store8(bf16* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) = {PackBf16(x[0], x[1]), PackBf16(x[2], x[3]), PackBf16(x[4], x[5]),
                                  PackBf16(x[6], x[7])};
}
__device__ __forceinline__ void Store8(float* p, const float (&x)[8]) {
  reinterpret_cast<float4*>(p)[0] = {x[0], x[1], x[2], x[3]};
  reinterpret_cast<float4*>(p)[1] = {x[4], x[5], x[6], x[7]};
}

// Over groups of kWidth lanes (a power of two); every lane gets the result.
template <int kWidth = 32>
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
template <int kWidth = 32>
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// Over a block of whole warps (at most 32); `shared` holds 33 floats. Every thread gets the result.
// Starts and ends with a barrier, so calls may follow each other on the same memory.
template <typename Combine>
__device__ __forceinline__ float BlockReduce(float x, float identity, float* shared,
                                             Combine combine) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(~0u, x, offset));
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    float y = lane < int(blockDim.x + 31) / 32 ? shared[lane] : identity;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) y = combine(y, __shfl_xor_sync(~0u, y, offset));
    if (lane == 0) shared[32] = y;
  }
  __syncthreads();
  return shared[32];
}
__device__ __forceinline__ float BlockSum(float x, float* shared) {
  return BlockReduce(x, 0.0f, shared, [](float a, float b) { return a + b; });
}
__device__ __forceinline__ float BlockMax(float x, float* shared) {
  return BlockReduce(x, __int_as_float(0xff800000), shared,
                     [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace entropyserve::cuda
