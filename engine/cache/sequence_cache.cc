#include "engine/cache/sequence_cache.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/kv_view.h"

namespace entropyserve {
namespace {

// Bounds are needed by the box estimator only.
bool NeedsBounds(const PrefillParams& p) { return !p.full && p.estimator == Estimator::kBox; }

int32_t BoundsPages(const TurnPlan& plan) {
  if (!NeedsBounds(plan.prefill)) return 0;
  return PagesFor(CeilDiv<int64_t>(plan.prompt, plan.prefill.block));
}

int32_t WindowPages(const TurnPlan& plan, int group) {
  if (plan.kv.rule == KvRule::kFull) return 0;
  return CeilDiv(group * plan.kv.window, 2 * kPageTokens);
}

int64_t Budget(const KvParams& kv, int64_t positions) {
  const int64_t fraction = int64_t(std::ceil(double(kv.fraction) * double(positions)));
  return std::max<int64_t>(kv.budget, fraction);
}

// Lengths of a turn at worst, in tokens of one head beyond what was cached before it.
struct TurnLengths {
  int64_t live = 0;     // turn tokens before compression, or in all when there is none
  int64_t kept = 0;     // tokens after compression, mean of a layer's heads (0: none)
  int64_t longest = 0;  // the same of one head: adakv may give one head the whole layer's budget
  int64_t rest = 0;     // tokens appended after it
};

struct Before {
  int64_t positions = 0;     // true length before the turn
  int64_t longest_head = 0;  // cached tokens
  int64_t mean_head = 0;     // cached tokens, rounded down
  bool compressed = false;   // ever
  int kv_heads = 0;
};

// A cache is worth compressing when its heads, `appended` tokens later, are longer than the budget;
// one that was compressed before, when they are longer than 1.5 budgets. In the mean: adakv may
// give one head what the others of its layer do without.
bool ExceedsBudget(const Before& before, int64_t appended, int64_t budget) {
  const int64_t length = before.mean_head + appended;
  return before.compressed ? 2 * length > 3 * budget : length > budget;
}

TurnLengths LengthsOf(const TurnPlan& plan, const Before& before) {
  TurnLengths t;
  t.live = plan.prompt + plan.max_new;
  if (plan.kv.rule == KvRule::kFull) return t;
  const int64_t gap = plan.kv.rule == KvRule::kSnapKv ? 0 : plan.kv.gap;
  // No head keeps more than it has.
  const int64_t most = before.longest_head + plan.prompt + plan.max_new;
  const int64_t budget = Budget(plan.kv, before.positions + plan.prompt + plan.max_new);
  const bool shared = plan.kv.rule == KvRule::kAdaKv;
  t.kept = std::min(budget, most);
  t.longest = std::min(shared ? budget * before.kv_heads : budget, most);
  // Compression comes gap tokens after the prompt if the cache is long enough by then. A cache that
  // stays shorter until then keeps growing to the end of the turn.
  const int64_t budget_then = Budget(plan.kv, before.positions + plan.prompt + gap);
  if (plan.max_new > gap && ExceedsBudget(before, plan.prompt + gap, budget_then)) {
    t.live = plan.prompt + gap;
    t.rest = plan.max_new - gap;
  }
  return t;
}

// Int32s that gathering one layer needs: indices and counts of the kept tokens, and the new page
// table.
int64_t ScratchSize(int64_t kv_heads, int64_t capacity) {
  return kv_heads * (capacity + 1 + PagesFor(capacity) + 1);
}

}  // namespace

SequenceCache::SequenceCache(Backend* backend, PagePool* pool, AttentionShape shape)
    : backend_(backend), pool_(pool), shape_(shape), heads_(shape.layers * shape.kv_heads) {}

SequenceCache::~SequenceCache() {
  DropTurnMetadata();
  for (Head& head : heads_) ReleaseAll(&head.pages);
  SetReservation(0);
}

int64_t SequenceCache::WorstCasePages(const TurnPlan& plan) const {
  const TurnLengths t = LengthsOf(
      plan, {position_, MaxLength(), int64_t(MeanLength()), ever_compressed_, shape_.kv_heads});
  const bool compresses = plan.kv.rule != KvRule::kFull;
  // adakv spreads a layer's pages unevenly: one more page a head for the rounding.
  const int64_t after = compresses ? PagesFor(t.kept + t.rest) + 1 : 0;
  const int64_t live = PagesFor(t.live);
  // A kept turn that is repacked copies the page that the past ends in; a fork does not get that
  // page back.
  const int64_t copied = plan.keep ? 1 : 0;
  const int64_t per_head =
      std::max(live + copied, after) + BoundsPages(plan) + WindowPages(plan, shape_.group());
  // In transit while one layer is gathered: what compression keeps, or a turn that is repacked.
  const int64_t transit =
      std::max<int64_t>(compresses ? PagesFor(t.kept) + 1 : 0, plan.keep ? live + 1 : 0);
  return heads_total() * per_head + shape_.kv_heads * transit;
}

int64_t SequenceCache::TablePages(int64_t turn, int64_t kept) const {
  int64_t past = 0;
  for (const Head& head : heads_) past = std::max<int64_t>(past, head.past);
  return PagesFor(past) + PagesFor(turn) + PagesFor(kept) + 2;
}

absl::Status SequenceCache::BeginTurn(const TurnPlan& plan) {
  Check(!in_turn_ && resident_, "a turn is open, or the tokens are elsewhere");
  const int64_t need = WorstCasePages(plan);
  if (!pool_->Reserve(need)) {
    return absl::ResourceExhaustedError(absl::StrCat("the request needs ", need, " KV pages, ",
                                                     pool_->available(), " of ", pool_->total(),
                                                     " are available"));
  }
  reservation_ = need;
  plan_ = plan;
  in_turn_ = true;
  compressed_ = false;
  appended_ = 0;
  turn_begin_position_ = position_;

  const int n = heads_total();
  const TurnLengths t = LengthsOf(
      plan, {position_, MaxLength(), int64_t(MeanLength()), ever_compressed_, shape_.kv_heads});
  for (Head& head : heads_) head.base = 0;
  max_pages_ = int32_t(TablePages(t.live + t.rest, t.longest));
  scratch_capacity_ = std::max(t.longest, plan.keep ? t.live + kPageTokens : 0);
  max_bounds_ = BoundsPages(plan);
  max_window_ = WindowPages(plan, shape_.group());
  trace_segments_ = plan.trace ? CeilDiv<int64_t>(plan.prompt, plan.prefill.segment) : 0;
  device_pages_ = DeviceArray<int32_t>(backend_, int64_t{n} * max_pages_);
  device_lengths_ = DeviceArray<HeadLength>(backend_, n);
  device_states_ = DeviceArray<HeadState>(backend_, n);
  device_counters_ = DeviceArray<SeqCounters>(backend_, 1);
  scratch_ = DeviceArray<int32_t>(backend_, ScratchSize(shape_.kv_heads, scratch_capacity_));
  bool ok = scratch_.ok() && device_pages_.ok() && device_lengths_.ok() && device_states_.ok() &&
            device_counters_.ok();
  if (max_bounds_ > 0) {
    device_bounds_ = DeviceArray<int32_t>(backend_, int64_t{n} * max_bounds_);
    ok = ok && device_bounds_.ok();
  }
  if (max_window_ > 0) {
    device_window_ = DeviceArray<int32_t>(backend_, int64_t{n} * max_window_);
    ok = ok && device_window_.ok();
  }
  if (trace_segments_ > 0) {
    trace_entropy_ = DeviceArray<float>(backend_, int64_t{n} * trace_segments_);
    trace_budget_ = DeviceArray<float>(backend_, int64_t{n} * trace_segments_);
    trace_selected_ = DeviceArray<int32_t>(backend_, int64_t{n} * trace_segments_);
    ok = ok && trace_entropy_.ok() && trace_budget_.ok() && trace_selected_.ok();
  }
  if (!ok) {
    DropTurnMetadata();
    SetReservation(0);
    in_turn_ = false;
    return absl::ResourceExhaustedError("no memory for the request's page tables");
  }
  if (max_bounds_ > 0) {
    TakePages(n * max_bounds_, &bounds_);
    backend_->CopyIn(device_bounds_.data(), bounds_.data(), bounds_.size() * sizeof(int32_t));
  }
  if (max_window_ > 0) {
    TakePages(n * max_window_, &window_);
    backend_->CopyIn(device_window_.data(), window_.data(), window_.size() * sizeof(int32_t));
  }
  if (trace_segments_ > 0) {
    const std::vector<float> none(size_t(n) * trace_segments_, std::nanf(""));
    const std::vector<int32_t> dense(none.size(), -1);
    backend_->CopyIn(trace_entropy_.data(), none.data(), none.size() * sizeof(float));
    backend_->CopyIn(trace_budget_.data(), none.data(), none.size() * sizeof(float));
    backend_->CopyIn(trace_selected_.data(), dense.data(), dense.size() * sizeof(int32_t));
  }
  UploadAll();
  return absl::OkStatus();
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
  seq->pages = device_pages_.data();
  seq->bounds = bounds_.empty() ? nullptr : device_bounds_.data();
  seq->window_pages = window_.empty() ? nullptr : device_window_.data();
  seq->lengths = device_lengths_.data();
  seq->states = device_states_.data();
  seq->counters = device_counters_.data();
  seq->trace_entropy = trace_segments_ ? trace_entropy_.data() : nullptr;
  seq->trace_budget = trace_segments_ ? trace_budget_.data() : nullptr;
  seq->trace_selected = trace_segments_ ? trace_selected_.data() : nullptr;
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
  return kv.rule != KvRule::kFull && ExceedsBudget({position_, MaxLength(), int64_t(MeanLength()),
                                                    ever_compressed_, shape_.kv_heads},
                                                   0, ResolveBudget(kv));
}

void SequenceCache::Compress(const KvParams& kv) {
  Check(in_turn_ && !window_.empty(), "compression needs the window's queries");
  const int64_t budget = ResolveBudget(kv);
  if (MaxLength() <= budget) return;
  const int64_t kv_heads = shape_.kv_heads;
  int64_t capacity = std::min(MaxLength(), kv.rule == KvRule::kAdaKv ? budget * kv_heads : budget);
  Check(capacity <= scratch_capacity_, "compaction scratch");
  int32_t* const counts = scratch_.data();
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
  // What is left of this turn needs less now.
  int64_t held = 0, need = 0;
  const int64_t rest = std::max<int64_t>(0, plan_.prompt + plan_.max_new - turn_tokens);
  for (const Head& head : heads_) {
    held += int64_t(head.pages.size());
    need += PagesFor(head.base + rest);
  }
  // The turn's last compression may keep more: a fraction grows with the positions.
  const int64_t last_budget = Budget(kv, turn_begin_position_ + plan_.prompt + plan_.max_new);
  const int64_t transit = plan_.keep ? kv_heads * (PagesFor(last_budget) + 1) : 0;
  SetReservation(std::min(reservation_, need - held + transit));
  UploadAll();
}

void SequenceCache::GatherLayer(int layer, int64_t capacity,
                                const std::vector<int32_t>& host_counts,
                                const std::vector<int32_t>& keep_pages) {
  const int kv_heads = shape_.kv_heads;
  const int64_t max_new = std::max<int64_t>(1, PagesFor(capacity));
  int32_t* const counts = scratch_.data();
  int32_t* const indices = counts + kv_heads;
  int32_t* const device_table = indices + kv_heads * capacity;
  std::vector<int32_t> table(kv_heads * max_new, 0);
  std::vector<std::vector<int32_t>> fresh(kv_heads);
  for (int h = 0; h < kv_heads; ++h) {
    TakePages(PagesFor(host_counts[h]), &fresh[h]);
    std::copy(fresh[h].begin(), fresh[h].end(), table.begin() + h * max_new);
  }
  backend_->CopyIn(device_table, table.data(), table.size() * sizeof(int32_t));
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
    for (size_t i = keep_pages[h]; i < head.pages.size(); ++i) ReleasePage(head.pages[i]);
    head.pages.resize(keep_pages[h]);
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
  backend_->CopyIn(scratch_.data(), counts.data(), counts.size() * sizeof(int32_t));
  backend_->CopyIn(scratch_.data() + kv_heads, indices.data(), indices.size() * sizeof(int32_t));
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
    const size_t pages = PagesFor(head.past);
    for (size_t i = pages; i < head.pages.size(); ++i) ReleasePage(head.pages[i]);
    head.pages.resize(pages);
  }
  appended_ = 0;
  DropTurnMetadata();
  SetReservation(0);
  in_turn_ = false;
}

