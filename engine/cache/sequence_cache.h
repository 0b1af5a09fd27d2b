// The KV cache of one sequence: which pages hold what, for every kv head of every layer.
//
// Life: BeginTurn, then (Append, a step, Advance) for every step of the prefill and the decode,
// with Compress at most once in between and once at the end, then EndTurn (park) or destruction. A
// turn that is given up during its prefill is undone by RollBack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "engine/cache/page_pool.h"
#include "engine/cache/turn_plan.h"
#include "kernels/backend.h"
#include "kernels/device_array.h"

namespace entropyserve {

// What a cache between turns is, besides its pages' contents.
struct CacheState {
  std::vector<int32_t> lengths;  // [layers * kv_heads] cached tokens of each head
  int64_t position = 0;          // true position of the next token
  bool ever_compressed = false;
  bool operator==(const CacheState&) const = default;

  int64_t pages() const;  // that the tokens take
};

// Owned by the engine thread; not thread-safe.
class SequenceCache {
 public:
  SequenceCache(Backend* backend, PagePool* pool, AttentionShape shape);
  // A cache whose tokens are elsewhere: TakeBack and CopyIn bring them.
  SequenceCache(Backend* backend, PagePool* pool, AttentionShape shape, const CacheState& state);
  ~SequenceCache();  // releases every page and reservation
  SequenceCache(const SequenceCache&) = delete;
  SequenceCache& operator=(const SequenceCache&) = delete;

  // Pages a turn may take beyond what is cached already, at worst.
  int64_t WorstCasePages(const TurnPlan& plan) const;

  // Reserves the worst case and allocates tables. RESOURCE_EXHAUSTED when pages or memory are not
  // there now; nothing has changed then.
  absl::Status BeginTurn(const TurnPlan& plan);

  // Makes room for n more tokens in every head, before the step that writes them.
  void Append(int64_t n);
  // The step has written them.
  void Advance(int64_t n);
  // Fills the cache's part of a BatchSeq: tables, lengths, appended, position.
  void Describe(BatchSeq* seq) const;

  // The prefill is over: block bounds go back to the pool.
  void EndPrefill();

  // Tokens per kv head that `kv` keeps at this length.
  int64_t ResolveBudget(const KvParams& kv) const;
  // The longest head's length.
  int64_t MaxLength() const;
  // Whether `kv` would drop anything worth the work: heads longer than the budget in the mean, or
  // than 1.5 budgets once they have been compressed.
  bool WantsCompression(const KvParams& kv) const;
  // Keeps what `kv` chooses by the last window's queries; frees the rest at once.
  void Compress(const KvParams& kv);

  // Ends the turn and keeps the cache: every head becomes one contiguous run of past tokens;
  // tables, window and reservation are given back.
  void EndTurn();
  // Undoes a turn that has not been compressed: the cache is as before BeginTurn.
  void RollBack();

  // A copy that shares all pages. Only between turns.
  std::unique_ptr<SequenceCache> Fork() const;

  // Between turns the tokens can leave the pool and come back (sequence_cache_paging.cc). A cache
  // that is not resident holds no pages; everything but a turn works on it.
  bool resident() const { return resident_; }
  CacheState state() const;
  // Copies pages out, `count` from the first on, counted in the order of heads: all of them are
  // state().pages() * PagePool::page_bytes() bytes. Rows beyond a head's tokens are zeros: pages
  // keep what their last owner left.
  void CopyOut(std::byte* out, int64_t first, int64_t count) const;
  // Gives the pages back.
  void PageOut();
  template <typename F>
  void ForEachPage(F f) const {
    for (const Head& head : heads_) {
      for (const int32_t page : head.pages) f(page);
    }
  }
  // Takes fresh pages for the tokens: the cache is resident, and a turn may begin, but not run
  // before CopyIn has filled them. RESOURCE_EXHAUSTED when they are not available; nothing has
  // changed then.
  absl::Status TakeBack();
  // Fills pages [first, first + count) with what CopyOut wrote.
  void CopyIn(const std::byte* in, int64_t first, int64_t count);

