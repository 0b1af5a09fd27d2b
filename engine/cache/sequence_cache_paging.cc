// How a cache's tokens leave the pool and come back, between turns.
#include <algorithm>
#include <cstring>

#include "engine/base/status_macros.h"
#include "engine/cache/sequence_cache.h"
#include "kernels/check.h"
#include "kernels/kv_view.h"

namespace entropyserve {

int64_t CacheState::pages() const {
  int64_t n = 0;
  for (const int32_t length : lengths) n += PagesFor(length);
  return n;
}

SequenceCache::SequenceCache(Backend* backend, PagePool* pool, AttentionShape shape,
                             const CacheState& state)
    : SequenceCache(backend, pool, shape) {
  Check(state.lengths.size() == heads_.size(), "a length for every head");
  for (size_t h = 0; h < heads_.size(); ++h) heads_[h].past = state.lengths[h];
  position_ = state.position;
  ever_compressed_ = state.ever_compressed;
  resident_ = false;
}

CacheState SequenceCache::state() const {
  Check(!in_turn_, "a turn is open");
  CacheState state{{}, position_, ever_compressed_};
  for (const Head& head : heads_) state.lengths.push_back(head.past);
  return state;
}

void SequenceCache::CopyOut(std::byte* out, int64_t first, int64_t count) const {
  Check(!in_turn_ && resident_, "only a resident cache between turns can be copied out");
  std::vector<int32_t> pages, rows;  // of each page: tokens
  int64_t at = 0;
  for (const Head& head : heads_) {
    for (size_t i = 0; i < head.pages.size(); ++i, ++at) {
      if (at < first || at >= first + count) continue;
      pages.push_back(head.pages[i]);
      rows.push_back(std::min<int32_t>(kPageTokens, head.past - int32_t(i) * kPageTokens));
    }
  }
  backend_->CopyPagesOut(out, pool_->kv(), pages);
  for (size_t i = 0; i < pages.size(); ++i) {
    std::byte* part = out + int64_t(i) * pool_->page_bytes();
    for (const PagePart& p : PageParts(pool_->kv(), 0)) {
      const size_t row = p.bytes / kPageTokens;
      std::memset(part + rows[i] * row, 0, (kPageTokens - rows[i]) * row);
      part += p.bytes;
    }
  }
}

void SequenceCache::PageOut() {
  Check(!in_turn_ && resident_, "only a resident cache between turns can leave");
  for (Head& head : heads_) ReleaseAll(&head.pages);
  resident_ = false;
}

absl::Status SequenceCache::TakeBack() {
  Check(!in_turn_ && !resident_, "the tokens are here already");
  RETURN_IF_ERROR(Reserve(state().pages(), "session"));
  for (Head& head : heads_) TakePages(PagesFor(head.past), &head.pages);
  resident_ = true;
  return absl::OkStatus();
}

void SequenceCache::CopyIn(const std::byte* in, int64_t first, int64_t count) {
  Check(resident_ && appended_ == 0, "pages are filled before a turn runs");
  std::vector<int32_t> pages;
  int64_t at = 0;
  for (const Head& head : heads_) {
    for (int64_t i = 0; i < PagesFor(head.past); ++i, ++at) {
      if (at >= first && at < first + count) pages.push_back(head.pages[i]);
    }
  }
  backend_->CopyPagesIn(pool_->kv(), pages, in);
}

}  // namespace entropyserve
