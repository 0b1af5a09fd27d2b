// A paged cache of random contents for tests of the attention operators, and exact attention over
// it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/kv_view.h"

namespace entropyserve {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Rng {
  std::mt19937 engine;
  explicit Rng(uint32_t seed) : engine(seed) {}
  int Int(int low, int high) { return std::uniform_int_distribution(low, high)(engine); }
  template <typename T>
  T Pick(std::initializer_list<T> list) {
    return list.begin()[Int(0, int(list.size()) - 1)];
  }
  float Normal(float scale = 1) { return std::normal_distribution<float>(0, scale)(engine); }
};

// An array of floats or bf16, as the backend sees it.
class Tensor {
 public:
  Tensor(DType dtype, size_t n, float fill = kNan) : dtype_(dtype) {
    if (dtype == DType::kF32) {
      f32_.assign(n, fill);
    } else {
      bf16_.assign(n, ToBF16(fill));
    }
  }
  float at(size_t i) const { return dtype_ == DType::kF32 ? f32_.at(i) : FromBF16(bf16_.at(i)); }
  void set(size_t i, float x) {
    if (dtype_ == DType::kF32) {
      f32_.at(i) = x;
    } else {
      bf16_.at(i) = ToBF16(x);
    }
  }
  size_t size() const { return dtype_ == DType::kF32 ? f32_.size() : bf16_.size(); }
  void* data() { return dtype_ == DType::kF32 ? static_cast<void*>(f32_.data()) : bf16_.data(); }

 private:
  DType dtype_;
  std::vector<float> f32_;
  std::vector<bf16_t> bf16_;
};

// A pool whose every number is NaN until a kernel writes it, and page tables of shuffled pages.
class World {
 public:
  World(Rng& rng, DType dtype, AttentionShape shape, int64_t pages)
      : rng_(rng),
        dtype_(dtype),
        shape_(shape),
        k_(dtype, size_t(pages * kPageTokens * shape.head_dim)),
        v_(dtype, k_.size()),
        positions_(size_t(pages * kPageTokens), -1),
        free_(size_t(pages)) {
    std::iota(free_.begin(), free_.end(), 0);
    std::shuffle(free_.begin(), free_.end(), rng.engine);
  }

  KvPool pool() {
    return {.k = k_.data(),
            .v = v_.data(),
            .positions = positions_.data(),
            .dtype = dtype_,
            .head_dim = shape_.head_dim,
            .pages = int64_t(positions_.size()) / kPageTokens};
  }

  // A page table row per (layer, kv head), null where n is 0.
  struct Table {
    std::vector<int32_t> pages;
    int32_t per_head = 0;
    const int32_t* data() const { return per_head ? pages.data() : nullptr; }
  };
  Table MakeTable(int32_t per_head) {
    Table table{{}, per_head};
    for (int i = 0; i < shape_.layers * shape_.kv_heads * per_head; ++i) {
      EXPECT_FALSE(free_.empty());
      table.pages.push_back(free_.back());
      free_.pop_back();
    }
    return table;
  }

  // Random keys and values of past token i, at position `position`.
  void FillPast(const HeadView& view, int32_t i, int32_t position) {
    const int64_t row = view.PastRow(i);
    for (int32_t c = 0; c < shape_.head_dim; ++c) {
      k_.set(size_t(row * shape_.head_dim + c), rng_.Normal());
      v_.set(size_t(row * shape_.head_dim + c), rng_.Normal());
    }
    positions_[size_t(row)] = position;
  }

  float k(int64_t row, int32_t c) const { return k_.at(size_t(row * shape_.head_dim + c)); }
  float v(int64_t row, int32_t c) const { return v_.at(size_t(row * shape_.head_dim + c)); }
  int32_t position(int64_t row) const { return positions_[size_t(row)]; }