void SequenceCache::RollBack() {
  Check(in_turn_ && !compressed_, "only an uncompressed turn can be undone");
  for (Head& head : heads_) {
    const size_t pages = PagesFor(head.past);
    for (size_t i = pages; i < head.pages.size(); ++i) ReleasePage(head.pages[i]);
    head.pages.resize(pages);
    head.base = 0;
  }
  appended_ = 0;
  position_ = turn_begin_position_;
  DropTurnMetadata();
  SetReservation(0);
  in_turn_ = false;
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
  if (in_turn_) backend_->CopyOut(&counters, device_counters_.data(), sizeof(counters));
  return counters;
}

std::vector<HeadState> SequenceCache::ReadStates() const {
  std::vector<HeadState> states(heads_.size());
  if (in_turn_)
    backend_->CopyOut(states.data(), device_states_.data(), states.size() * sizeof(HeadState));
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
  backend_->CopyOut(trace.entropy.data(), trace_entropy_.data(), n * sizeof(float));
  backend_->CopyOut(trace.budget.data(), trace_budget_.data(), n * sizeof(float));
  backend_->CopyOut(trace.selected.data(), trace_selected_.data(), n * sizeof(int32_t));
  return trace;
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
  backend_->CopyIn2D(device_pages_.data() + first, max_pages_ * sizeof(int32_t), rows.data(),
                     count * sizeof(int32_t), count * sizeof(int32_t), heads_.size());
}

void SequenceCache::UploadLengths() {
  std::vector<HeadLength> lengths(heads_.size());
  for (size_t h = 0; h < heads_.size(); ++h) lengths[h] = {heads_[h].past, heads_[h].base};
  backend_->CopyIn(device_lengths_.data(), lengths.data(), lengths.size() * sizeof(HeadLength));
}

void SequenceCache::UploadAll() {
  size_t longest = 0;
  for (const Head& head : heads_) longest = std::max(longest, head.pages.size());
  if (longest > 0) UploadPages(0, int64_t(longest));
  UploadLengths();
}

void SequenceCache::DropTurnMetadata() {
  ReleaseAll(&bounds_);
  ReleaseAll(&window_);
  device_pages_ = {};
  device_bounds_ = {};
  device_window_ = {};
  device_lengths_ = {};
  device_states_ = {};
  device_counters_ = {};
  trace_entropy_ = {};
  trace_budget_ = {};
  trace_selected_ = {};
  trace_segments_ = 0;
  scratch_ = {};
}

}  // namespace entropyserve
