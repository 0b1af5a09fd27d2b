// Where the attention of a few queries falls: exact softmax mass per bin of keys, mean over
// queries. What the probe estimator asks of a segment's probes and SelectTokens of the window's
// queries.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/backend.h"

namespace entropyserve::cuda {

// Queries of one kv head's group against that head's cache. Keys are counted over both runs, past
// first. Row m belongs to query m / group; it sees keys [0, first_limit + m / group * limit_step).
struct MassItem {
  const void* q;         // row m at q + (m / group * q_stride + m % group) * head_dim
  const int32_t* pages;  // page table of the head
  int32_t past;          // keys of the past run
  int32_t rows;          // 0: nothing to do
  int32_t group;
  int32_t q_stride;  // vectors
  int32_t first_limit, limit_step;
  int32_t bin_begin;  // first key of bin 0
  int32_t bins;
  int32_t bin_size;  // keys; divides 64
};

struct MassParams {
  const MassItem* items = nullptr;  // [num_items]
  int32_t num_items = 0;
  int32_t max_rows = 0;  // of an item: scratch is laid out by these
  int32_t max_keys = 0;  // that a row may see
  int32_t max_bins = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kF32;
  const void* pool_k = nullptr;  // [pages, kPageTokens, head_dim]
  void* scratch = nullptr;       // MassScratchBytes
  float* mass = nullptr;         // [num_items, mass_stride]
  int64_t mass_stride = 0;       // >= max_bins
};

size_t MassScratchBytes(int64_t items, int64_t max_rows, int64_t max_keys);

// How keys are split depends on an item's own lengths only.
void LaunchMass(const MassParams& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
