// Element types and small helpers shared by host code and kernels. Plain C++, included by .cu files.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace entropyserve {

enum class DType : uint8_t { kF32, kBF16 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
constexpr const char* Name(DType dtype) { return dtype == DType::kF32 ? "f32" : "bf16"; }

// bf16 as its bits: the upper half of an IEEE float.
using bf16_t = uint16_t;

inline float FromBF16(bf16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline bf16_t ToBF16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16_t((bits >> 16) | 0x40u);
  return bf16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE half to float (GGUF and safetensors carry halves; nothing is stored as half here).
inline float FromF16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
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
