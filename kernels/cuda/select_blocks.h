// SelectBlocks: estimates, budgets and lists of a batch's segments, all on the device. Segments are
// worked on in slices whose scores stay in L2 (ARCHITECTURE.md, "The method").
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/backend.h"
#include "kernels/cuda/mass.h"

namespace entropyserve::cuda {

// What is known of one (segment, kv head).
struct RowStat {
  float high;     // largest score (box)
  float inverse;  // 1 / sum of e^(score - high); probe: 1
  float entropy;  // nats
  float covered;  // mass outside the visible blocks (probe)
  float budget;   // tokens; NaN: no rule ran
  int32_t limit;  // blocks
};

struct SelectLaunch {
  const BatchSeq* seqs = nullptr;
  const BatchSegment* segments = nullptr;  // of the batch
  int32_t begin = 0, count = 0;            // the slice
  int32_t layer = 0;
  AttentionShape shape;
  DType dtype = DType::kF32;     // of pool and q
  const void* pool_k = nullptr;  // [pages, kPageTokens, head_dim]; bounds: max
  const void* pool_v = nullptr;  // bounds: min
  const void* q = nullptr;       // [rows, heads, head_dim]
  BlockLists lists;
  RowStat* stats = nullptr;   // [segments of the batch, kv_heads]
  float* centers = nullptr;   // [count, heads, head_dim]
  float* scores = nullptr;    // [count, kv_heads, stride]; box: logits, probe: mass
  int64_t stride = 0;         // >= visible blocks of the slice's segments
  MassItem* items = nullptr;  // [count, kv_heads]
};

// Centres and scores of box segments; all segments of the launch belong to one sequence.
void LaunchBoxScores(const SelectLaunch& p, cudaStream_t stream);
bool CanScoreMma(const AttentionShape& shape, DType dtype);
void LaunchBoxScoresMma(const SelectLaunch& p,
                        cudaStream_t stream);                       // LaunchBoxScores' second half
void LaunchProbeItems(const SelectLaunch& p, cudaStream_t stream);  // items of probe sequences
void LaunchRowStats(const SelectLaunch& p, cudaStream_t stream);
void LaunchBudgets(const SelectLaunch& p, cudaStream_t stream);  // advances HeadStates
// Budgets of one whole-prompt sequence: its segments [begin, begin + count), all of them.
void LaunchWholePromptBudgets(const SelectLaunch& p, cudaStream_t stream);
void LaunchChoose(const SelectLaunch& p, cudaStream_t stream);  // lists, counters, traces

// Scratch for steps within these limits.
size_t SelectScratchBytes(const Backend::Limits& limits);
// The operator but for the correction's probes. `hopper`: through sm90::LaunchBlockMass where it
// can.
void RunSelectBlocks(const SelectParams& p, bool hopper, void* scratch, size_t scratch_bytes,
                     cudaStream_t stream);

}  // namespace entropyserve::cuda
