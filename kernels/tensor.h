// Element types and small helpers shared by host code and kernels. Plain C++, included by .cu
// files.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace entropyserve {

// kE4M3 exists inside linears only, where a scale per row stands beside it (Matrix::scales).
enum class DType : uint8_t { kF32, kBF16, kE4M3 };

constexpr size_t SizeOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 ? 2 : 1;
}
constexpr const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kBF16 ? "bf16" : "e4m3";
}

// bf16 as its bits: the upper half of an IEEE float.
using bf16_t = uint16_t;

inline float FromBF16(bf16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline bf16_t ToBF16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16_t((bits >> 16) | 0x40u);
  return bf16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 8-bit float as its bits: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities.
using e4m3_t = uint8_t;
inline constexpr float kE4M3Max = 448.0f;

// Round to nearest, ties to even; what is too large becomes +-448, a NaN stays a NaN.
inline e4m3_t ToE4M3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t sign = (std::bit_cast<uint32_t>(x) >> 24) & 0x80u;
  if (bits > 0x7f800000u) return e4m3_t(sign | 0x7fu);
  const float size = std::bit_cast<float>(bits);
  if (size >= kE4M3Max) return e4m3_t(sign | 0x7eu);
  // Below 2^-6 in steps of 2^-9, which is the last place of floats from 2^14 on.
  if (size < 0x1p-6f) {
    return e4m3_t(sign |
                  (std::bit_cast<uint32_t>(size + 0x1p14f) - std::bit_cast<uint32_t>(0x1p14f)));
  }
  const uint32_t rounded = (bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
  return e4m3_t(sign | (rounded - ((127u - 7u) << 3)));
}

inline float FromE4M3(e4m3_t x) {
  const uint32_t exponent = (x >> 3) & 15u, mantissa = x & 7u;
  float size = float(mantissa) * 0x1p-9f;
  if (exponent > 0) size = std::bit_cast<float>((exponent + 120u) << 23 | mantissa << 20);
  if (exponent == 15 && mantissa == 7) size = std::bit_cast<float>(0x7fc00000u);
  return x & 0x80u ? -size : size;
}

// A row is stored as x * (448 / max |x|) and comes back multiplied by its scale.
constexpr float E4M3Scale(float max) { return max > 0 ? max / kE4M3Max : 1.0f; }
constexpr float E4M3Factor(float max) { return max > 0 ? kE4M3Max / max : 1.0f; }

// IEEE half to float (GGUF and safetensors carry halves; nothing is stored as half here).
inline float FromF16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u,
                 mantissa = h & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float f = float(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

template <typename T>
constexpr T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace entropyserve
