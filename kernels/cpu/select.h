// The operators that choose: past blocks for a prefill (SelectBlocks), cached tokens for what
// follows (SelectTokens, Compact). CpuBackend's methods of the same names call these. Formulas:
// ARCHITECTURE.md, "The method"; paper: EntropyInfer, arXiv 2606.09508.
//
// None of them can fail on a batch that Validate() and the engine accepted; results do not depend
// on the number of threads.
#pragma once

#include "kernels/backend.h"

namespace entropyserve {

class ThreadPool;

namespace cpu {

struct Workers;

// Writes p.lists for every segment of the batch, and p.probe_out where the policy's correction is
// on. Advances the sequences' HeadStates and counters; fills their trace buffers.
void SelectBlocks(Workers& workers, const SelectParams& p);

// Writes p.indices and p.counts for every kv head of one sequence and layer.
void SelectTokens(Workers& workers, const SelectTokensParams& p);

// Copies the chosen tokens of one sequence and layer into p.new_pages.
void Compact(ThreadPool& pool, const CompactParams& p);

}  // namespace cpu
}  // namespace entropyserve
