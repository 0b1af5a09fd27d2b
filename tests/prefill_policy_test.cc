// Selection and attention together, through the CPU backend: what a policy's output must equal.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "tests/select_testing.h"

namespace entropyserve {
namespace {

constexpr float kRounding = 2e-5f;  // fp32; outputs are of size 1
constexpr float kRoundingBF16 = 2e-2f;

class PrefillPolicyTest : public testing::Test {
 protected:
  PrefillPolicyTest()
      : seed_(std::random_device{}()),
        rng_(seed_),
        trace_(__FILE__, __LINE__, "seed " + std::to_string(seed_)),
        backend_(MakeCpuBackend(2)) {}

  // Attention outputs of the whole turn, cut into chunks that end at `ends`.
  std::vector<float> Run(const LayerInputs& in, const PrefillParams& policy,
                         const std::vector<int32_t>& ends) {
    PagedLayer paged(in, policy, 8, rng_());
    std::vector<float> all;
    int32_t begin = 0;
    for (int32_t end : ends) {
      paged.Step(begin, end);
      const size_t n = size_t(end - begin) * in.shape.heads * in.shape.head_dim;
      std::vector<uint8_t> out(n * SizeOf(in.dtype));
      backend_->SelectBlocks(paged.Select());
      backend_->PrefillAttention(paged.Attention(out.data()));
      for (size_t i = 0; i < n; ++i) all.push_back(paged.Stored(out.data(), 0, int32_t(i)));
      begin = end;
    }
    return all;
  }

