// Vectors for inner loops, in GCC's and clang's own vector types: 16 floats, which the compiler
// maps to one AVX-512 register, two of AVX2 or four of SSE or NEON. A function marked ES_SIMD is
// compiled for each of them on x86-64 and picked at load time; everything it calls here is inlined
// into it, so no vector ever crosses a call.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/tensor.h"

// Sanitizers run before the resolvers that pick a clone could; clang 14 lacks the feature levels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ES_SIMD \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define ES_SIMD __attribute__((noinline))
#endif
#define ES_INLINE __attribute__((always_inline)) inline
#define ES_INLINE_LAMBDA __attribute__((always_inline))

namespace entropyserve::simd {

inline constexpr int kLanes = 16;
using F32x16 = float __attribute__((vector_size(64)));
using I32x16 = int32_t __attribute__((vector_size(64)));
using U32x16 = uint32_t __attribute__((vector_size(64)));
using U16x16 = uint16_t __attribute__((vector_size(32)));

ES_INLINE F32x16 Set(float x) { return F32x16{} + x; }

ES_INLINE F32x16 Load(const float* p) {
  F32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
ES_INLINE void Store(float* p, F32x16 v) { std::memcpy(p, &v, sizeof(v)); }

ES_INLINE F32x16 Load(const bf16_t* p) {
  U16x16 v;
  std::memcpy(&v, p, sizeof(v));
  return std::bit_cast<F32x16>(__builtin_convertvector(v, U32x16) << 16);
}
// Round to nearest, ties to even, as ToBF16, for numbers that are not NaN.
ES_INLINE void Store(bf16_t* p, F32x16 v) {
  const U32x16 bits = std::bit_cast<U32x16>(v);
  const U16x16 rounded =
      __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, U16x16);
  std::memcpy(p, &rounded, sizeof(rounded));
}

// The first n < 16 numbers, then zeros.
template <typename T>
ES_INLINE F32x16 LoadPart(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(T));
  return Load(lanes);
}
template <typename T>
ES_INLINE void StorePart(T* p, F32x16 v, int n) {
  T lanes[kLanes];
  Store(lanes, v);
  std::memcpy(p, lanes, size_t(n) * sizeof(T));
}

ES_INLINE F32x16 Max(F32x16 a, F32x16 b) { return a > b ? a : b; }
ES_INLINE F32x16 Min(F32x16 a, F32x16 b) { return a < b ? a : b; }

// Lanes combine in a fixed tree: the result does not depend on the instruction set's width.
ES_INLINE float Sum(F32x16 v) {
  const auto a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto b =
      __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
ES_INLINE float MaxOf(F32x16 v) {
  const auto a0 = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const auto a1 = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto a = a0 > a1 ? a0 : a1;
  const auto b0 = __builtin_shufflevector(a, a, 0, 1, 2, 3);
  const auto b1 = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  const auto b = b0 > b1 ? b0 : b1;
  const float x = b[0] > b[2] ? b[0] : b[2], y = b[1] > b[3] ? b[1] : b[3];
  return x > y ? x : y;
}

// Lane i = the sum of v[i]'s lanes: 45 instructions, where 16 single sums are 150.
ES_INLINE F32x16 SumEach(const F32x16* v) {
  F32x16 a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const F32x16 x = v[2 * i], y = v[2 * i + 1];
    a[i] =
        __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
        __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  // Each quarter of a[i] holds two partial sums of v[2i] and v[2i+1], alternating.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F32x16 x = a[2 * i], y = a[2 * i + 1];
    b[i] =
        __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  // Each quarter of b[i] holds one partial sum of v[4i] to v[4i+3].
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const F32x16 x = b[2 * i], y = b[2 * i + 1];
    a[i] =
        __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  const F32x16 x = a[0], y = a[1];
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

// ---- Runs ---------------------------------------------------------------------------------------

// Numbers that one 64-byte load brings, as floats in the order in which they unpack for free: for
// bf16 the even ones, then the odd ones. For sums over channels, where the other factor is laid out
// alike.

template <typename T>
inline constexpr int kRun = int(64 / sizeof(T));

template <typename T>
struct Run {
  F32x16 v[kRun<T> / kLanes];
};
ES_INLINE Run<float> LoadRun(const float* p) { return {{Load(p)}}; }
ES_INLINE Run<bf16_t> LoadRun(const bf16_t* p) {
  U32x16 pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return {{std::bit_cast<F32x16>(pairs << 16), std::bit_cast<F32x16>(pairs & 0xffff0000u)}};
}
// The first n numbers of a run, then zeros.
template <typename T>
ES_INLINE Run<T> LoadRunPart(const T* p, int n) {
  T numbers[kRun<T>] = {};
  std::memcpy(numbers, p, size_t(n) * sizeof(T));
  return LoadRun(numbers);
}
// Where number i of a vector lies in a float buffer of runs.
template <typename T>
ES_INLINE int64_t RunSlot(int64_t i) {
  if constexpr (sizeof(T) == 4) return i;
  return i / kRun<T> * kRun<T> + i % 2 * kLanes + i % kRun<T> / 2;
}

// 2^x for x <= 126; 0 below -126 (so for -inf too). Relative error under 2e-7: a degree 6
// polynomial on
// [-0.5, 0.5] (Taylor in x ln 2; its first left-out term is 1.2e-7 at the ends).
ES_INLINE F32x16 Exp2(F32x16 x) {
  constexpr float kRound =
      0x1.8p23f;  // adding it leaves the nearest integer in the low mantissa bits
  const F32x16 clamped = Max(x, Set(-127.0f));
  const F32x16 shifted = clamped + kRound;
  const F32x16 f = clamped - (shifted - kRound);
  F32x16 y = Set(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const I32x16 scale = std::bit_cast<I32x16>(shifted) << 23;  // the integer, into the exponent
  const F32x16 result = std::bit_cast<F32x16>(std::bit_cast<I32x16>(y) + scale);
  return x < -126.0f ? F32x16{} : result;
}
inline constexpr float kLog2E = 1.44269504f;
ES_INLINE F32x16 Exp(F32x16 x) { return Exp2(x * kLog2E); }

}  // namespace entropyserve::simd