 private:
  Rng& rng_;
  DType dtype_;
  AttentionShape shape_;
  Tensor k_, v_;
  std::vector<int32_t> positions_;
  std::vector<int32_t> free_;
};

// One sequence's memory.
struct Sequence {
  World::Table pages, bounds, window_pages;
  std::vector<HeadLength> lengths;
  SeqCounters counters;
  BatchSeq seq;
};

inline std::unique_ptr<Sequence> MakeSequence(Rng& rng, World& world, const AttentionShape& shape,
                                              int32_t past, int32_t turn_total, int32_t block,
                                              int32_t window) {
  auto s = std::make_unique<Sequence>();
  const int32_t heads = shape.layers * shape.kv_heads;
  for (int32_t h = 0; h < heads; ++h) {
    // Heads end with different lengths.
    s->lengths.push_back({.past = past > 0 ? rng.Int(1, past) : 0, .base = 0});
  }
  s->pages = world.MakeTable(PagesFor(past) + PagesFor(turn_total));
  s->bounds = world.MakeTable(block > 0 ? PagesFor(CeilDiv(turn_total, block)) : 0);
  s->window_pages =
      world.MakeTable(window > 0 ? CeilDiv(window * shape.group(), 2 * kPageTokens) : 0);
  BatchSeq& seq = s->seq;
  seq.pages = s->pages.data(), seq.max_pages = s->pages.per_head;
  seq.bounds = s->bounds.data(), seq.max_bounds = s->bounds.per_head;
  seq.window_pages = s->window_pages.data(), seq.max_window_pages = s->window_pages.per_head;
  seq.window = window;
  seq.lengths = s->lengths.data();
  seq.counters = &s->counters;
  seq.turn_total = turn_total;
  seq.position = past * 2;  // positions of a compressed past have gaps
  seq.policy.block = block > 0 ? block : 8;
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {
      const HeadView view = ViewHead(seq, shape.kv_heads, layer, kv);
      for (int32_t i = 0; i < view.past; ++i) world.FillPast(view, i, 2 * i);
    }
  }
  return s;
}

struct Step {
  std::vector<BatchSeq> seqs;
  std::vector<BatchSegment> segments;
  std::vector<int32_t> decodes;
  Batch batch;

  void Finish() {
    batch.num_seqs = int32_t(seqs.size());
    batch.num_segments = int32_t(segments.size());
    batch.num_decodes = int32_t(decodes.size());
    batch.seqs = batch.device_seqs = seqs.data();
    batch.segments = batch.device_segments = segments.data();
    batch.decodes = batch.device_decodes = decodes.data();
    batch.rows = 0;
    for (const BatchSeq& seq : seqs) batch.rows += seq.rows;
  }
};

// Adds `rows` further tokens of `s` to the step.
inline void AddToStep(Step& step, Sequence& s, int32_t rows) {
  BatchSeq seq = s.seq;
  seq.rows = rows;
  for (const BatchSeq& other : step.seqs) seq.row_begin += other.rows;
  if (seq.decoding()) step.decodes.push_back(int32_t(step.seqs.size()));
  for (int32_t row = 0; !seq.decoding() && row < rows; row += seq.policy.segment) {
    step.segments.push_back({.seq = int32_t(step.seqs.size()),
                             .row_begin = seq.row_begin + row,
                             .rows = std::min(seq.policy.segment, rows - row),
                             .index = (seq.appended + row) / seq.policy.segment});
  }
  step.seqs.push_back(seq);
  s.seq.appended += rows;
  s.seq.position += rows;
}

// Exact attention of q over the listed pool rows, and how far rounding may take a kernel from it.
struct Reference {
  std::vector<double> out, allowed;
};
inline Reference Attend(const World& world, const std::vector<double>& q,
                        const std::vector<int64_t>& rows, DType dtype) {
  const double scale = 1 / std::sqrt(double(q.size()));
  Reference r{std::vector<double>(q.size(), 0.0), std::vector<double>(q.size(), 0.0)};
  std::vector<double> scores;
  double max = -INFINITY, sum = 0, terms = 0;
  for (int64_t row : rows) {
    double dot = 0, size = 0;
    for (size_t c = 0; c < q.size(); ++c) {
      dot += q[c] * double(world.k(row, int32_t(c)));
      size += std::abs(q[c] * double(world.k(row, int32_t(c))));
    }
    scores.push_back(dot * scale);
    max = std::max(max, scores.back());
    terms = std::max(terms, size * scale);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    const double p = std::exp(scores[i] - max);
    sum += p;
    for (size_t c = 0; c < q.size(); ++c) {
      r.out[c] += p * double(world.v(rows[i], int32_t(c)));
      r.allowed[c] += p * std::abs(double(world.v(rows[i], int32_t(c))));
    }
  }
  // A score errs by some f32 roundings of its terms, its probability relatively by as much; with
  // bf16, probabilities and outputs are rounded to 2^-9.
  const double relative = (dtype == DType::kF32 ? 1e-6 : 5e-3) + 4e-7 * terms;
  for (size_t c = 0; c < q.size(); ++c) {
    r.out[c] /= sum;
    r.allowed[c] *= relative / sum;
  }
  return r;
}

