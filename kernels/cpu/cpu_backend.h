// The CPU backend: memory, and one call per operator (kernels/cpu/ops.h, select.h).
#pragma once

#include <cstddef>
#include <string>
#include <unordered_map>

#include "kernels/backend.h"
#include "kernels/cpu/workers.h"

namespace entropyserve {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads);  // at least 1
  ~CpuBackend() override;

  std::string Description() const override;
  DType AutoDType() const override;
  bool HasFastE4M3() const override { return false; }

  void* Alloc(size_t bytes) override;
  void Free(void* p) override;
  size_t FreeMemory() const override;
  void CopyIn(void* dst, const void* host_src, size_t bytes) override;
  void CopyIn2D(void* dst, size_t dst_pitch, const void* host_src, size_t src_pitch, size_t width,
                size_t height) override;
  void CopyOut(void* host_dst, const void* src, size_t bytes) override;
  void CopyPagesOut(void* host_dst, const KvPool& pool, std::span<const int32_t> pages) override;
  void CopyPagesIn(const KvPool& pool, std::span<const int32_t> pages,
                   const void* host_src) override;
  void Zero(void* p, size_t bytes) override;
  void FillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed) override;
  void Synchronize() override {}
  size_t Reserve(const Limits& limits) override;

  void Embed(const EmbedParams& p) override;
  void RmsNorm(const RmsNormParams& p) override;
  void Linear(const LinearParams& p) override;
  void SwiGlu(const SwiGluParams& p) override;
  void Quantize(const QuantizeParams& p) override;
  void GatherRows(const GatherRowsParams& p) override;
  void QkvPost(const QkvParams& p) override;
  void SelectBlocks(const SelectParams& p) override;
  void PrefillAttention(const PrefillAttentionParams& p) override;
  void DecodeAttention(const DecodeAttentionParams& p) override;
  void SelectTokens(const SelectTokensParams& p) override;
  void Compact(const CompactParams& p) override;
  void Sample(const SampleParams& p) override;
  void CompareLogits(const CompareLogitsParams& p) override;

 private:
  const size_t budget_;  // bytes that were available at the start
  size_t allocated_ = 0;
  std::unordered_map<void*, size_t> allocations_;
  cpu::Workers workers_;
};

}  // namespace entropyserve