  static float LargestDifference(const std::vector<float>& a, const std::vector<float>& b,
                                 size_t begin, size_t end) {
    float largest = 0;
    for (size_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
    return largest;
  }

  LayerInputs Inputs(int32_t turn, std::vector<int32_t> past = {}, DType dtype = DType::kF32) {
    return RandomInputs(rng_, {.layers = 2, .heads = 6, .kv_heads = 2, .head_dim = 32}, dtype, turn,
                        past);
  }
  // Sparse from the second segment on.
  static PrefillParams Policy() {
    return {.correction = 0, .segment = 128, .dense_prefix = 128, .dense_suffix = 0, .base = 136};
  }

  const uint32_t seed_;
  std::mt19937 rng_;
  testing::ScopedTrace trace_;
  std::unique_ptr<Backend> backend_;
};

TEST_F(PrefillPolicyTest, CorrectionWithStrideOneEqualsFull) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(Name(dtype));
    const float rounding = dtype == DType::kF32 ? kRounding : kRoundingBF16;
    const LayerInputs in = Inputs(900, {70, 131}, dtype);
    PrefillParams policy = Policy();
    const std::vector<float> sparse = Run(in, policy, {900});
    policy.correction = 1;
    const std::vector<float> corrected = Run(in, policy, {256, 900});
    const std::vector<float> full = Run(in, {.full = true, .segment = 128}, {900});
    EXPECT_LT(LargestDifference(corrected, full, 0, full.size()), rounding);
    EXPECT_GT(LargestDifference(sparse, full, 0, full.size()), 10 * rounding)
        << "the policy read everything: nothing was corrected";
  }
}

// o[i] += o*[m] - o[m], m the last probe at or before i.
TEST_F(PrefillPolicyTest, CorrectionAddsTheLastProbesDifference) {
  const LayerInputs in = Inputs(640);
  PrefillParams policy = Policy();
  const std::vector<float> sparse = Run(in, policy, {640});
  policy.correction = 32;
  const std::vector<float> corrected = Run(in, policy, {640});
  const std::vector<float> full = Run(in, {.full = true, .segment = 128}, {640});
  const int32_t row = in.shape.heads * in.shape.head_dim;
  for (int32_t t = 128; t < 640; ++t) {
    const int32_t m = t / 32 * 32;
    for (int32_t c = 0; c < row; ++c) {
      const float expected = sparse[t * row + c] + full[m * row + c] - sparse[m * row + c];
      ASSERT_NEAR(corrected[t * row + c], expected, kRounding) << "token " << t;
    }
  }
}

TEST_F(PrefillPolicyTest, ABudgetOverThePromptEqualsFull) {
  const LayerInputs in = Inputs(700, {5, 64});
  const std::vector<float> full = Run(in, {.full = true, .segment = 128}, {700});
  PrefillParams covering = Policy();
  covering.base = 800;
  PrefillParams coverage = Policy();
  coverage.estimator = Estimator::kProbe;
  coverage.budget = BudgetRule::kCoverage;
  coverage.coverage = 1;
  for (const PrefillParams& policy : {covering, coverage}) {
    EXPECT_LT(LargestDifference(Run(in, policy, {128, 700}), full, 0, full.size()), kRounding);
  }
  PrefillParams paper = covering;
  paper.whole_prompt = true;
  paper.forced = false;
  for (int32_t turn : {700, 767, 768, 769}) {  // its own bound on lists depends on the ragged end
    const LayerInputs whole = Inputs(turn);
    const std::vector<float> expected = Run(whole, {.full = true, .segment = 128}, {turn});
    EXPECT_LT(LargestDifference(Run(whole, paper, {turn}), expected, 0, expected.size()), kRounding)
        << turn;
  }
}

TEST_F(PrefillPolicyTest, OutputsDoNotDependOnChunks) {
  const LayerInputs in = Inputs(900, {70, 131});
  PrefillParams policy = Policy();
  policy.correction = 16;
  policy.base = 160;
  for (BudgetRule rule : {BudgetRule::kEntropy, BudgetRule::kFixed, BudgetRule::kCoverage}) {
    for (Estimator estimator : {Estimator::kBox, Estimator::kProbe}) {
      policy.budget = rule;
      policy.estimator = estimator;
      policy.coverage = 0.7f;
      const std::vector<float> whole = Run(in, policy, {900});
      const std::vector<float> cut = Run(in, policy, {128, 512, 640, 900});
      EXPECT_LT(LargestDifference(whole, cut, 0, whole.size()), kRounding);
    }
  }
}

TEST_F(PrefillPolicyTest, NoSegmentsOutputDependsOnATokenAfterIt) {
  const LayerInputs in = Inputs(900);
  LayerInputs changed = in;
  const int32_t token = 520, segment_begin = 512;
  for (int32_t c = 0; c < 6 * 32; ++c) changed.q[token * 6 * 32 + c] += 4;
  for (int32_t kv = 0; kv < 2; ++kv) {
    for (int32_t c = 0; c < 32; ++c) {
      changed.k[kv][token * 32 + c] += 4;
      changed.v[kv][token * 32 + c] += 4;
    }
  }
  PrefillParams policy = Policy();
  policy.correction = 32;
  const std::vector<float> a = Run(in, policy, {900}), b = Run(changed, policy, {900});
  const size_t before = size_t(segment_begin) * 6 * 32;
  EXPECT_EQ(LargestDifference(a, b, 0, before), 0.0f);
  EXPECT_GT(LargestDifference(a, b, before, a.size()), 0.01f);
}

// Steps of several sequences, each made alone, as one batch over one pool.
class MergedStep {
 public:
  explicit MergedStep(const std::vector<PagedLayer*>& layers) {
    const SelectParams first = layers[0]->Select();
    shape_ = first.shape;
    layer_ = first.layer;
    pool_ = first.pool;
    const int64_t row = int64_t{shape_.heads} * shape_.head_dim;
    int32_t rows = 0, pages = 0;
    for (PagedLayer* layer : layers) {
      const SelectParams p = layer->Select();
      BatchSeq seq = p.batch->seqs[0];
      seq.pages = Moved(seq.pages, seq.max_pages, pages);
      seq.bounds = Moved(seq.bounds, seq.max_bounds, pages);
      seq.row_begin = rows;
      for (int32_t i = 0; i < p.batch->num_segments; ++i) {
        BatchSegment segment = p.batch->segments[i];
        segment.seq = int32_t(seqs_.size());
        segment.row_begin += rows;
        segments_.push_back(segment);
      }
      seqs_.push_back(seq);
      Append(&k_, p.pool.k, p.pool.pages * kPageTokens * shape_.head_dim);
      Append(&v_, p.pool.v, p.pool.pages * kPageTokens * shape_.head_dim);
      Append(&q_, p.q, seq.rows * row);
      capacity_ = std::max(capacity_, p.lists.capacity);
      rows += seq.rows;
      pages += int32_t(p.pool.pages);
    }
    batch_.rows = rows, batch_.num_seqs = int32_t(seqs_.size());
    batch_.num_segments = int32_t(segments_.size());
    batch_.seqs = batch_.device_seqs = seqs_.data();
    batch_.segments = batch_.device_segments = segments_.data();
    pool_.k = k_.data(), pool_.v = v_.data(), pool_.positions = nullptr, pool_.pages = pages;
    counts_.resize(segments_.size() * shape_.kv_heads);
    blocks_.resize(counts_.size() * capacity_);
    probe_out_.resize(rows * row);
    out.resize(rows * row);
  }

