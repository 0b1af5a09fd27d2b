// QkvPost, PrefillAttention and DecodeAttention on the paged cache against naive attention in
// double precision, on random shapes, page tables and block lists.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/ops.h"
#include "kernels/kv_view.h"
#include "tests/attention_testing.h"

namespace entropyserve {
namespace {

// portable: prefill without AMX, where the CPU has it.
struct Variant {
  DType dtype;
  bool portable;
};

class Attention : public testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    seed_ = std::random_device{}();
    RecordProperty("seed", int(seed_));
  }
  uint32_t seed_ = 0;
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2);
  cpu::Workers workers_{2, GetParam().portable ? CpuFeatures{} : DetectCpuFeatures()};
};
INSTANTIATE_TEST_SUITE_P(Types, Attention,
                         testing::Values(Variant{DType::kF32, false}, Variant{DType::kBF16, false},
                                         Variant{DType::kBF16, true}),
                         [](const auto& info) {
                           return std::string(Name(info.param.dtype)) +
                                  (info.param.portable ? "_portable" : "");
                         });

TEST_P(Attention, QkvPostFillsTheCache) {
  const DType dtype = GetParam().dtype;
  for (int round = 0; round < 6; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed_ << " round " << round);
    Rng rng(seed_ + uint32_t(round));
    const AttentionShape shape = RandomShape(rng);
    const int32_t d = shape.head_dim, layer = rng.Int(0, 1);
    const int32_t block = rng.Pick({8, 16, 32, 64}), window = rng.Pick({0, 8, 32});
    const int32_t total = rng.Int(1, 300);
    World world(rng, dtype, shape, 400);
    auto s = MakeSequence(rng, world, shape, rng.Pick({0, 70}), total, block, window);
    const int32_t start = s->seq.position;
    std::vector<QkvInputs> inputs;
    std::vector<std::pair<int32_t, int32_t>> where;  // of token t: its inputs and row
    for (int32_t done = 0; done < total;) {          // in steps of any length: blocks may span two
      const int32_t rows = std::min(total - done, rng.Int(1, 150));
      Step step;
      AddToStep(step, *s, rows);
      step.Finish();
      inputs.emplace_back(rng, dtype, shape, rows);
      inputs.back().norm = inputs[0].norm, inputs.back().rope_scale = inputs[0].rope_scale;
      backend_->QkvPost(inputs.back().Params(step.batch, world.pool(), shape, layer));
      for (int32_t r = 0; r < rows; ++r) where.emplace_back(int32_t(inputs.size()) - 1, r);
      done += rows;
    }
    const double tolerance = dtype == DType::kF32 ? 1e-4 : 1e-2;
    for (int32_t t = 0; t < total; ++t) {
      const auto [index, row] = where[size_t(t)];
      const QkvInputs& in = inputs[size_t(index)];
      for (int32_t h = 0; h < shape.heads; ++h) {
        const std::vector<double> expected = in.Expected(shape, row, h, start + t);
        for (int32_t c = 0; c < d; ++c) {
          const double got = double(in.q.at(size_t((row * shape.heads + h) * d + c)));
          ASSERT_NEAR(got, expected[c], tolerance * (1 + std::abs(expected[c])));
          if (window > 0 && t >= total - window) {  // the ring holds q itself
            const HeadView view = ViewHead(s->seq, shape.kv_heads, layer, h / shape.group());
            const WindowSlot slot = WindowRow(
                view.window_pages, (start + t) % window * shape.group() + h % shape.group());
            ASSERT_EQ(double(slot.k_half ? world.k(slot.row, c) : world.v(slot.row, c)), got);
          }
        }
      }
      for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {
        const HeadView view = ViewHead(s->seq, shape.kv_heads, layer, kv);
        const int64_t at = view.TurnRow(t);
        ASSERT_EQ(world.position(at), start + t);
        const std::vector<double> expected = in.Expected(shape, row, shape.heads + kv, start + t);
        const int64_t value =
            row * (shape.heads + 2 * shape.kv_heads) + shape.heads + shape.kv_heads + kv;
        for (int32_t c = 0; c < d; ++c) {
          ASSERT_NEAR(double(world.k(at, c)), expected[c], tolerance * (1 + std::abs(expected[c])));
          ASSERT_EQ(world.v(at, c), in.qkv.at(size_t(value * d + c)));
        }
      }
    }
    for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {  // exact, the last block may be partial
      const HeadView view = ViewHead(s->seq, shape.kv_heads, layer, kv);
      for (int32_t j = 0; j * block < total; ++j) {
        for (int32_t c = 0; c < d; ++c) {
          float max = -INFINITY, min = INFINITY;
          for (int32_t t = j * block; t < std::min(total, (j + 1) * block); ++t) {
            max = std::max(max, world.k(view.TurnRow(t), c));
            min = std::min(min, world.k(view.TurnRow(t), c));
          }
          ASSERT_EQ(world.k(view.BoundsRow(j), c), max);
          ASSERT_EQ(world.v(view.BoundsRow(j), c), min);
        }
      }
    }
  }
}

