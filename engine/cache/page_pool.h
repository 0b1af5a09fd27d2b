// The one pool of KV pages, and the promise that what is admitted never runs out of them.
//
// A caller first reserves its worst case (Reserve), then takes pages out of that reservation
// (Take). `available` is what nobody has taken or reserved.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace entropyserve {

// Owned by the engine thread; not thread-safe.
class PagePool {
 public:
  // RESOURCE_EXHAUSTED when the backend cannot give `pages` pages.
  static absl::StatusOr<std::unique_ptr<PagePool>> Create(Backend* backend, DType dtype,
                                                          int head_dim, int64_t pages);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // Bytes of one page: K half, V half and positions.
  static int64_t PageBytes(DType dtype, int head_dim);

  const KvPool& kv() const { return kv_; }
  int64_t total() const { return kv_.pages; }
  int64_t used() const { return kv_.pages - int64_t(free_.size()); }
  int64_t reserved() const { return reserved_; }
  int64_t available() const { return int64_t(free_.size()) - reserved_; }
  int64_t page_bytes() const { return PageBytes(kv_.dtype, kv_.head_dim); }

  // False, and nothing happens, when fewer than `n` are available.
  bool Reserve(int64_t n);
  void Unreserve(int64_t n);

  // Takes out.size() pages out of a reservation of at least that many. References start at one.
  void Take(std::span<int32_t> out);
  void AddReference(int32_t page);
  // Gives one reference up; the page is free again when it was the last.
  void Release(int32_t page);
  int32_t References(int32_t page) const { return references_[page]; }

 private:
  PagePool(Backend* backend, KvPool kv);

  Backend* const backend_;
  KvPool kv_;
  int64_t reserved_ = 0;
  std::vector<int32_t> free_;        // a stack: the page freed last is taken next
  std::vector<int32_t> references_;  // [pages]
};

}  // namespace entropyserve