  void Run(Backend& backend) {
    const BlockLists lists{counts_.data(), blocks_.data(), capacity_};
    backend.SelectBlocks({.batch = &batch_,
                          .pool = pool_,
                          .shape = shape_,
                          .layer = layer_,
                          .q = q_.data(),
                          .lists = lists,
                          .probe_out = probe_out_.data()});
    backend.PrefillAttention({.batch = &batch_,
                              .pool = pool_,
                              .shape = shape_,
                              .layer = layer_,
                              .q = q_.data(),
                              .lists = lists,
                              .probe_out = probe_out_.data(),
                              .out = out.data()});
  }

  std::vector<float> out;  // [rows, heads, head_dim], sequences one after the other

 private:
  static void Append(std::vector<float>* to, const void* from, int64_t n) {
    to->insert(to->end(), static_cast<const float*>(from), static_cast<const float*>(from) + n);
  }
  // A page table whose pages moved by `offset`.
  const int32_t* Moved(const int32_t* table, int32_t per_head, int32_t offset) {
    std::vector<int32_t> moved(table, table + int64_t{shape_.layers} * shape_.kv_heads * per_head);
    for (int32_t& page : moved) page += offset;
    tables_.push_back(std::move(moved));
    return tables_.back().data();
  }

  AttentionShape shape_;
  int32_t layer_ = 0, capacity_ = 0;
  KvPool pool_;
  Batch batch_;
  std::vector<BatchSeq> seqs_;
  std::vector<BatchSegment> segments_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<float> k_, v_, q_, probe_out_;
  std::vector<int32_t> counts_, blocks_;
};

TEST_F(PrefillPolicyTest, MixedPoliciesInOneBatchDoNotDisturbEachOther) {
  std::vector<PrefillParams> policies(6, Policy());
  policies[0].correction = 32;
  policies[1].full = true;
  policies[2].estimator = Estimator::kProbe, policies[2].budget = BudgetRule::kCoverage;
  policies[2].coverage = 0.6f;
  policies[3].whole_prompt = true, policies[3].forced = false;
  policies[4].budget = BudgetRule::kFixed, policies[4].block = 32, policies[4].base = 160;
  policies[5].correction = 64, policies[5].segment = 256, policies[5].base = 264;
  std::vector<LayerInputs> inputs;
  for (size_t i = 0; i < policies.size(); ++i) inputs.push_back(Inputs(500 + 130 * int32_t(i)));
  std::vector<std::unique_ptr<PagedLayer>> owned, lone;
  std::vector<PagedLayer*> layers;
  std::vector<float> alone;
  for (size_t i = 0; i < policies.size(); ++i) {
    const int32_t turn = inputs[i].turn;
    owned.push_back(std::make_unique<PagedLayer>(inputs[i], policies[i], 8, rng_()));
    owned.back()->Step(0, turn);
    layers.push_back(owned.back().get());
    lone.push_back(std::make_unique<PagedLayer>(inputs[i], policies[i], 8, rng_()));
    lone.back()->Step(0, turn);
    std::vector<float> out(int64_t{turn} * inputs[i].shape.heads * inputs[i].shape.head_dim);
    backend_->SelectBlocks(lone.back()->Select());
    backend_->PrefillAttention(lone.back()->Attention(out.data()));
    alone.insert(alone.end(), out.begin(), out.end());
  }
  MergedStep merged(layers);
  merged.Run(*backend_);
  ASSERT_EQ(merged.out.size(), alone.size());
  EXPECT_LT(LargestDifference(merged.out, alone, 0, alone.size()), kRounding);
  for (size_t i = 0; i < policies.size(); ++i) {
    SCOPED_TRACE(testing::Message() << "sequence " << i);
    EXPECT_EQ(layers[i]->counters.pairs, lone[i]->counters.pairs);
    EXPECT_EQ(layers[i]->counters.box_blocks, lone[i]->counters.box_blocks);
    for (int32_t kv = 0; kv < 2; ++kv) {
      EXPECT_EQ(layers[i]->state(kv).entropy, lone[i]->state(kv).entropy);
      EXPECT_EQ(layers[i]->state(kv).budget, lone[i]->state(kv).budget);
    }
  }
}

}  // namespace
}  // namespace entropyserve
