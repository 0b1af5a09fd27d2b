// One attention layer's inputs as plain arrays, and the same inputs in a paged cache with shuffled
// pages: what tests of the selection operators, and policy_check, run on.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/kv_view.h"

namespace entropyserve {

// Floats are already rounded to `dtype`.
struct LayerInputs {
  AttentionShape shape;
  DType dtype = DType::kF32;
  int32_t layer = 0;
  int32_t turn = 0;                      // tokens of the turn
  std::vector<int32_t> past;             // [kv_heads] tokens that earlier turns left
  std::vector<float> q;                  // [turn, heads, head_dim]
  std::vector<std::vector<float>> k, v;  // [kv_heads][past + turn, head_dim]

  const float* Query(int32_t token, int32_t head) const {
    return q.data() + (int64_t{token} * shape.heads + head) * shape.head_dim;
  }
  // Tokens count over both runs.
  const float* Key(int32_t kv, int32_t token) const {
    return k[kv].data() + int64_t{token} * shape.head_dim;
  }
  const float* Value(int32_t kv, int32_t token) const {
    return v[kv].data() + int64_t{token} * shape.head_dim;
  }
};

inline float RoundTo(DType dtype, float x) {
  return dtype == DType::kF32 ? x : FromBF16(ToBF16(x));
}

// Keys and queries share directions, so that attention is neither uniform nor one-hot.
inline LayerInputs RandomInputs(std::mt19937& rng, AttentionShape shape, DType dtype, int32_t turn,
                                std::vector<int32_t> past = {}, float scale = 1.0f) {
  std::normal_distribution<float> normal(0, 1);
  LayerInputs in;
  in.shape = shape;
  in.dtype = dtype;
  in.layer = shape.layers - 1;
  in.turn = turn;
  in.past = past.empty() ? std::vector<int32_t>(shape.kv_heads, 0) : past;
  std::vector<float> common(shape.head_dim);
  for (float& x : common) x = normal(rng);
  const auto fill = [&](std::vector<float>& out, int64_t vectors, float share) {
    out.resize(vectors * shape.head_dim);
    for (int64_t i = 0; i < vectors; ++i) {
      const float lean = share * normal(rng);
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        out[i * shape.head_dim + c] = RoundTo(dtype, scale * (normal(rng) + lean * common[c]));
      }
    }
  };
  fill(in.q, int64_t{turn} * shape.heads, 0.3f);
  in.k.resize(shape.kv_heads);
  in.v.resize(shape.kv_heads);
  for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {
    fill(in.k[kv], in.past[kv] + turn, 0.3f);
    fill(in.v[kv], in.past[kv] + turn, 0.0f);
  }
  return in;
}

// Which blocks a segment reads with one kv head.
struct ChosenBlocks {
  bool dense = false;
  std::vector<int32_t> blocks;
  bool operator==(const ChosenBlocks&) const = default;
};

// The inputs in pages. Tokens enter the cache chunk by chunk; what is not cached yet, and
// everything between, is NaN, so that a read outside of what exists shows.
class PagedLayer {
 public:
  PagedLayer(const LayerInputs& in, const PrefillParams& policy, int32_t window, uint32_t seed)
      : in_(in), policy_(policy), window_(window) {
    const AttentionShape& s = in.shape;
    for (int32_t past : in.past) {
      pages_per_head_ = std::max(pages_per_head_, PagesFor(past) + PagesFor(in.turn));
    }
    bounds_per_head_ = PagesFor(CeilDiv(in.turn, policy.block));
    window_per_head_ = CeilDiv(window * s.group(), 2 * kPageTokens);
    const int32_t heads = s.layers * s.kv_heads;
    const int32_t total = heads * (pages_per_head_ + bounds_per_head_ + window_per_head_);
    std::vector<int32_t> free_pages(total);
    std::iota(free_pages.begin(), free_pages.end(), 0);
    std::shuffle(free_pages.begin(), free_pages.end(), std::mt19937(seed));
    const auto take = [&](int64_t n) {
      std::vector<int32_t> table(free_pages.end() - n, free_pages.end());
      free_pages.resize(free_pages.size() - n);
      return table;
    };
    page_table_ = take(int64_t{heads} * pages_per_head_);
    bounds_table_ = take(int64_t{heads} * bounds_per_head_);
    window_table_ = take(int64_t{heads} * window_per_head_);
    AllocatePool(total);
    lengths_.resize(heads);
    states_.resize(heads);
    for (int32_t kv = 0; kv < s.kv_heads; ++kv) {
      lengths_[HeadIndex(kv)].past = in.past[kv];
      for (int32_t i = 0; i < in.past[kv]; ++i) WriteToken(kv, i);
    }
  }
  PagedLayer(const PagedLayer&) = delete;
  PagedLayer& operator=(const PagedLayer&) = delete;

