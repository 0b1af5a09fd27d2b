// Block layouts: ggml's quantized formats, little endian, one struct-free reader per format so that
// a block may start at any address. This file is compiled without fused multiply-add
// (engine/weights/CMakeLists.txt): contraction would change the last bit.
#include "engine/weights/dequant.h"

#include <bit>
#include <cstring>

#include "kernels/check.h"

namespace entropyserve {
namespace {

static_assert(std::endian::native == std::endian::little, "checkpoints are read in place");

constexpr size_t kSmallBlock = 32;
constexpr size_t kSuperBlock = 256;

constexpr BlockFormat kFormats[] = {
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"Q8_0", kSmallBlock, 2 + 32},
    {"Q4_0", kSmallBlock, 2 + 16},
    {"Q4_1", kSmallBlock, 2 + 2 + 16},
    {"Q5_0", kSmallBlock, 2 + 4 + 16},
    {"Q5_1", kSmallBlock, 2 + 2 + 4 + 16},
    {"Q4_K", kSuperBlock, 2 + 2 + 12 + 128},
    {"Q5_K", kSuperBlock, 2 + 2 + 12 + 32 + 128},
    {"Q6_K", kSuperBlock, 128 + 64 + 16 + 2},
};

uint16_t Load16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

uint32_t Load32(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

float LoadHalf(const uint8_t* p) { return FromF16(Load16(p)); }

// y = d * q
void Q8_0Block(const uint8_t* p, float* y) {
  const float d = LoadHalf(p);
  const auto* q = reinterpret_cast<const int8_t*>(p + 2);
  for (size_t i = 0; i < kSmallBlock; ++i) y[i] = float(q[i]) * d;
}

// y = d * (q - 8); low nibbles are the first half of the block, high nibbles the second.
void Q4_0Block(const uint8_t* p, float* y) {
  const float d = LoadHalf(p);
  const uint8_t* q = p + 2;
  for (size_t i = 0; i < kSmallBlock / 2; ++i) {
    y[i] = d * float(int(q[i] & 15) - 8);
    y[i + 16] = d * float(int(q[i] >> 4) - 8);
  }
}

// y = d * q + m
void Q4_1Block(const uint8_t* p, float* y) {
  const float d = LoadHalf(p), m = LoadHalf(p + 2);
  const uint8_t* q = p + 4;
  for (size_t i = 0; i < kSmallBlock / 2; ++i) {
    y[i] = d * float(q[i] & 15) + m;
    y[i + 16] = d * float(q[i] >> 4) + m;
  }
}

// As Q4_0 with a fifth bit per element: bit i of `high` belongs to element i.
void Q5_0Block(const uint8_t* p, float* y) {
  const float d = LoadHalf(p);
  const uint32_t high = Load32(p + 2);
  const uint8_t* q = p + 6;
  for (size_t i = 0; i < kSmallBlock / 2; ++i) {
    y[i] = d * float(int((q[i] & 15u) | ((high >> i) & 1u) << 4) - 16);
    y[i + 16] = d * float(int((q[i] >> 4) | ((high >> (i + 16)) & 1u) << 4) - 16);
  }
}

void Q5_1Block(const uint8_t* p, float* y) {
  const float d = LoadHalf(p), m = LoadHalf(p + 2);
  const uint32_t high = Load32(p + 4);
  const uint8_t* q = p + 8;
  for (size_t i = 0; i < kSmallBlock / 2; ++i) {
    y[i] = d * float((q[i] & 15u) | ((high >> i) & 1u) << 4) + m;
    y[i + 16] = d * float((q[i] >> 4) | ((high >> (i + 16)) & 1u) << 4) + m;
  }
}

// Scales and mins of the 8 sub-blocks of a Q4_K or Q5_K super-block, 6 bits each in 12 bytes: bytes
// 0-3 and 4-7 hold the low six bits of the first four scales and mins, their upper two bits and the
// nibbles of bytes 8-11 those of the last four.
struct SubScales {
  uint8_t scale[8], min[8];

  explicit SubScales(const uint8_t* p) {
    for (int i = 0; i < 4; ++i) {
      scale[i] = p[i] & 63;
      min[i] = p[i + 4] & 63;
      scale[i + 4] = uint8_t((p[i + 8] & 15) | ((p[i] >> 6) << 4));
      min[i + 4] = uint8_t((p[i + 8] >> 4) | ((p[i + 4] >> 6) << 4));
    }
  }
};

// y = (d * scale) * q - (dmin * min); each 32 bytes hold two sub-blocks, low nibbles first.
void Q4_KBlock(const uint8_t* p, float* y) {
  const float d = LoadHalf(p), dmin = LoadHalf(p + 2);
  const SubScales sub(p + 4);
  const uint8_t* q = p + 16;
  for (int pair = 0; pair < 4; ++pair, q += 32, y += 64) {
    const float d0 = d * float(sub.scale[2 * pair]), m0 = dmin * float(sub.min[2 * pair]);
    const float d1 = d * float(sub.scale[2 * pair + 1]), m1 = dmin * float(sub.min[2 * pair + 1]);
    for (int i = 0; i < 32; ++i) {
      y[i] = d0 * float(q[i] & 15) - m0;
      y[i + 32] = d1 * float(q[i] >> 4) - m1;
    }
  }
}

// As Q4_K with a fifth bit: bit s of high[i] belongs to element i of sub-block s.
void Q5_KBlock(const uint8_t* p, float* y) {
  const float d = LoadHalf(p), dmin = LoadHalf(p + 2);
  const SubScales sub(p + 4);
  const uint8_t* high = p + 16;
  const uint8_t* q = p + 48;
  for (int pair = 0; pair < 4; ++pair, q += 32, y += 64) {
    const int s0 = 2 * pair, s1 = s0 + 1;
    const float d0 = d * float(sub.scale[s0]), m0 = dmin * float(sub.min[s0]);
    const float d1 = d * float(sub.scale[s1]), m1 = dmin * float(sub.min[s1]);
    for (int i = 0; i < 32; ++i) {
      y[i] = d0 * float((q[i] & 15) | ((high[i] >> s0) & 1) << 4) - m0;
      y[i + 32] = d1 * float((q[i] >> 4) | ((high[i] >> s1) & 1) << 4) - m1;
    }
  }
}

// y = (d * scale) * (q - 32), a scale per 16 elements. Each half of 128 elements has 64 bytes of
// low nibbles and 32 bytes whose bit pairs are the upper two bits of elements i, i+32, i+64, i+96.
void Q6_KBlock(const uint8_t* p, float* y) {
  const uint8_t *low = p, *high = p + 128;
  const auto* scales = reinterpret_cast<const int8_t*>(p + 192);
  const float d = LoadHalf(p + 208);
  for (int half = 0; half < 2; ++half, low += 64, high += 32, scales += 8, y += 128) {
    for (int i = 0; i < 32; ++i) {
      const int s = i / 16;
      const int q0 = (low[i] & 15) | (high[i] & 3) << 4;
      const int q1 = (low[i + 32] & 15) | ((high[i] >> 2) & 3) << 4;
      const int q2 = (low[i] >> 4) | ((high[i] >> 4) & 3) << 4;
      const int q3 = (low[i + 32] >> 4) | (high[i] >> 6) << 4;
      y[i] = d * float(scales[s]) * float(q0 - 32);
      y[i + 32] = d * float(scales[s + 2]) * float(q1 - 32);
      y[i + 64] = d * float(scales[s + 4]) * float(q2 - 32);
      y[i + 96] = d * float(scales[s + 6]) * float(q3 - 32);
    }
  }
}

template <void (*Block)(const uint8_t*, float*)>
void ForEachBlock(StorageType type, const uint8_t* src, size_t n, float* out) {
  const BlockFormat& format = FormatOf(type);
  for (size_t i = 0; i < n; i += format.elements, src += format.bytes) Block(src, out + i);
}

}  // namespace

const BlockFormat& FormatOf(StorageType type) { return kFormats[size_t(type)]; }

void DequantizeRow(StorageType type, const uint8_t* src, size_t n, float* out) {
  Check(n % FormatOf(type).elements == 0, "a row is a whole number of blocks");
  if (n == 0) return;
  switch (type) {
    case StorageType::kF32:
      std::memcpy(out, src, n * sizeof(float));
      return;
    case StorageType::kF16:
      for (size_t i = 0; i < n; ++i) out[i] = LoadHalf(src + 2 * i);
      return;
    case StorageType::kBF16:
      for (size_t i = 0; i < n; ++i) out[i] = FromBF16(Load16(src + 2 * i));
      return;
    case StorageType::kQ8_0:
      return ForEachBlock<Q8_0Block>(type, src, n, out);
    case StorageType::kQ4_0:
      return ForEachBlock<Q4_0Block>(type, src, n, out);
    case StorageType::kQ4_1:
      return ForEachBlock<Q4_1Block>(type, src, n, out);
    case StorageType::kQ5_0:
      return ForEachBlock<Q5_0Block>(type, src, n, out);
    case StorageType::kQ5_1:
      return ForEachBlock<Q5_1Block>(type, src, n, out);
    case StorageType::kQ4_K:
      return ForEachBlock<Q4_KBlock>(type, src, n, out);
    case StorageType::kQ5_K:
      return ForEachBlock<Q5_KBlock>(type, src, n, out);
    case StorageType::kQ6_K:
      return ForEachBlock<Q6_KBlock>(type, src, n, out);
  }
}

void ConvertRow(StorageType type, const uint8_t* src, size_t n, DType dtype, void* out,
                float* scratch) {
  if (dtype == DType::kF32) {
    DequantizeRow(type, src, n, static_cast<float*>(out));
    return;
  }
  if (type == StorageType::kBF16) {
    std::memcpy(out, src, n * sizeof(bf16_t));
    return;
  }
  DequantizeRow(type, src, n, scratch);
  auto* to = static_cast<bf16_t*>(out);
  for (size_t i = 0; i < n; ++i) to[i] = ToBF16(scratch[i]);
}

}  // namespace entropyserve
