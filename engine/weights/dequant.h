// The number formats that checkpoints store, and their conversion to float, row by row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace entropyserve {

// The block formats are ggml's. K formats: super-blocks of 256 with 6- or 8-bit scales.
enum class StorageType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K,
};

struct BlockFormat {
  const char* name;
  size_t elements;  // per block; a row is a whole number of blocks
  size_t bytes;     // per block
};

const BlockFormat& FormatOf(StorageType type);

// Bytes of a row of n elements; n must be a multiple of the block.
inline size_t RowBytes(StorageType type, size_t n) {
  const BlockFormat& format = FormatOf(type);
  return n / format.elements * format.bytes;
}

// out[n] = the row's values. Operations and their order are those of ggml's reference
// dequantization without fused multiply-add, so the floats are bit for bit those of the `gguf`
// Python package. `src` needs no alignment and holds RowBytes(type, n) bytes.
void DequantizeRow(StorageType type, const uint8_t* src, size_t n, float* out);

// The same, to `dtype`. bf16 to bf16 and f32 to f32 copy bits; all else goes through float and
// rounds to nearest even. `scratch` [n] is used unless no conversion is needed.
void ConvertRow(StorageType type, const uint8_t* src, size_t n, DType dtype, void* out,
                float* scratch);

}  // namespace entropyserve
