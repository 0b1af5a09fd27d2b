// The CPU's operators, one file each; CpuBackend's methods of the same names call them. Results do
// not depend on the number of threads, nor on which other sequences share the step (Linear: up to
// the order of sums inside a matrix product).
#pragma once

#include "kernels/backend.h"
#include "kernels/cpu/workers.h"

namespace entropyserve::cpu {

void Embed(ThreadPool& pool, const EmbedParams& p);
void RmsNorm(ThreadPool& pool, const RmsNormParams& p);
void Linear(Workers& workers, const LinearParams& p);
void SwiGlu(ThreadPool& pool, const SwiGluParams& p);
void QkvPost(ThreadPool& pool, const QkvParams& p);
void PrefillAttention(Workers& workers, const PrefillAttentionParams& p);
void DecodeAttention(Workers& workers, const DecodeAttentionParams& p);
void Sample(ThreadPool& pool, const SampleParams& p);
void CompareLogits(ThreadPool& pool, const CompareLogitsParams& p);

// Bytes of scratch that one thread needs for prefill attention on this shape.
size_t PrefillAttentionScratch(const AttentionShape& shape);
// Bytes of shared scratch that decode attention needs at most.
size_t DecodeAttentionScratch(const Backend::Limits& limits);

}  // namespace entropyserve::cpu