  // Room for a trace of every segment.
  void Trace() {
    const int32_t segments = CeilDiv(in_.turn, policy_.segment);
    const size_t n = size_t(in_.shape.layers) * in_.shape.kv_heads * segments;
    trace_entropy.assign(n, -1);
    trace_budget.assign(n, -1);
    trace_selected.assign(n, -2);
  }
  int64_t TraceIndex(int32_t kv, int32_t s) const {
    return int64_t{HeadIndex(kv)} * CeilDiv(in_.turn, policy_.segment) + s;
  }

  // Puts turn tokens up to `end` into the cache, with bounds and the window's queries.
  void Cache(int32_t end) {
    for (; cached_ < end; ++cached_) {
      for (int32_t kv = 0; kv < in_.shape.kv_heads; ++kv) {
        WriteToken(kv, in_.past[kv] + cached_);
        WriteBounds(kv, cached_);
        WriteWindow(kv, cached_);
      }
    }
  }

  // The step that prefills turn tokens [begin, end); segments start at multiples of S.
  const Batch& Step(int32_t begin, int32_t end) {
    Cache(end);
    const int64_t row = int64_t{in_.shape.heads} * in_.shape.head_dim;
    Pack(in_.q.data() + begin * row, (end - begin) * row, &q_);
    seq_ = Describe();
    seq_.rows = end - begin;
    seq_.appended = begin;
    seq_.position = first_position() + begin;
    seq_.turn_total = in_.turn;
    segments_.clear();
    for (int32_t at = begin; at < end; at += policy_.segment) {
      segments_.push_back({.seq = 0,
                           .row_begin = at - begin,
                           .rows = std::min(policy_.segment, end - at),
                           .index = at / policy_.segment});
    }
    batch_ = {.rows = end - begin,
              .num_seqs = 1,
              .num_segments = int32_t(segments_.size()),
              .seqs = &seq_,
              .segments = segments_.data(),
              .device_seqs = &seq_,
              .device_segments = segments_.data()};
    const size_t lists = segments_.size() * in_.shape.kv_heads;
    capacity_ = std::max(1, CeilDiv(in_.turn, policy_.block));
    counts_.assign(lists, -7);
    blocks_.assign(lists * capacity_, -7);
    probe_out.assign((end - begin) * row, std::numeric_limits<float>::quiet_NaN());
    return batch_;
  }

  SelectParams Select() {
    return {.batch = &batch_,
            .pool = pool_,
            .shape = in_.shape,
            .layer = in_.layer,
            .q = q_.data(),
            .lists = Lists(),
            .probe_out = probe_out.data()};
  }

  // Attention of the step; `out` [rows, heads, head_dim] of the pool's type.
  PrefillAttentionParams Attention(void* out) {
    return {.batch = &batch_,
            .pool = pool_,
            .shape = in_.shape,
            .layer = in_.layer,
            .q = q_.data(),
            .lists = Lists(),
            .probe_out = probe_out.data(),
            .out = out};
  }