// ---- PrefillAttention
// ---------------------------------------------------------------------------

struct Lists {
  std::vector<int32_t> counts, blocks;
  int32_t capacity = 0;
  BlockLists view() { return {counts.data(), blocks.data(), capacity}; }
};

// Random lists: dense, empty, some or all visible blocks.
Lists RandomLists(Rng& rng, const Step& step, const AttentionShape& shape, int32_t capacity) {
  Lists lists;
  lists.capacity = capacity;
  for (const BatchSegment& segment : step.segments) {
    const PrefillParams& policy = step.seqs[size_t(segment.seq)].policy;
    const int32_t visible = segment.index * policy.segment / policy.block;
    for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {
      std::vector<int32_t> all(static_cast<size_t>(visible));
      std::iota(all.begin(), all.end(), 0);
      std::shuffle(all.begin(), all.end(), rng.engine);
      all.resize(size_t(rng.Pick({0, rng.Int(0, visible), rng.Int(0, visible), visible})));
      std::sort(all.begin(), all.end());
      lists.counts.push_back(rng.Int(0, 3) == 0 ? -1 : int32_t(all.size()));
      all.resize(size_t(capacity), -12345);
      lists.blocks.insert(lists.blocks.end(), all.begin(), all.end());
    }
  }
  return lists;
}

// The pool rows that query `i` of a segment reads.
std::vector<int64_t> Reads(const HeadView& view, const BatchSegment& segment,
                           const PrefillParams& policy, const Lists& lists, int64_t list,
                           int32_t i) {
  std::vector<int64_t> rows;
  for (int32_t t = 0; t < view.past; ++t) rows.push_back(view.PastRow(t));
  const int32_t begin = segment.index * policy.segment;
  const int32_t count = lists.counts[size_t(list)];
  for (int32_t t = 0; t <= begin + i; ++t) {
    const int32_t* blocks = lists.blocks.data() + list * lists.capacity;
    if (count < 0 || t >= begin ||
        std::find(blocks, blocks + count, t / policy.block) != blocks + count) {
      rows.push_back(view.TurnRow(t));
    }
  }
  return rows;
}

