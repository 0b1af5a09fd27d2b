// Attention of segments' queries over what they may read: the kernels behind PrefillAttention and
// the correction's probes.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace entropyserve::cuda {

struct AttendParams {
  const BatchSeq* seqs = nullptr;          // [*]
  const BatchSegment* segments = nullptr;  // [num_segments]
  int32_t num_segments = 0;
  int32_t max_rows = 0;  // most rows of a segment that take part (probes: probes)
  int32_t layer = 0;
  AttentionShape shape;
  DType dtype = DType::kF32;     // of pool, q and (but for probes) out
  const void* pool_k = nullptr;  // [pages, kPageTokens, head_dim]
  const void* pool_v = nullptr;
  const void* q = nullptr;  // [rows, heads, head_dim]
  BlockLists lists;         // not read for probes
  // false: every row. true: rows at offsets 0, r, 2r... (r = the policy's correction) of sparse
  // segments over everything before them; out is f32 then.
  bool probes = false;
  const float* probe_out = nullptr;  // [rows, heads, head_dim]: o*; null: no segment is corrected
  void* out = nullptr;               // [rows, heads, head_dim]
  // o* - o of probes whose rows another tile corrects (stride above kTileRows).
  float* differences = nullptr;  // [num_segments, kMaxFarProbes, heads, head_dim]
};

inline constexpr int kTileRows = 128;     // queries of one head that a block of threads handles
inline constexpr int kMaxSegment = 1024;  // tokens, of the policy
inline constexpr int kMaxFarProbes = kMaxSegment / (2 * kTileRows);

// Tensor cores; bf16 and head_dim 64 or 128.
bool CanAttendMma(const AttentionShape& shape, DType dtype);
void LaunchAttendMma(const AttendParams& p, bool far_probes, cudaStream_t stream);
// A warp per query; any dtype and head_dim a multiple of 8 up to 256. Slow, exact in fp32.
void LaunchAttendSimple(const AttendParams& p, cudaStream_t stream);
// Adds what the segments read to their sequences' counters.
void LaunchCountPairs(const AttendParams& p, cudaStream_t stream);

}  // namespace entropyserve::cuda
