// Hopper's warpgroup matrix instructions (PTX ISA, "wgmma.mma_async"), as few as the attention
// kernel needs.
//
// All multiply bf16 into fp32 accumulators that are spread over the 128 threads of a warpgroup:
// thread (warp w, lane l) holds of a 64 x N tile, for every group j of 8 columns, the elements
// d[4j..4j+3] = (row 16w + l/4, columns 8j + 2(l%4), +1), (row + 8, the same columns).
#pragma once

#include <cstdint>

namespace entropyserve::sm90 {

// Shared-memory operand descriptor: 128-byte swizzle, addresses and strides in units of 16 bytes.
// K-major operands: stride_bytes separates groups of 8 rows, leading_bytes is unused.
// MN-major operands: leading_bytes separates 64-element spans of the long side, stride_bytes groups
// of 8 along the contraction.
__device__ inline uint64_t MakeDescriptor(uint32_t smem_address, uint32_t leading_bytes,
                                          uint32_t stride_bytes) {
  return uint64_t((smem_address & 0x3ffff) >> 4) | (uint64_t(leading_bytes >> 4) << 16) |
         (uint64_t(stride_bytes >> 4) << 32) | (uint64_t{1} << 62);
}

// Moves a descriptor's start by `bytes`.
__device__ inline uint64_t Advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

__device__ inline void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` committed groups are unfinished.
template <int kPending>
__device__ inline void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across this point.
template <int kN>
__device__ inline void FenceRegisters(float (&d)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands 0 to 31 and 32 to 63, by number and as accumulators.
#define ES_NUMBERS_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ES_NUMBERS_64                                                                    \
  ES_NUMBERS_32                                                                          \
      ", "                                                                               \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ES_SUMS_8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ES_SUMS_32(i) ES_SUMS_8(i), ES_SUMS_8(i + 8), ES_SUMS_8(i + 16), ES_SUMS_8(i + 24)

// d (+)= A B^T, 64 x 128 x 16; A [64, 16] and B [128, 16] in shared memory, both K-major.
template <bool kAccumulate>
__device__ inline void WgmmaQK(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ES_NUMBERS_64
      "}, %64, %65, p, 1, 1, 0, 0;\n"
      "}\n"
      : ES_SUMS_32(0), ES_SUMS_32(32)
      : "l"(a), "l"(b), "n"(int(kAccumulate)));
}

// d += A B, 64 x 128 x 16; A [64, 16] in registers, B [16, 128] in shared memory with the 128
// contiguous.
__device__ inline void WgmmaPV(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ES_NUMBERS_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n"
      "}\n"
      : ES_SUMS_32(0), ES_SUMS_32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same, 64 x 64 x 16.
__device__ inline void WgmmaPV(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ES_NUMBERS_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n"
      "}\n"
      : ES_SUMS_32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef ES_SUMS_32
#undef ES_SUMS_8
#undef ES_NUMBERS_64
#undef ES_NUMBERS_32

}  // namespace entropyserve::sm90
