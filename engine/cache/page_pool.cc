#include "engine/cache/page_pool.h"

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace entropyserve {

int64_t PagePool::PageBytes(DType dtype, int head_dim) {
  return kPageTokens * (2 * int64_t{head_dim} * int64_t(SizeOf(dtype)) + int64_t{sizeof(int32_t)});
}

absl::StatusOr<std::unique_ptr<PagePool>> PagePool::Create(Backend* backend, DType dtype,
                                                           int head_dim, int64_t pages) {
  Check(pages > 0 && pages < int64_t{1} << 31, "page count");
  KvPool kv{.dtype = dtype, .head_dim = head_dim, .pages = pages};
  const size_t rows = size_t(pages) * kPageTokens;
  kv.k = backend->Alloc(rows * head_dim * SizeOf(dtype));
  kv.v = backend->Alloc(rows * head_dim * SizeOf(dtype));
  kv.positions = static_cast<int32_t*>(backend->Alloc(rows * sizeof(int32_t)));
  std::unique_ptr<PagePool> pool(new PagePool(backend, kv));
  if (!kv.k || !kv.v || !kv.positions) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the KV cache needs ", pages * PageBytes(dtype, head_dim),
                     " bytes, more than is free; lower --kv-bytes"));
  }
  return pool;
}

PagePool::PagePool(Backend* backend, KvPool kv) : backend_(backend), kv_(kv) {
  free_.reserve(kv.pages);
  for (int64_t page = kv.pages - 1; page >= 0; --page) free_.push_back(int32_t(page));
  references_.assign(kv.pages, 0);
}

PagePool::~PagePool() {
  for (void* p : {kv_.k, kv_.v, static_cast<void*>(kv_.positions)}) {
    if (p) backend_->Free(p);
  }
}

bool PagePool::Reserve(int64_t n) {
  if (n > available()) return false;
  reserved_ += n;
  return true;
}

void PagePool::Unreserve(int64_t n) {
  Check(n >= 0 && n <= reserved_, "more pages returned than reserved");
  reserved_ -= n;
}

void PagePool::Take(std::span<int32_t> out) {
  Unreserve(int64_t(out.size()));
  for (int32_t& page : out) {
    page = free_.back();
    free_.pop_back();
    references_[page] = 1;
  }
}

void PagePool::AddReference(int32_t page) {
  Check(references_[page] > 0, "reference to a free page");
  ++references_[page];
}

void PagePool::Release(int32_t page) {
  Check(references_[page] > 0, "page freed twice");
  if (--references_[page] == 0) free_.push_back(page);
}

}  // namespace entropyserve