  int64_t position() const { return position_; }  // true position of the next token
  int64_t pages_held() const;                     // shared pages counted in full
  int64_t kv_pages_held() const;                  // without bounds and window queries
  int64_t kv_bytes() const { return kv_pages_held() * pool_->page_bytes(); }
  double MeanLength() const;
  bool in_turn() const { return in_turn_; }
  // What the prefill counted. Synchronizes.
  SeqCounters ReadCounters() const;
  // States of the entropy rule, [layers * kv_heads]. Synchronizes.
  std::vector<HeadState> ReadStates() const;
  // True positions of the cached tokens of a head, in order. Synchronizes.
  std::vector<int32_t> ReadPositions(int layer, int kv_head) const;
  struct TraceData {
    int segments = 0;
    std::vector<float> entropy, budget;
    std::vector<int32_t> selected;
  };
  TraceData ReadTrace() const;

 private:
  struct Head {
    std::vector<int32_t> pages;
    int32_t past = 0;  // tokens
    int32_t base = 0;  // turn tokens when appended_ was last set to 0
  };

  // A turn's tables and state in the backend's memory.
  struct TurnArrays {
    DeviceArray<int32_t> pages;                      // [layers * kv_heads, max_pages_]
    DeviceArray<int32_t> bounds;                     // [layers * kv_heads, max_bounds_]
    DeviceArray<int32_t> window;                     // [layers * kv_heads, max_window_]
    DeviceArray<HeadLength> lengths;                 // [layers * kv_heads]
    DeviceArray<HeadState> states;                   // [layers * kv_heads]
    DeviceArray<SeqCounters> counters;               // [1]
    DeviceArray<float> trace_entropy, trace_budget;  // [layers * kv_heads, trace_segments_]
    DeviceArray<int32_t> trace_selected;             // [layers * kv_heads, trace_segments_]
    DeviceArray<int32_t> scratch;                    // see GatherLayer
  };

  int heads_total() const { return shape_.layers * shape_.kv_heads; }
  int64_t Length(const Head& head) const { return head.past + head.base + appended_; }
  CachedLengths Lengths() const;
  // RESOURCE_EXHAUSTED says what `who` needs. SetReservation then only shrinks it.
  absl::Status Reserve(int64_t pages, absl::string_view who);
  void SetReservation(int64_t pages);
  void TakePages(int n, std::vector<int32_t>* out);
  void ReleasePage(int32_t page);
  // Releases all but the first `first` pages.
  void ReleaseFrom(size_t first, std::vector<int32_t>* pages);
  void ReleaseAll(std::vector<int32_t>* pages);
  void UploadPages(int64_t first_page, int64_t count);
  void UploadLengths();
  void UploadAll();
  template <typename T>
  void Upload(const std::vector<T>& from, T* to) {
    if (!from.empty()) backend_->CopyIn(to, from.data(), from.size() * sizeof(T));
  }
  // Page table entries a head needs at most: past, this turn, and what compression keeps.
  int64_t TablePages(int64_t turn, int64_t kept) const;
  // Fills device_; false when memory is short.
  bool AllocateTurn();
  // Moves, for one layer, the tokens that scratch lists (counts, then indices [kv_heads,
  // capacity], ascending and cache-local) into fresh pages after each head's first `keep_pages`
  // pages, which stay.
  void GatherLayer(int layer, int64_t capacity, const std::vector<int32_t>& counts,
                   const std::vector<int32_t>& keep_pages);
  void RepackLayer(int layer);
  // What is left of a turn needs less after a compression.
  void ShrinkReservation(const KvParams& kv);
  // Gives back everything of a turn but the heads' pages.
  void CloseTurn();

  // Constant after construction.
  Backend* const backend_;
  PagePool* const pool_;
  const AttentionShape shape_;

  std::vector<Head> heads_;  // [layers * kv_heads]
  int32_t appended_ = 0;
  int64_t position_ = 0;
  bool ever_compressed_ = false;
  bool resident_ = true;

  // This turn's.
  bool in_turn_ = false;
  bool compressed_ = false;
  TurnPlan plan_;
  int64_t turn_begin_position_ = 0;
  int64_t reservation_ = 0;               // pages reserved in the pool and not yet taken
  std::vector<int32_t> bounds_, window_;  // pages, [layers * kv_heads, max_bounds / max_window_]
  int32_t max_pages_ = 0, max_bounds_ = 0, max_window_ = 0;
  int32_t trace_segments_ = 0;
  TurnArrays device_;
  int64_t scratch_capacity_ = 0;  // tokens of one head that it can list
};

}  // namespace entropyserve
