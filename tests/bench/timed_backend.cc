#include "tests/bench/timed_backend.h"

#include <span>
#include <utility>

namespace entropyserve::bench {
namespace {

class TimedBackend final : public Backend {
 public:
  TimedBackend(std::unique_ptr<Backend> backend, std::shared_ptr<OperatorTimes> times)
      : inner_(std::move(backend)), times_(std::move(times)) {}

  std::string Description() const override { return inner_->Description(); }
  DType AutoDType() const override { return inner_->AutoDType(); }
  bool HasFastE4M3() const override { return inner_->HasFastE4M3(); }
  void* Alloc(size_t bytes) override { return inner_->Alloc(bytes); }
  void Free(void* p) override { inner_->Free(p); }
  size_t FreeMemory() const override { return inner_->FreeMemory(); }
  void FillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed) override {
    inner_->FillRandom(p, dtype, n, range, seed);
  }
  void Synchronize() override { inner_->Synchronize(); }
  size_t Reserve(const Limits& limits) override { return inner_->Reserve(limits); }

  void CopyIn(void* dst, const void* src, size_t bytes) override {
    Time("copies", [&] { inner_->CopyIn(dst, src, bytes); });
  }
  void CopyIn2D(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                size_t height) override {
    Time("copies", [&] { inner_->CopyIn2D(dst, dst_pitch, src, src_pitch, width, height); });
  }
  void CopyOut(void* dst, const void* src, size_t bytes) override {
    Time("copies", [&] { inner_->CopyOut(dst, src, bytes); });
  }
  void Zero(void* p, size_t bytes) override {
    Time("copies", [&] { inner_->Zero(p, bytes); });
  }
  void CopyPagesOut(void* dst, const KvPool& pool, std::span<const int32_t> pages) override {
    Time("copies", [&] { inner_->CopyPagesOut(dst, pool, pages); });
  }
  void CopyPagesIn(const KvPool& pool, std::span<const int32_t> pages, const void* src) override {
    Time("copies", [&] { inner_->CopyPagesIn(pool, pages, src); });
  }

  void Embed(const EmbedParams& p) override {
    phase_ = replaying_ ? Phase::kDecode : Phase::kPrefill;  // a step begins
    Time("embed", [&] { inner_->Embed(p); });
  }
  void RmsNorm(const RmsNormParams& p) override {
    Time("norms", [&] { inner_->RmsNorm(p); });
  }
  void Linear(const LinearParams& p) override {
    const double weights = double(p.w.rows) * double(p.w.cols);
    Time(
        "linear " + std::to_string(p.w.rows) + "x" + std::to_string(p.w.cols),
        [&] { inner_->Linear(p); }, 2 * weights * double(p.rows),
        weights * double(SizeOf(p.w.dtype)));
  }
  void SwiGlu(const SwiGluParams& p) override {
    Time("swiglu", [&] { inner_->SwiGlu(p); });
  }
  void Quantize(const QuantizeParams& p) override {
    Time("quantize", [&] { inner_->Quantize(p); });
  }
  void GatherRows(const GatherRowsParams& p) override {
    Time("gather rows", [&] { inner_->GatherRows(p); });
  }
  void QkvPost(const QkvParams& p) override {
    Time("rope and cache", [&] { inner_->QkvPost(p); });
  }
  void SelectBlocks(const SelectParams& p) override {
    Time("select blocks, probes", [&] { inner_->SelectBlocks(p); });
  }
  void PrefillAttention(const PrefillAttentionParams& p) override {
    Time("prefill attention", [&] { inner_->PrefillAttention(p); });
  }
  void DecodeAttention(const DecodeAttentionParams& p) override {
    Time("decode attention", [&] { inner_->DecodeAttention(p); });
  }
  void SelectTokens(const SelectTokensParams& p) override {
    Time(
        "select tokens", [&] { inner_->SelectTokens(p); }, 0, 0, Phase::kCompress);
  }
  void Compact(const CompactParams& p) override {
    Time(
        "compact", [&] { inner_->Compact(p); }, 0, 0, Phase::kCompress);
  }
  void Sample(const SampleParams& p) override {
    Time("sample", [&] { inner_->Sample(p); });
  }
  void CompareLogits(const CompareLogitsParams& p) override {
    Time("compare logits", [&] { inner_->CompareLogits(p); });
  }

  void Replay(uint64_t key, const std::function<void()>& step) override {
    if (!times_->on()) return inner_->Replay(key, step);
    replaying_ = true;
    step();
    replaying_ = false;
  }

 private:
  template <typename Call>
  void Time(const std::string& name, const Call& call, double flops = 0, double bytes = 0) {
    Time(name, call, flops, bytes, phase_);
  }
  template <typename Call>
  void Time(const std::string& name, const Call& call, double flops, double bytes, Phase phase) {
    if (!times_->on()) return call();
    inner_->Synchronize();
    const auto begin = std::chrono::steady_clock::now();
    call();
    inner_->Synchronize();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    times_->Add(phase, name, {1, seconds.count(), flops, bytes});
  }

  const std::unique_ptr<Backend> inner_;
  const std::shared_ptr<OperatorTimes> times_;
  Phase phase_ = Phase::kPrefill;
  bool replaying_ = false;
};

}  // namespace

std::unique_ptr<Backend> MakeTimedBackend(std::unique_ptr<Backend> backend,
                                          std::shared_ptr<OperatorTimes> times) {
  return std::make_unique<TimedBackend>(std::move(backend), std::move(times));
}

}  // namespace entropyserve::bench