inline std::vector<double> Vector(const Tensor& t, int64_t row, int32_t d) {
  std::vector<double> v;
  for (int32_t c = 0; c < d; ++c) v.push_back(double(t.at(size_t(row * d + c))));
  return v;
}

inline AttentionShape RandomShape(Rng& rng) {
  AttentionShape shape;
  shape.layers = 2;
  shape.kv_heads = rng.Int(1, 3);
  shape.heads = shape.kv_heads * rng.Pick({1, 2, 3, 7});
  shape.head_dim = rng.Pick({8, 24, 32, 64, 80, 96, 128});
  return shape;
}

// What QkvPost reads, and what it should make of it.
struct QkvInputs {
  Tensor qkv, q;
  std::vector<float> q_norm, k_norm, inv_freq;
  float rope_scale = 1;
  bool norm = false;

  QkvInputs(Rng& rng, DType dtype, const AttentionShape& shape, int32_t rows)
      : qkv(dtype, size_t(rows * (shape.heads + 2 * shape.kv_heads) * shape.head_dim)),
        q(dtype, size_t(rows * shape.heads * shape.head_dim)),
        norm(rng.Int(0, 1)) {
    // 6: nearly one-hot attention.
    const float scale = rng.Pick({1.0f, 6.0f});
    for (size_t i = 0; i < qkv.size(); ++i) qkv.set(i, rng.Normal(scale));
    for (int32_t c = 0; c < shape.head_dim; ++c) {
      q_norm.push_back(1 + rng.Normal(0.1f));
      k_norm.push_back(1 + rng.Normal(0.1f));
    }
    for (int32_t c = 0; c < shape.head_dim / 2; ++c) {
      inv_freq.push_back(std::pow(10000.0f, -2.0f * float(c) / float(shape.head_dim)));
    }
    rope_scale = rng.Pick({1.0f, 1.2f});
  }
  QkvParams Params(const Batch& batch, const KvPool& pool, const AttentionShape& shape,
                   int32_t layer) {
    QkvParams p;
    p.batch = &batch, p.pool = pool, p.shape = shape, p.layer = layer;
    p.qkv = qkv.data(), p.q = q.data(), p.dtype = pool.dtype;
    if (norm) p.q_norm = q_norm.data(), p.k_norm = k_norm.data();
    p.inv_freq = inv_freq.data(), p.rope_scale = rope_scale;
    return p;
  }
  // Head h of [q heads, k heads] after norm and RoPE.
  std::vector<double> Expected(const AttentionShape& shape, int64_t row, int32_t h,
                               int32_t position) const {
    const int32_t d = shape.head_dim, all = shape.heads + 2 * shape.kv_heads;
    std::vector<double> x = Vector(qkv, row * all + h, d), y(x);
    if (norm) {
      double squares = 0;
      for (double v : x) squares += v * v;
      const std::vector<float>& weight = h < shape.heads ? q_norm : k_norm;
      for (int32_t c = 0; c < d; ++c) x[c] *= double(weight[c]) / std::sqrt(squares / d + 1e-6);
    }
    for (int32_t c = 0; c < d / 2; ++c) {
      const double angle = double(float(position) * inv_freq[c]);  // transformers: an f32 product
      const double cos = std::cos(angle) * double(rope_scale),
                   sin = std::sin(angle) * double(rope_scale);
      y[c] = x[c] * cos - x[c + d / 2] * sin;
      y[c + d / 2] = x[c + d / 2] * cos + x[c] * sin;
    }
    return y;
  }
};

}  // namespace entropyserve