TEST_P(Attention, PrefillAgreesWithNaive) {
  const DType dtype = GetParam().dtype;
  for (int round = 0; round < 10; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed_ << " round " << round);
    Rng rng(seed_ + uint32_t(round));
    const AttentionShape shape = RandomShape(rng);
    const int32_t d = shape.head_dim, layer = rng.Int(0, 1);
    World world(rng, dtype, shape, 1200);
    Step step;
    std::vector<std::unique_ptr<Sequence>> sequences;
    for (int i = rng.Int(1, 2); i > 0; --i) {
      const int32_t total = rng.Int(1, 900);
      sequences.push_back(MakeSequence(rng, world, shape, rng.Pick({0, 1, 64, 150}), total, 0, 0));
      PrefillParams& policy = sequences.back()->seq.policy;
      policy.segment = rng.Pick({128, 256});
      policy.block = rng.Pick({8, 16, 32, 64});
      policy.correction = rng.Pick({0, 32, policy.segment});
      // A first chunk fills the cache; the second is the step.
      const int32_t first = rng.Int(0, (total - 1) / policy.segment) * policy.segment;
      if (first > 0) {
        Step earlier;
        AddToStep(earlier, *sequences.back(), first);
        earlier.Finish();
        QkvInputs inputs(rng, dtype, shape, first);
        backend_->QkvPost(inputs.Params(earlier.batch, world.pool(), shape, layer));
      }
      AddToStep(step, *sequences.back(), total - first);
    }
    step.Finish();
    QkvInputs inputs(rng, dtype, shape, step.batch.rows);
    backend_->QkvPost(inputs.Params(step.batch, world.pool(), shape, layer));
    Lists lists = RandomLists(rng, step, shape, 900 / 8 + 1);
    std::vector<float> probes(inputs.q.size());
    for (float& x : probes) x = rng.Normal();
    Tensor out(dtype, inputs.q.size());
    PrefillAttentionParams p;
    p.batch = &step.batch, p.pool = world.pool(), p.shape = shape, p.layer = layer;
    p.q = inputs.q.data(), p.lists = lists.view(), p.probe_out = probes.data(), p.out = out.data();
    cpu::PrefillAttention(workers_, p);

    std::vector<uint64_t> pairs(sequences.size(), 0);
    for (size_t index = 0; index < step.segments.size(); ++index) {
      const BatchSegment& segment = step.segments[index];
      const BatchSeq& seq = step.seqs[size_t(segment.seq)];
      for (int32_t h = 0; h < shape.heads; ++h) {
        const int32_t kv = h / shape.group();
        const int64_t list = int64_t(index) * shape.kv_heads + kv;
        const HeadView view = ViewHead(seq, shape.kv_heads, layer, kv);
        const bool sparse = lists.counts[size_t(list)] >= 0;
        std::vector<double> delta(size_t(d), 0.0), delta_allowed(size_t(d), 0.0);
        for (int32_t i = 0; i < segment.rows; ++i) {
          const std::vector<int64_t> rows = Reads(view, segment, seq.policy, lists, list, i);
          pairs[size_t(segment.seq)] += rows.size();
          // All probes (they matter to others) and every seventh query.
          const bool probe = sparse && seq.policy.correction > 0 && i % seq.policy.correction == 0;
          if (!probe && i % 7 != 0 && i != segment.rows - 1) continue;
          const int64_t at = int64_t{segment.row_begin + i} * shape.heads + h;
          const Reference r = Attend(world, Vector(inputs.q, at, d), rows, dtype);
          for (int32_t c = 0; c < d; ++c) {
            if (probe) {
              delta[c] = double(probes[size_t(at * d + c)]) - r.out[c];
              delta_allowed[c] = r.allowed[c];
            }
            const double expected = r.out[c] + delta[c];
            const double rounding = dtype == DType::kF32 ? 1e-6 : 4e-3;
            ASSERT_NEAR(double(out.at(size_t(at * d + c))), expected,
                        r.allowed[c] + delta_allowed[c] + rounding * std::abs(expected))
                << "segment " << index << " head " << h << " query " << i << " channel " << c;
          }
        }
      }
    }
    for (size_t i = 0; i < sequences.size(); ++i) EXPECT_EQ(sequences[i]->counters.pairs, pairs[i]);
  }
}

