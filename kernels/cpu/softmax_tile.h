// One step of the online softmax over a tile of scores (FlashAttention, arXiv 2205.14135, algorithm
// 1).
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace entropyserve::cpu {

// Row r of the tile belongs to query r / group; it may see the first visible(r) =
// clamp(first_visible + r / group, 0, keys) of the tile's keys.
struct SoftmaxTile {
  float* scores =
      nullptr;  // [rows, cols] q . k, without scale; overwritten (f32: with probabilities)
  bf16_t* probs = nullptr;  // [rows, cols] or null: then they stay in scores
  float* max = nullptr;     // [rows] so far, in units of log2
  float* sum = nullptr;     // [rows] so far
  float* out = nullptr;     // [rows, head_dim] so far, not normalised; rescaled to the new max
  int32_t rows = 0;
  int32_t cols = 0;  // a multiple of 16
  int32_t keys = 0;  // <= cols; the rest is padding
  int32_t head_dim = 0, group = 1;
  int32_t first_visible = 0;
  float scale = 1;  // log2(e) / sqrt(head_dim)
};

// Turns scores into exp(scale * score - max), 0 where a key is not visible.
void RunSoftmaxTile(const SoftmaxTile& tile);

}  // namespace entropyserve::cpu