  // The sequence after its prefill, for SelectTokens and Compact.
  BatchSeq AfterPrefill() const {
    BatchSeq seq = Describe();
    seq.appended = cached_;
    seq.position = first_position() + cached_;
    return seq;
  }

  // Lists of the step, [segments of the step][kv_heads].
  std::vector<std::vector<ChosenBlocks>> Chosen() const {
    std::vector<std::vector<ChosenBlocks>> chosen(segments_.size());
    for (size_t i = 0; i < segments_.size(); ++i) {
      for (int32_t kv = 0; kv < in_.shape.kv_heads; ++kv) {
        const size_t at = i * in_.shape.kv_heads + kv;
        const int32_t* list = blocks_.data() + at * capacity_;
        ChosenBlocks one;
        one.dense = counts_[at] < 0;
        if (!one.dense) one.blocks.assign(list, list + counts_[at]);
        chosen[i].push_back(one);
      }
    }
    return chosen;
  }
  void Replace(int32_t segment, int32_t kv, const std::vector<int32_t>& blocks) {
    const size_t at = size_t(segment) * in_.shape.kv_heads + kv;
    counts_[at] = int32_t(blocks.size());
    std::copy(blocks.begin(), blocks.end(), blocks_.begin() + at * capacity_);
  }

  int32_t Position(int32_t kv, int32_t token) const {
    return token < in_.past[kv] ? 2 * token : first_position() + token - in_.past[kv];
  }
  float Stored(const void* half, int64_t row, int32_t c) const {
    const int64_t at = row * in_.shape.head_dim + c;
    return in_.dtype == DType::kF32 ? static_cast<const float*>(half)[at]
                                    : FromBF16(static_cast<const bf16_t*>(half)[at]);
  }

  // Fresh pages of a pool that grows; ids in random order.
  std::vector<int32_t> AddPages(int32_t n) {
    std::vector<int32_t> fresh(n);
    std::iota(fresh.begin(), fresh.end(), int32_t(pool_.pages));
    std::shuffle(fresh.begin(), fresh.end(), std::mt19937(uint32_t(n)));
    const size_t half = size_t(pool_.pages + n) * kPageTokens * in_.shape.head_dim;
    k_.resize(half * SizeOf(in_.dtype));
    v_.resize(half * SizeOf(in_.dtype));
    positions_.resize(size_t(pool_.pages + n) * kPageTokens, -1);
    pool_.k = k_.data(), pool_.v = v_.data(), pool_.positions = positions_.data();
    pool_.pages += n;
    return fresh;
  }

  const KvPool& pool() const { return pool_; }
  const HeadState& state(int32_t kv) const { return states_[HeadIndex(kv)]; }
  int32_t cached() const { return cached_; }

  SeqCounters counters;
  std::vector<float>
      probe_out;  // [rows of the step, heads, head_dim]; NaN where nothing was written
  std::vector<float> trace_entropy, trace_budget;
  std::vector<int32_t> trace_selected;

 private:
  int32_t HeadIndex(int32_t kv) const { return in_.layer * in_.shape.kv_heads + kv; }
  // True positions: those of earlier turns have gaps, as after a compression.
  int32_t first_position() const { return 2 * *std::max_element(in_.past.begin(), in_.past.end()); }
  BlockLists Lists() { return {counts_.data(), blocks_.data(), capacity_}; }

  void AllocatePool(int32_t pages) {
    const int64_t elements = int64_t{pages} * kPageTokens * in_.shape.head_dim;
    const std::vector<float> nothing(elements, std::numeric_limits<float>::quiet_NaN());
    Pack(nothing.data(), elements, &k_);
    Pack(nothing.data(), elements, &v_);
    positions_.assign(int64_t{pages} * kPageTokens, -1);
    pool_ = {.k = k_.data(),
             .v = v_.data(),
             .positions = positions_.data(),
             .dtype = in_.dtype,
             .head_dim = in_.shape.head_dim,
             .pages = pages};
  }