// What else is in the step must not change a bit of a sequence's attention.
TEST_P(Attention, PrefillDoesNotDependOnTheBatch) {
  const DType dtype = GetParam().dtype;
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  Rng rng(seed_);
  const AttentionShape shape{.layers = 1, .heads = 6, .kv_heads = 2, .head_dim = 64};
  World world(rng, dtype, shape, 300);
  constexpr int32_t kTokens = 500;
  auto s = MakeSequence(rng, world, shape, 40, kTokens, 0, 0);
  auto other = MakeSequence(rng, world, shape, 0, 300, 0, 0);
  s->seq.policy.segment = other->seq.policy.segment = 128;
  const BatchSeq start = s->seq;
  Step both, alone;
  AddToStep(both, *other, 300);
  AddToStep(both, *s, kTokens);
  both.Finish();
  QkvInputs inputs(rng, dtype, shape, both.batch.rows);
  backend_->QkvPost(inputs.Params(both.batch, world.pool(), shape, 0));
  Lists lists;
  lists.capacity = 1;
  lists.counts.assign(both.segments.size() * 2, -1);
  lists.blocks.assign(lists.counts.size(), 0);
  PrefillAttentionParams p;
  Tensor out(dtype, inputs.q.size());
  p.batch = &both.batch, p.pool = world.pool(), p.shape = shape, p.q = inputs.q.data();
  p.lists = lists.view(), p.out = out.data();
  cpu::PrefillAttention(workers_, p);

  // Alone, and one segment per step.
  Tensor again(dtype, out.size());
  s->seq = start;
  for (int32_t done = 0; done < kTokens; done += 128) {
    Step step;
    const int32_t rows = std::min(128, kTokens - done);
    AddToStep(step, *s, rows);
    step.Finish();
    const size_t skip = size_t(300 + done) * 6 * 64;
    p.batch = &step.batch;
    p.q = static_cast<std::byte*>(inputs.q.data()) + skip * SizeOf(dtype);
    p.out = static_cast<std::byte*>(again.data()) + skip * SizeOf(dtype);
    cpu::PrefillAttention(workers_, p);
  }
  for (size_t i = size_t{300} * 6 * 64; i < out.size(); ++i) ASSERT_EQ(out.at(i), again.at(i)) << i;
}

// ---- DecodeAttention
// ----------------------------------------------------------------------------

TEST_P(Attention, DecodeAgreesWithNaive) {
  const DType dtype = GetParam().dtype;
  for (int round = 0; round < 12; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed_ << " round " << round);
    Rng rng(seed_ + uint32_t(round));
    const AttentionShape shape = RandomShape(rng);
    const int32_t d = shape.head_dim, layer = rng.Int(0, 1);
    World world(rng, dtype, shape, 1200);
    Step step;
    std::vector<std::unique_ptr<Sequence>> sequences;
    for (int i = rng.Int(1, 3); i > 0; --i) {
      const int32_t turn = rng.Pick({1, 2, 63, 64, 65, 511, 512, rng.Int(1, 1100)});
      sequences.push_back(MakeSequence(rng, world, shape, rng.Pick({0, 1, 130}), turn, 0, 0));
      Sequence& s = *sequences.back();
      Step earlier;
      if (turn > 1) {
        AddToStep(earlier, s, turn - 1);
        earlier.Finish();
        QkvInputs inputs(rng, dtype, shape, turn - 1);
        backend_->QkvPost(inputs.Params(earlier.batch, world.pool(), shape, layer));
      }
      s.seq.turn_total = 0;
      // Part of the turn may be in `base`, part in `appended`.
      const int32_t base = rng.Int(0, s.seq.appended);
      for (HeadLength& length : s.lengths) length.base = base;
      s.seq.appended -= base;
      AddToStep(step, s, 1);
    }
    step.Finish();
    QkvInputs inputs(rng, dtype, shape, step.batch.rows);
    backend_->QkvPost(inputs.Params(step.batch, world.pool(), shape, layer));
    Tensor out(dtype, inputs.q.size());
    DecodeAttentionParams p;
    p.batch = &step.batch, p.pool = world.pool(), p.shape = shape, p.layer = layer;
    p.q = inputs.q.data(), p.out = out.data();
    backend_->DecodeAttention(p);
    for (const BatchSeq& seq : step.seqs) {
      for (int32_t h = 0; h < shape.heads; ++h) {
        const HeadView view = ViewHead(seq, shape.kv_heads, layer, h / shape.group());
        std::vector<int64_t> rows;
        for (int32_t t = 0; t < view.past + view.turn + 1; ++t) rows.push_back(view.Row(t));
        const int64_t at = int64_t{seq.row_begin} * shape.heads + h;
        const Reference r = Attend(world, Vector(inputs.q, at, d), rows, dtype);
        for (int32_t c = 0; c < d; ++c) {
          ASSERT_NEAR(double(out.at(size_t(at * d + c))), r.out[c], r.allowed[c]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace entropyserve
