// One step of prefill attention's online softmax on AMX tiles, fused: scores, softmax and values of
// 32 rows at a time stay in L1. The portable twin is RunTile in prefill_attention.cc (oneDNN and
// softmax_tile.h), which is about half as fast where both run.
#pragma once

#include <cstdint>

#include "kernels/cpu/cpu_features.h"
#include "kernels/tensor.h"

namespace entropyserve::cpu {

inline constexpr int32_t kAmxRows = 32;  // rows that go together
inline constexpr int32_t kAmxKeys = 32;  // keys come in multiples of this

bool AmxSupports(const CpuFeatures& features, DType dtype, int32_t head_dim);

// Floats of scratch for a tile of at most `keys` keys.
int64_t AmxScratch(int32_t keys);

struct AmxTile {
  const bf16_t* q = nullptr;  // [rows, head_dim], readable up to a multiple of kAmxRows
  const bf16_t* k = nullptr;  // keys packed by AmxPack
  const bf16_t* v = nullptr;  // values packed by AmxPack
  float* scratch = nullptr;   // [AmxScratch(cols)]
  // So far, as in SoftmaxTile; out is writable up to a multiple of kAmxRows.
  float* max = nullptr;  // [rows]
  float* sum = nullptr;  // [rows]
  float* out = nullptr;  // [rows, head_dim]
  int32_t rows = 0;
  int32_t keys = 0;
  int32_t cols = 0;  // keys rounded up to a multiple of kAmxKeys
  int32_t head_dim = 0, group = 1;
  int32_t first_visible = 0;  // row r sees the first clamp(first_visible + r / group, 0, keys)
  float scale = 1;            // log2(e) / sqrt(head_dim)
};

// k, v: [cols, head_dim] of one tile, into the layouts of AMX's second operand: for K, tiles of 16
// keys by 32 channels as 16 channel pairs; for V, tiles of 32 keys as 16 pairs by 16 channels.
void AmxPack(const bf16_t* k, const bf16_t* v, int32_t cols, int32_t head_dim, bf16_t* packed_k,
             bf16_t* packed_v);

// Between these two the calling thread's tile registers are set up for RunAmxTile.
void AmxBegin();
void AmxEnd();

void RunAmxTile(const AmxTile& tile);

}  // namespace entropyserve::cpu
