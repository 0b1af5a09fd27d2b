// The real engine on a fake model, without a thread and with a clock that tests move: what it does
// is a function of the calls made, so a run can be repeated exactly.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "engine/engine_impl.h"
#include "tests/fake_model.h"

namespace entropyserve {

// Every reading is a nanosecond later than the one before, so that no two moments are equal.
class FakeClock final : public Clock {
 public:
  TimePoint Now() const override { return TimePoint(std::chrono::nanoseconds(++now_)); }
  void Advance(double seconds) { now_ += int64_t(seconds * 1e9); }

 private:
  mutable int64_t now_ = int64_t{1} << 40;
};

// The CPU backend, some of whose allocations fail.
class FlakyBackend final : public Backend {
 public:
  std::function<bool()> fails;  // null: none does

  std::string Description() const override { return cpu_->Description(); }
  DType AutoDType() const override { return cpu_->AutoDType(); }
  bool HasFastE4M3() const override { return cpu_->HasFastE4M3(); }
  // From the heap: quicker than the CPU backend's own pages, and watched by sanitizers.
  void* Alloc(size_t bytes) override {
    if (fails && fails()) return nullptr;
    constexpr size_t kCacheLine = 64;
    bytes = CeilDiv(std::max<size_t>(bytes, 1), kCacheLine) * kCacheLine;
    void* const p = std::aligned_alloc(kCacheLine, bytes);
    std::memset(p, 0, bytes);
    return p;
  }
  void Free(void* p) override { std::free(p); }
  size_t FreeMemory() const override { return cpu_->FreeMemory(); }
  void CopyIn(void* dst, const void* src, size_t bytes) override { cpu_->CopyIn(dst, src, bytes); }
  void CopyIn2D(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                size_t height) override {
    cpu_->CopyIn2D(dst, dst_pitch, src, src_pitch, width, height);
  }
  void CopyOut(void* dst, const void* src, size_t bytes) override {
    cpu_->CopyOut(dst, src, bytes);
  }
  void CopyPagesOut(void* dst, const KvPool& pool, std::span<const int32_t> pages) override {
    cpu_->CopyPagesOut(dst, pool, pages);
  }
  void CopyPagesIn(const KvPool& pool, std::span<const int32_t> pages, const void* src) override {
    cpu_->CopyPagesIn(pool, pages, src);
  }
  void Zero(void* p, size_t bytes) override { cpu_->Zero(p, bytes); }
  void FillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed) override {
    cpu_->FillRandom(p, dtype, n, range, seed);
  }
  void Synchronize() override { cpu_->Synchronize(); }
  size_t Reserve(const Limits& limits) override { return cpu_->Reserve(limits); }
  void Embed(const EmbedParams& p) override { cpu_->Embed(p); }
  void RmsNorm(const RmsNormParams& p) override { cpu_->RmsNorm(p); }
  void Linear(const LinearParams& p) override { cpu_->Linear(p); }
  void SwiGlu(const SwiGluParams& p) override { cpu_->SwiGlu(p); }
  void Quantize(const QuantizeParams& p) override { cpu_->Quantize(p); }
  void GatherRows(const GatherRowsParams& p) override { cpu_->GatherRows(p); }
  void QkvPost(const QkvParams& p) override { cpu_->QkvPost(p); }
  void SelectBlocks(const SelectParams& p) override { cpu_->SelectBlocks(p); }
  void PrefillAttention(const PrefillAttentionParams& p) override { cpu_->PrefillAttention(p); }
  void DecodeAttention(const DecodeAttentionParams& p) override { cpu_->DecodeAttention(p); }
  void SelectTokens(const SelectTokensParams& p) override { cpu_->SelectTokens(p); }
  void Compact(const CompactParams& p) override { cpu_->Compact(p); }
  void Sample(const SampleParams& p) override { cpu_->Sample(p); }
  void CompareLogits(const CompareLogitsParams& p) override { cpu_->CompareLogits(p); }

 private:
  const std::unique_ptr<Backend> cpu_ = MakeCpuBackend(1);
};

struct ManualEngine {
  // `pages`: of the KV pool. Steps are of 256 tokens where the options do not say.
  ManualEngine(EngineOptions options, int64_t pages, std::string model_identity = "fake",
               std::shared_ptr<EngineObserver> observer = nullptr) {
    if (options.step_tokens == 0) options.step_tokens = 256;
    if (options.lone_chunk_tokens == 0) options.lone_chunk_tokens = 512;
    EngineParts parts;
    auto owned_backend = std::make_unique<FlakyBackend>();
    backend = owned_backend.get();
    auto owned_model = std::make_unique<FakeModel>(backend);
    model = owned_model.get();
    auto owned_pool = *PagePool::Create(backend, DType::kF32, FakeConfig().head_dim, pages);
    pool = owned_pool.get();
    parts.backend = std::move(owned_backend);
    parts.model = std::move(owned_model);
    parts.tokenizer = std::make_shared<FakeTokenizer>();
    parts.clock = clock;
    parts.options = options;
    parts.manual = true;
    parts.observer = std::move(observer);
    parts.model_identity = std::move(model_identity);
    std::unique_ptr<SessionDir> dir;
    if (!options.session_dir.empty()) dir = *SessionDir::Open(options.session_dir);
    engine = std::make_unique<EngineImpl>(std::move(parts), std::move(owned_pool), std::move(dir));
  }

  FlakyBackend* backend;
  FakeModel* model;
  PagePool* pool;
  std::shared_ptr<FakeClock> clock = std::make_shared<FakeClock>();
  std::unique_ptr<EngineImpl> engine;
};

}  // namespace entropyserve
