// Tensor core and asynchronous copy instructions of compute capability 8.0, and a swizzled tile.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace entropyserve::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros where !valid (src is not read then).
__device__ __forceinline__ void CopyAsync16(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// d += a * b: a [16, 16] row-major, b [16, 8] column-major, bf16; d [16, 8] fp32. Thread (g, t) =
// (lane / 4, lane % 4) holds d[g][2t], d[g][2t+1], d[g+8][2t], d[g+8][2t+1].
__device__ __forceinline__ void Mma16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of halves.
__device__ __forceinline__ void Mma16x8x16Half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A tile of bf16 rows in shared memory. 16-byte chunks are permuted within a row, so that the 8
// rows that one ldmatrix reads lie in different banks. kDim: 64 or 128.
template <int kDim>
struct SwizzledTile {
  static constexpr int kChunks = kDim / 8;  // of 16 bytes, per row
  __device__ static __forceinline__ uint32_t Offset(int row, int chunk) {
    return uint32_t(row * kChunks + (chunk ^ (row & 7))) * 16;
  }
  // Rows r0..r0+15, k0..k0+15 (k0 = 16 * k) as the A operand.
  __device__ static __forceinline__ void LoadA(uint32_t (&a)[4], uint32_t base, int r0, int k) {
    const int lane = threadIdx.x % 32, m = lane / 8;
    LoadMatrix4(a, base + Offset(r0 + (m & 1) * 8 + lane % 8, 2 * k + m / 2));
  }
  // Rows n0..n0+15 as columns of two B operands (rows of the tile are B's columns): b[0], b[1] for
  // n0..n0+7, b[2], b[3] for the next 8.
  __device__ static __forceinline__ void LoadB(uint32_t (&b)[4], uint32_t base, int n0, int k) {
    const int lane = threadIdx.x % 32, m = lane / 8;
    LoadMatrix4(b, base + Offset(n0 + m / 2 * 8 + lane % 8, 2 * k + (m & 1)));
  }
  // Rows k0..k0+15 as B's rows, channels 16 * n .. +15 as its columns: two B operands as above.
  __device__ static __forceinline__ void LoadBTransposed(uint32_t (&b)[4], uint32_t base, int k0,
                                                         int n) {
    const int lane = threadIdx.x % 32, m = lane / 8;
    LoadMatrix4Transposed(b, base + Offset(k0 + (m & 1) * 8 + lane % 8, 2 * n + m / 2));
  }
};

}  // namespace entropyserve::cuda
