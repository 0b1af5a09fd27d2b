#include "kernels/cpu/cpu_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "kernels/check.h"
#include "kernels/cpu/memory_info.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/select.h"

namespace entropyserve {

CpuBackend::CpuBackend(int threads) : budget_(cpu::AvailableMemory()), workers_(threads) {}

CpuBackend::~CpuBackend() {
  for (const auto& [p, bytes] : allocations_) munmap(p, bytes);
}

std::string CpuBackend::Description() const {
  const int threads = workers_.pool.threads();
  return "CPU: " + std::to_string(threads) + (threads == 1 ? " thread, " : " threads, ") +
         ToString(workers_.features);
}

DType CpuBackend::AutoDType() const {
  return workers_.features.avx512_bf16 ? DType::kBF16 : DType::kF32;
}

// Straight from the system: zeroed, and pages that are never touched cost nothing. They count as
// taken all the same.
void* CpuBackend::Alloc(size_t bytes) {
  constexpr size_t kPage = 4096, kHugePage = size_t{1} << 21;
  bytes = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  if (bytes > FreeMemory()) return nullptr;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  // Weights are streamed: huge pages spare most of their address look-ups.
  if (bytes >= 4 * kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
  allocations_.emplace(p, bytes);
  allocated_ += bytes;
  return p;
}

void CpuBackend::Free(void* p) {
  if (!p) return;
  const auto it = allocations_.find(p);
  Check(it != allocations_.end(), "Free takes what Alloc returned");
  munmap(p, it->second);
  allocated_ -= it->second;
  allocations_.erase(it);
}

size_t CpuBackend::FreeMemory() const {
  const size_t unspent = budget_ > allocated_ ? budget_ - allocated_ : 0;
  return std::min(unspent, cpu::AvailableMemory());
}

void CpuBackend::CopyIn(void* dst, const void* host_src, size_t bytes) {
  if (bytes > 0) std::memcpy(dst, host_src, bytes);
}
void CpuBackend::CopyIn2D(void* dst, size_t dst_pitch, const void* host_src, size_t src_pitch,
                          size_t width, size_t height) {
  for (size_t row = 0; row < height; ++row) {
    CopyIn(static_cast<std::byte*>(dst) + row * dst_pitch,
           static_cast<const std::byte*>(host_src) + row * src_pitch, width);
  }
}
void CpuBackend::CopyOut(void* host_dst, const void* src, size_t bytes) {
  if (bytes > 0) std::memcpy(host_dst, src, bytes);
}
void CpuBackend::CopyPagesOut(void* host_dst, const KvPool& pool, std::span<const int32_t> pages) {
  auto* to = static_cast<std::byte*>(host_dst);
  for (const int32_t page : pages) {
    for (const PagePart& part : PageParts(pool, page)) {
      std::memcpy(to, part.data, part.bytes);
      to += part.bytes;
    }
  }
}
void CpuBackend::CopyPagesIn(const KvPool& pool, std::span<const int32_t> pages,
                             const void* host_src) {
  const auto* from = static_cast<const std::byte*>(host_src);
  for (const int32_t page : pages) {
    for (const PagePart& part : PageParts(pool, page)) {
      std::memcpy(part.data, from, part.bytes);
      from += part.bytes;
    }
  }
}
void CpuBackend::Zero(void* p, size_t bytes) {
  if (bytes > 0) std::memset(p, 0, bytes);
}

size_t CpuBackend::Reserve(const Limits& limits) {
  const size_t each = cpu::PrefillAttentionScratch(limits.shape);
  size_t taken = 0;
  for (cpu::Workers::PerThread& thread : workers_.threads) {
    thread.scratch.Get(each);
    taken += thread.scratch.size();
  }
  const size_t shared = cpu::DecodeAttentionScratch(limits);
  workers_.shared.Get(shared);
  return taken + workers_.shared.size();
}

void CpuBackend::Embed(const EmbedParams& p) { cpu::Embed(workers_.pool, p); }
void CpuBackend::RmsNorm(const RmsNormParams& p) { cpu::RmsNorm(workers_.pool, p); }
void CpuBackend::Linear(const LinearParams& p) { cpu::Linear(workers_, p); }
void CpuBackend::SwiGlu(const SwiGluParams& p) { cpu::SwiGlu(workers_.pool, p); }
void CpuBackend::Quantize(const QuantizeParams& p) { cpu::Quantize(workers_.pool, p); }
void CpuBackend::GatherRows(const GatherRowsParams& p) { cpu::GatherRows(workers_.pool, p); }
void CpuBackend::QkvPost(const QkvParams& p) { cpu::QkvPost(workers_.pool, p); }
void CpuBackend::SelectBlocks(const SelectParams& p) { cpu::SelectBlocks(workers_, p); }
void CpuBackend::PrefillAttention(const PrefillAttentionParams& p) {
  cpu::PrefillAttention(workers_, p);
}
void CpuBackend::DecodeAttention(const DecodeAttentionParams& p) {
  cpu::DecodeAttention(workers_, p);
}
void CpuBackend::SelectTokens(const SelectTokensParams& p) { cpu::SelectTokens(workers_, p); }
void CpuBackend::Compact(const CompactParams& p) { cpu::Compact(workers_.pool, p); }
void CpuBackend::Sample(const SampleParams& p) { cpu::Sample(workers_.pool, p); }
void CpuBackend::CompareLogits(const CompareLogitsParams& p) {
  cpu::CompareLogits(workers_.pool, p);
}

std::unique_ptr<Backend> MakeCpuBackend(int threads) {
  Check(threads >= 0, "threads is 0 (all cores) or more");
  return std::make_unique<CpuBackend>(threads > 0 ? threads : UsableCores());
}

}  // namespace entropyserve
