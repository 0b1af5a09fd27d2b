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
void Quantize(ThreadPool& pool, const QuantizeParams& p);
void GatherRows(ThreadPool& pool, const GatherRowsParams& p);
void QkvPost(ThreadPool& pool, const QkvParams& p);
void PrefillAttention(Workers& workers, const PrefillAttentionParams& p);
void DecodeAttention(Workers& workers, const DecodeAttentionParams& p);
void Sample(ThreadPool& pool, const SampleParams& p);
void CompareLogits(ThreadPool& pool, const CompareLogitsParams& p);

// One row as kE4M3; returns its scale. See QuantizeParams.
float QuantizeRow(const float* x, int64_t n, e4m3_t* out);
// Adds bias and the old value where `p` has them.
inline void StoreOutput(const LinearParams& p, int64_t row, int64_t output, float value) {
  if (p.bias) value += p.bias[output];
  const int64_t at = row * p.w.rows + output;
  if (p.out_dtype == DType::kBF16) {
    static_cast<bf16_t*>(p.out)[at] = ToBF16(value);
  } else if (p.accumulate) {
    static_cast<float*>(p.out)[at] += value;
  } else {
    static_cast<float*>(p.out)[at] = value;
  }
}
// Linear of a kE4M3 matrix: the products of what the 8 bits stand for, in f32.
void LinearE4M3(Workers& workers, const LinearParams& p);

// Bytes of scratch that one thread needs for prefill attention on this shape.
size_t PrefillAttentionScratch(const AttentionShape& shape);
// Bytes of shared scratch that decode attention needs at most.
size_t DecodeAttentionScratch(const Backend::Limits& limits);

}  // namespace entropyserve::cpu
