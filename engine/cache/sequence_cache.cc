#include "engine/cache/sequence_cache.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "kernels/check.h"
#include "kernels/kv_view.h"

namespace entropyserve {
namespace {

// Int32s that gathering one layer needs: indices and counts of the kept tokens, and the new page
// table.
int64_t ScratchSize(int64_t kv_heads, int64_t capacity) {
  return kv_heads * (capacity + 1 + PagesFor(capacity) + 1);
}

}  // namespace

SequenceCache::SequenceCache(Backend* backend, PagePool* pool, AttentionShape shape)
    : backend_(backend), pool_(pool), shape_(shape), heads_(shape.layers * shape.kv_heads) {}

SequenceCache::~SequenceCache() {
  CloseTurn();
  for (Head& head : heads_) ReleaseAll(&head.pages);
}

CachedLengths SequenceCache::Lengths() const {
  return {position_, MaxLength(), int64_t(MeanLength()), ever_compressed_};
}

int64_t SequenceCache::WorstCasePages(const TurnPlan& plan) const {
  return entropyserve::WorstCasePages(plan, Lengths(), shape_);
}

int64_t SequenceCache::TablePages(int64_t turn, int64_t kept) const {
  int64_t past = 0;
  for (const Head& head : heads_) past = std::max<int64_t>(past, head.past);
  return PagesFor(past) + PagesFor(turn) + PagesFor(kept) + 2;
}

absl::Status SequenceCache::BeginTurn(const TurnPlan& plan) {
  Check(!in_turn_ && resident_, "a turn is open, or the tokens are elsewhere");
  RETURN_IF_ERROR(Reserve(WorstCasePages(plan), "request"));
  plan_ = plan;
  in_turn_ = true;
  compressed_ = false;
  appended_ = 0;
  turn_begin_position_ = position_;
  for (Head& head : heads_) head.base = 0;
  const TurnLengths t = WorstCaseLengths(plan, Lengths(), shape_.kv_heads);
  max_pages_ = int32_t(TablePages(t.live + t.rest, t.longest));
  max_bounds_ = BoundsPages(plan);
  max_window_ = WindowPages(plan, shape_.group());
  trace_segments_ = plan.trace ? CeilDiv<int64_t>(plan.prompt, plan.prefill.segment) : 0;
  scratch_capacity_ = std::max(t.longest, plan.keep ? t.live + kPageTokens : 0);
  if (!AllocateTurn()) {
    CloseTurn();
    return absl::ResourceExhaustedError("no memory for the request's page tables");
  }
  TakePages(heads_total() * max_bounds_, &bounds_);
  TakePages(heads_total() * max_window_, &window_);
  Upload(bounds_, device_.bounds.data());
  Upload(window_, device_.window.data());
  const size_t traced = size_t(heads_total()) * trace_segments_;
  const std::vector<float> none(traced, std::nanf(""));
  Upload(none, device_.trace_entropy.data());
  Upload(none, device_.trace_budget.data());
  Upload(std::vector<int32_t>(traced, -1), device_.trace_selected.data());
  UploadAll();
  return absl::OkStatus();
}

bool SequenceCache::AllocateTurn() {
  const auto allocate = [this](auto* array, int64_t size) {
    if (size > 0) *array = std::remove_pointer_t<decltype(array)>(backend_, size);
    return size == 0 || array->ok();
  };
  const int64_t n = heads_total();
  return allocate(&device_.pages, n * max_pages_) && allocate(&device_.lengths, n) &&
         allocate(&device_.states, n) && allocate(&device_.counters, 1) &&
         allocate(&device_.bounds, n * max_bounds_) && allocate(&device_.window, n * max_window_) &&
         allocate(&device_.trace_entropy, n * trace_segments_) &&
         allocate(&device_.trace_budget, n * trace_segments_) &&
         allocate(&device_.trace_selected, n * trace_segments_) &&
         allocate(&device_.scratch, ScratchSize(shape_.kv_heads, scratch_capacity_));
}

void SequenceCache::Append(int64_t n) {
  Check(in_turn_, "no turn is open");
  int64_t first = INT64_MAX, end = 0;
  for (Head& head : heads_) {
    const int64_t turn_page = PagesFor(head.past);
    const int64_t need = turn_page + PagesFor(head.base + appended_ + n);
    const int64_t have = int64_t(head.pages.size());
    if (need <= have) continue;
    Check(need <= max_pages_, "page table too short");
    TakePages(int(need - have), &head.pages);
    first = std::min(first, have);
    end = std::max(end, need);
  }
  if (end > first) UploadPages(first, end - first);
}

void SequenceCache::Advance(int64_t n) {
  appended_ += int32_t(n);
  position_ += n;
}

void SequenceCache::Describe(BatchSeq* seq) const {
  seq->pages = device_.pages.data();
  seq->bounds = bounds_.empty() ? nullptr : device_.bounds.data();
  seq->window_pages = window_.empty() ? nullptr : device_.window.data();
  seq->lengths = device_.lengths.data();
  seq->states = device_.states.data();
  seq->counters = device_.counters.data();
  seq->trace_entropy = device_.trace_entropy.data();
  seq->trace_budget = device_.trace_budget.data();
  seq->trace_selected = device_.trace_selected.data();
  seq->trace_segments = trace_segments_;
  seq->max_pages = max_pages_;
  seq->max_bounds = max_bounds_;
  seq->max_window_pages = max_window_;
  seq->window = window_.empty() ? 0 : plan_.kv.window;
  seq->appended = appended_;
  seq->position = int32_t(position_);
}

void SequenceCache::EndPrefill() { ReleaseAll(&bounds_); }

int64_t SequenceCache::ResolveBudget(const KvParams& kv) const { return Budget(kv, position_); }

int64_t SequenceCache::MaxLength() const {
  int64_t longest = 0;
  for (const Head& head : heads_) longest = std::max(longest, Length(head));
  return longest;
}

double SequenceCache::MeanLength() const {
  double sum = 0;
  for (const Head& head : heads_) sum += double(Length(head));
  return sum / double(heads_.size());
}

bool SequenceCache::WantsCompression(const KvParams& kv) const {
  return kv.rule != KvRule::kFull && ExceedsBudget(Lengths(), 0, ResolveBudget(kv));
}

void SequenceCache::Compress(const KvParams& kv) {
  Check(in_turn_ && !window_.empty(), "compression needs the window's queries");
  const int64_t budget = ResolveBudget(kv);
  if (MaxLength() <= budget) return;
  const int64_t kv_heads = shape_.kv_heads;
  const int64_t capacity =
      std::min(MaxLength(), kv.rule == KvRule::kAdaKv ? budget * kv_heads : budget);
  Check(capacity <= scratch_capacity_, "compaction scratch");
  int32_t* const counts = device_.scratch.data();
  int32_t* const indices = counts + kv_heads;
  std::vector<std::vector<int32_t>> kept(shape_.layers, std::vector<int32_t>(kv_heads));
  const int64_t turn_tokens = position_ - turn_begin_position_;
  BatchSeq seq;
  Describe(&seq);
  for (int layer = 0; layer < shape_.layers; ++layer) {
    backend_->SelectTokens({.seq = &seq,
                            .pool = pool_->kv(),
                            .shape = shape_,
                            .layer = layer,
                            .kv = kv,
                            .budget = int32_t(budget),
                            .window_queries = int32_t(std::min<int64_t>(kv.window, turn_tokens)),
                            .indices = indices,
                            .counts = counts,
                            .capacity = int32_t(capacity)});
    backend_->CopyOut(kept[layer].data(), counts, kv_heads * sizeof(int32_t));
    GatherLayer(layer, capacity, kept[layer], std::vector<int32_t>(kv_heads, 0));
  }
  for (int layer = 0; layer < shape_.layers; ++layer) {
    for (int h = 0; h < kv_heads; ++h) {
      Head& head = heads_[layer * kv_heads + h];
      head.past = 0;
      head.base = kept[layer][h];
    }
  }
  appended_ = 0;
  compressed_ = ever_compressed_ = true;
  if (!plan_.keep) ReleaseAll(&window_);
  ShrinkReservation(kv);
  UploadAll();
}

void SequenceCache::ShrinkReservation(const KvParams& kv) {
  const int64_t all = plan_.prompt + plan_.max_new;
  const int64_t rest = std::max<int64_t>(0, all - (position_ - turn_begin_position_));
  int64_t need = 0;
  for (const Head& head : heads_) need += PagesFor(head.base + rest);
  // The turn's last compression may keep more: a fraction grows with the positions.
  const int64_t last_budget = Budget(kv, turn_begin_position_ + all);
  const int64_t transit = plan_.keep ? shape_.kv_heads * (PagesFor(last_budget) + 1) : 0;
  SetReservation(std::min(reservation_, need - kv_pages_held() + transit));
}

void SequenceCache::GatherLayer(int layer, int64_t capacity,
                                const std::vector<int32_t>& host_counts,
                                const std::vector<int32_t>& keep_pages) {
  const int kv_heads = shape_.kv_heads;
  const int64_t max_new = std::max<int64_t>(1, PagesFor(capacity));
  int32_t* const counts = device_.scratch.data();
  int32_t* const indices = counts + kv_heads;
  int32_t* const device_table = indices + kv_heads * capacity;
  std::vector<int32_t> table(kv_heads * max_new, 0);
  std::vector<std::vector<int32_t>> fresh(kv_heads);
  for (int h = 0; h < kv_heads; ++h) {
    TakePages(PagesFor(host_counts[h]), &fresh[h]);
    std::copy(fresh[h].begin(), fresh[h].end(), table.begin() + h * max_new);
  }
  Upload(table, device_table);
  BatchSeq seq;
  Describe(&seq);
  backend_->Compact({.seq = &seq,
                     .pool = pool_->kv(),
                     .shape = shape_,
                     .layer = layer,
                     .indices = indices,
                     .counts = counts,
                     .capacity = int32_t(capacity),
                     .new_pages = device_table,
                     .max_new_pages = int32_t(max_new)});
  for (int h = 0; h < kv_heads; ++h) {
    Head& head = heads_[layer * kv_heads + h];
    ReleaseFrom(keep_pages[h], &head.pages);
    head.pages.insert(head.pages.end(), fresh[h].begin(), fresh[h].end());
  }
}

void SequenceCache::RepackLayer(int layer) {
  const int kv_heads = shape_.kv_heads;
  // Whole pages of past tokens stay (they may be shared); the partial one and the turn move.
  std::vector<int32_t> keep(kv_heads), counts(kv_heads);
  int64_t capacity = 0;
  for (int h = 0; h < kv_heads; ++h) {
    const Head& head = heads_[layer * kv_heads + h];
    keep[h] = head.past / kPageTokens;
    counts[h] = int32_t(Length(head) - int64_t{keep[h]} * kPageTokens);
    capacity = std::max<int64_t>(capacity, counts[h]);
  }
  std::vector<int32_t> indices(kv_heads * capacity, 0);
  for (int h = 0; h < kv_heads; ++h) {
    for (int i = 0; i < counts[h]; ++i) indices[h * capacity + i] = keep[h] * kPageTokens + i;
  }
  Check(capacity <= scratch_capacity_, "repacking scratch");
  Upload(counts, device_.scratch.data());
  Upload(indices, device_.scratch.data() + kv_heads);
  GatherLayer(layer, capacity, counts, keep);
}

void SequenceCache::EndTurn() {
  Check(in_turn_, "no turn is open");
  for (int layer = 0; layer < shape_.layers; ++layer) {
    bool partial = false;
    for (int h = 0; h < shape_.kv_heads; ++h) {
      const Head& head = heads_[layer * shape_.kv_heads + h];
      partial = partial || (head.past % kPageTokens != 0 && head.base + appended_ > 0);
    }
    if (partial) RepackLayer(layer);
  }
  for (Head& head : heads_) {
    head.past = int32_t(Length(head));
    head.base = 0;
    ReleaseFrom(PagesFor(head.past), &head.pages);
  }
  appended_ = 0;
  CloseTurn();
}

void SequenceCache::RollBack() {
  Check(in_turn_ && !compressed_, "only an uncompressed turn can be undone");
  for (Head& head : heads_) {
    ReleaseFrom(PagesFor(head.past), &head.pages);
    head.base = 0;
  }
  appended_ = 0;
  position_ = turn_begin_position_;
  CloseTurn();
}

std::unique_ptr<SequenceCache> SequenceCache::Fork() const {
  Check(!in_turn_, "fork during a turn");
  auto copy = std::make_unique<SequenceCache>(backend_, pool_, shape_);
  copy->heads_ = heads_;
  copy->position_ = position_;
  copy->ever_compressed_ = ever_compressed_;
  copy->resident_ = resident_;
  for (const Head& head : heads_) {
    for (int32_t page : head.pages) pool_->AddReference(page);
  }
  return copy;
}

int64_t SequenceCache::kv_pages_held() const {
  int64_t n = 0;
  for (const Head& head : heads_) n += int64_t(head.pages.size());
  return n;
}

int64_t SequenceCache::pages_held() const {
  return kv_pages_held() + int64_t(bounds_.size() + window_.size());
}

SeqCounters SequenceCache::ReadCounters() const {
  SeqCounters counters;
  if (in_turn_) backend_->CopyOut(&counters, device_.counters.data(), sizeof(counters));
  return counters;
}

std::vector<HeadState> SequenceCache::ReadStates() const {
  std::vector<HeadState> states(heads_.size());
  if (in_turn_)
    backend_->CopyOut(states.data(), device_.states.data(), states.size() * sizeof(HeadState));
  return states;
}

std::vector<int32_t> SequenceCache::ReadPositions(int layer, int kv_head) const {
  const Head& head = heads_[layer * shape_.kv_heads + kv_head];
  std::vector<int32_t> positions;
  auto read = [&](int64_t first_page, int64_t tokens) {
    for (int64_t i = 0; i < tokens; i += kPageTokens) {
      const int64_t n = std::min<int64_t>(kPageTokens, tokens - i);
      const size_t at = positions.size();
      positions.resize(at + n);
      const int32_t page = head.pages[first_page + i / kPageTokens];
      backend_->CopyOut(positions.data() + at, pool_->kv().positions + PageRow(page, 0),
                        n * sizeof(int32_t));
    }
  };
  read(0, head.past);
  read(PagesFor(head.past), head.base + appended_);
  return positions;
}

SequenceCache::TraceData SequenceCache::ReadTrace() const {
  TraceData trace;
  trace.segments = trace_segments_;
  const size_t n = size_t(heads_total()) * trace_segments_;
  trace.entropy.resize(n);
  trace.budget.resize(n);
  trace.selected.resize(n);
  if (n == 0) return trace;
  backend_->CopyOut(trace.entropy.data(), device_.trace_entropy.data(), n * sizeof(float));
  backend_->CopyOut(trace.budget.data(), device_.trace_budget.data(), n * sizeof(float));
  backend_->CopyOut(trace.selected.data(), device_.trace_selected.data(), n * sizeof(int32_t));
  return trace;
}

absl::Status SequenceCache::Reserve(int64_t pages, absl::string_view who) {
  if (!pool_->Reserve(pages)) {
    return absl::ResourceExhaustedError(absl::StrCat("the ", who, " needs ", pages, " KV pages, ",
                                                     pool_->available(), " of ", pool_->total(),
                                                     " are available"));
  }
  reservation_ = pages;
  return absl::OkStatus();
}

void SequenceCache::TakePages(int n, std::vector<int32_t>* out) {
  Check(n <= reservation_, "the turn takes more pages than its worst case");
  const size_t at = out->size();
  out->resize(at + n);
  pool_->Take({out->data() + at, size_t(n)});
  reservation_ -= n;
}

// A page that becomes free during the turn goes back into the turn's reservation: compaction of the
// next layer may need it. SetReservation returns the surplus.
void SequenceCache::ReleasePage(int32_t page) {
  const bool last = pool_->References(page) == 1;
  pool_->Release(page);
  if (last && in_turn_ && pool_->Reserve(1)) ++reservation_;
}

void SequenceCache::ReleaseFrom(size_t first, std::vector<int32_t>* pages) {
  for (size_t i = first; i < pages->size(); ++i) ReleasePage((*pages)[i]);
  pages->resize(first);
}

void SequenceCache::ReleaseAll(std::vector<int32_t>* pages) {
  for (int32_t page : *pages) pool_->Release(page);
  pages->clear();
}

void SequenceCache::SetReservation(int64_t pages) {
  Check(pages >= 0 && pages <= reservation_, "a reservation only shrinks");
  pool_->Unreserve(reservation_ - pages);
  reservation_ = pages;
}

void SequenceCache::UploadPages(int64_t first, int64_t count) {
  std::vector<int32_t> rows(heads_.size() * count, 0);
  for (size_t h = 0; h < heads_.size(); ++h) {
    const std::vector<int32_t>& pages = heads_[h].pages;
    for (int64_t i = 0; i < count && first + i < int64_t(pages.size()); ++i) {
      rows[h * count + i] = pages[first + i];
    }
  }
  backend_->CopyIn2D(device_.pages.data() + first, max_pages_ * sizeof(int32_t), rows.data(),
                     count * sizeof(int32_t), count * sizeof(int32_t), heads_.size());
}

void SequenceCache::UploadLengths() {
  std::vector<HeadLength> lengths(heads_.size());
  for (size_t h = 0; h < heads_.size(); ++h) lengths[h] = {heads_[h].past, heads_[h].base};
  Upload(lengths, device_.lengths.data());
}

void SequenceCache::UploadAll() {
  size_t longest = 0;
  for (const Head& head : heads_) longest = std::max(longest, head.pages.size());
  if (longest > 0) UploadPages(0, int64_t(longest));
  UploadLengths();
}

void SequenceCache::CloseTurn() {
  ReleaseAll(&bounds_);
  ReleaseAll(&window_);
  device_ = {};
  trace_segments_ = 0;
  SetReservation(0);
  in_turn_ = false;
}

}  // namespace entropyserve