  void Pack(const float* src, int64_t n, std::vector<uint8_t>* dst) const {
    dst->resize(n * SizeOf(in_.dtype));
    for (int64_t i = 0; i < n; ++i) Put(dst->data(), i, src[i]);
  }
  void Put(void* base, int64_t at, float x) const {
    if (in_.dtype == DType::kF32) {
      static_cast<float*>(base)[at] = x;
    } else {
      static_cast<bf16_t*>(base)[at] = ToBF16(x);
    }
  }
  void PutVector(void* half, int64_t row, const float* src) {
    for (int32_t c = 0; c < in_.shape.head_dim; ++c) {
      Put(half, row * in_.shape.head_dim + c, src[c]);
    }
  }

  BatchSeq Describe() const {
    auto* self = const_cast<PagedLayer*>(this);
    BatchSeq seq;
    seq.pages = page_table_.data();
    seq.bounds = bounds_table_.data();
    seq.window_pages = window_table_.data();
    seq.lengths = lengths_.data();
    seq.states = self->states_.data();
    seq.counters = &self->counters;
    if (!trace_entropy.empty()) {
      seq.trace_entropy = self->trace_entropy.data();
      seq.trace_budget = self->trace_budget.data();
      seq.trace_selected = self->trace_selected.data();
      seq.trace_segments = CeilDiv(in_.turn, policy_.segment);
    }
    seq.max_pages = pages_per_head_;
    seq.max_bounds = bounds_per_head_;
    seq.max_window_pages = window_per_head_;
    seq.window = window_;
    seq.policy = policy_;
    return seq;
  }

  HeadView View(int32_t kv) const {
    return ViewHead(Describe(), in_.shape.kv_heads, in_.layer, kv);
  }

  void WriteToken(int32_t kv, int32_t token) {
    const int64_t row = View(kv).Row(token);
    PutVector(pool_.k, row, in_.Key(kv, token));
    PutVector(pool_.v, row, in_.Value(kv, token));
    pool_.positions[row] = Position(kv, token);
  }

  void WriteBounds(int32_t kv, int32_t token) {
    const int32_t block = token / policy_.block;
    const int64_t row = View(kv).BoundsRow(block);
    std::vector<float> high(in_.shape.head_dim), low(high);
    for (int32_t t = block * policy_.block; t <= token; ++t) {
      const float* key = in_.Key(kv, in_.past[kv] + t);
      for (int32_t c = 0; c < in_.shape.head_dim; ++c) {
        const bool first = t == block * policy_.block;
        high[c] = first ? key[c] : std::max(high[c], key[c]);
        low[c] = first ? key[c] : std::min(low[c], key[c]);
      }
    }
    PutVector(pool_.k, row, high.data());
    PutVector(pool_.v, row, low.data());
  }

  void WriteWindow(int32_t kv, int32_t token) {
    const int32_t group = in_.shape.group(), slot = (first_position() + token) % window_;
    const int32_t* table = View(kv).window_pages;
    for (int32_t g = 0; g < group; ++g) {
      const WindowSlot at = WindowRow(table, slot * group + g);
      PutVector(at.k_half ? pool_.k : pool_.v, at.row, in_.Query(token, kv * group + g));
    }
  }

  const LayerInputs& in_;
  const PrefillParams policy_;
  const int32_t window_;
  int32_t pages_per_head_ = 0, bounds_per_head_ = 0, window_per_head_ = 0;
  int32_t cached_ = 0;  // turn tokens in the cache
  std::vector<int32_t> page_table_, bounds_table_, window_table_;
  std::vector<uint8_t> k_, v_, q_;
  std::vector<int32_t> positions_;
  KvPool pool_;
  std::vector<HeadLength> lengths_;
  std::vector<HeadState> states_;
  BatchSeq seq_;
  std::vector<BatchSegment> segments_;
  Batch batch_;
  int32_t capacity_ = 0;
  std::vector<int32_t> counts_, blocks_;
};

}  // namespace entropyserve
