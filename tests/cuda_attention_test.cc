// Prefill attention over lists and decode attention: CUDA against the CPU on the same rounded
// inputs.
#include <gtest/gtest.h>

#include "cuda_world.h"

namespace entropyserve {
namespace {

double Tolerance(DType dtype) { return dtype == DType::kF32 ? 2e-5 : 1e-2; }

PrefillParams SmallPolicy() {
  PrefillParams policy;
  policy.segment = 128;
  policy.dense_prefix = 256;
  policy.dense_suffix = 20;
  policy.first_sparse_layer = 0;
  policy.base = 256;
  policy.correction = 0;
  return policy;
}

struct Case {
  AttentionShape shape;
  DType dtype;
  PrefillParams policy;
  std::vector<int32_t> past;
  int32_t before = 0, rows = 700, total = 700;
};

// The CPU chooses the lists and makes the probes; both sides read them.
void ExpectSameAttention(const Case& c, uint32_t seed) {
  const World world(c.shape, c.dtype,
                    {{.past = c.past,
                      .before = c.before,
                      .rows = c.rows,
                      .turn_total = c.total,
                      .policy = c.policy,
                      .bounds = true},
                     {.past = {5}, .before = 30, .rows = 1}},
                    seed);
  Side cpu(Cpu(), world);
  cpu.SelectBlocks();
  const SeqCounters selected = cpu.Counters(0);
  cpu.PrefillAttention();
  const std::vector<float> expected = cpu.Out();
  for (Backend* backend : {&PortableCuda(), &Cuda()}) {
    Side cuda(*backend, world);
    const std::vector<int32_t> counts = cpu.Counts(), blocks = cpu.Blocks();
    const std::vector<float> probes = cpu.ProbeOut();
    backend->CopyIn(cuda.lists.counts, counts.data(), counts.size() * 4);
    backend->CopyIn(cuda.lists.blocks, blocks.data(), blocks.size() * 4);
    backend->CopyIn(cuda.probe_out, probes.data(), probes.size() * 4);
    cuda.PrefillAttention();
    EXPECT_LT(RelativeError(cuda.Out(), expected), Tolerance(c.dtype))
        << (backend == &Cuda() ? "fastest" : "portable");
    EXPECT_EQ(cuda.Counters(0).pairs, cpu.Counters(0).pairs - selected.pairs);
  }
}

class PrefillAttention : public testing::TestWithParam<DType> {
 protected:
  PrefillAttention() : rng_(TestSeed()) { RecordProperty("seed", std::to_string(TestSeed())); }
  std::mt19937 rng_;
};
INSTANTIATE_TEST_SUITE_P(All, PrefillAttention, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(PrefillAttention, Dense) {
  PrefillParams policy = SmallPolicy();
  policy.full = true;
  for (const AttentionShape& shape : std::vector<AttentionShape>{{2, 8, 2, 64},
                                                                 {1, 4, 1, 128},
                                                                 {2, 7, 1, 128},
                                                                 {1, 9, 3, 64},
                                                                 {1, 2, 2, 32},
                                                                 {1, 1, 1, 128}}) {
    SCOPED_TRACE(testing::Message()
                 << shape.heads << "/" << shape.kv_heads << " x " << shape.head_dim);
    ExpectSameAttention({shape, GetParam(), policy, {}}, rng_());
    ExpectSameAttention({shape, GetParam(), policy, {77}, 256, 300, 556}, rng_());
  }
}

TEST_P(PrefillAttention, OverLists) {
  for (const int32_t block : {8, 16, 64}) {
    for (const AttentionShape& shape :
         std::vector<AttentionShape>{{2, 8, 2, 64}, {2, 6, 1, 128}, {1, 4, 2, 32}}) {
      PrefillParams policy = SmallPolicy();
      policy.block = block;
      SCOPED_TRACE(testing::Message() << "block " << block << ", head_dim " << shape.head_dim);
      std::vector<int32_t> past(size_t(shape.kv_heads), 0);  // heads differ after a compression
      for (int32_t& length : past) length = int32_t(rng_() % 200);
      ExpectSameAttention({shape, GetParam(), policy, past}, rng_());
      ExpectSameAttention({shape, GetParam(), policy, past, 512, 250, 1000}, rng_());
    }
  }
}

TEST_P(PrefillAttention, CorrectsFromProbes) {
  for (const auto& [segment, stride] : std::vector<std::pair<int32_t, int32_t>>{
           {128, 1}, {128, 16}, {128, 32}, {128, 128}, {512, 64}, {512, 256}, {512, 512}}) {
    PrefillParams policy = SmallPolicy();
    policy.segment = segment;
    policy.base = 640;
    policy.correction = stride;
    SCOPED_TRACE(testing::Message() << "segment " << segment << ", stride " << stride);
    ExpectSameAttention({{1, 8, 2, 64}, GetParam(), policy, {50}, 0, 1500, 1500}, rng_());
    ExpectSameAttention({{1, 4, 1, 128}, GetParam(), policy, {}, 0, 1500, 1500}, rng_());
  }
}

class DecodeAttention : public PrefillAttention {};
INSTANTIATE_TEST_SUITE_P(All, DecodeAttention, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(DecodeAttention, ManyLengths) {
  for (const AttentionShape& shape : std::vector<AttentionShape>{{2, 8, 2, 64},
                                                                 {1, 4, 1, 128},
                                                                 {2, 7, 1, 128},
                                                                 {1, 9, 3, 64},
                                                                 {1, 4, 2, 32},
                                                                 {1, 16, 1, 128}}) {
    SCOPED_TRACE(testing::Message()
                 << shape.heads << "/" << shape.kv_heads << " x " << shape.head_dim);
    std::vector<SeqSpec> specs;
    for (const int32_t length : {0, 1, 15, 63, 64, 255, 256, 300, 2047, 5000, 20000}) {
      specs.push_back({.before = length});
    }
    std::vector<int32_t> uneven(size_t(shape.kv_heads), 0);
    for (int32_t& past : uneven) past = int32_t(rng_() % 3000);
    specs.push_back({.past = uneven, .before = 9});
    const World world(shape, GetParam(), specs, rng_());
    Side cpu(Cpu(), world), cuda(Cuda(), world);
    cpu.DecodeAttention();
    for (int round = 0; round < 2; ++round) {  // the merge leaves its counters as it found them
      cuda.DecodeAttention();
      EXPECT_LT(RelativeError(cuda.Out(), cpu.Out()), Tolerance(GetParam()));
    }
  }
}

// A sequence's result has the same bits whatever else is in the batch.
TEST_P(DecodeAttention, BatchedEqualsAlone) {
  const AttentionShape shape = {1, 8, 2, 128};
  const uint32_t seed = rng_();
  const World alone(shape, GetParam(), {{.before = 3000}}, seed);
  const World world(shape, GetParam(), {{.before = 3000}, {.before = 10}, {.before = 9000}},
                    rng_());
  // The first sequence of both, from the same data.
  World batched = world;
  for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {
    for (int32_t token = 0; token <= 3000; ++token) {
      const auto row = [&](const World& w) {
        const int32_t pages = int32_t(w.tables[0].pages.size()) / shape.kv_heads;
        return PageRow(w.tables[0].pages[size_t(kv * pages + token / kPageTokens)],
                       token % kPageTokens);
      };
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        batched.k[size_t(row(world) * shape.head_dim + c)] =
            alone.k[size_t(row(alone) * shape.head_dim + c)];
        batched.v[size_t(row(world) * shape.head_dim + c)] =
            alone.v[size_t(row(alone) * shape.head_dim + c)];
      }
    }
  }
  std::copy(alone.q.begin(), alone.q.end(), batched.q.begin());
  Side one(Cuda(), alone), again(Cuda(), batched);
  one.DecodeAttention();
  again.DecodeAttention();
  const std::vector<float> expected = one.Out(), got = again.Out();
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), got.begin()));
}

}  // namespace
}  // namespace entropyserve
