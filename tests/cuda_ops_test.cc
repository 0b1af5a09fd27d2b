// Memory, linears, elementwise operators and the sampler: CUDA against the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <span>

#include "cuda_world.h"

namespace entropyserve {
namespace {

constexpr double kTolerance[] = {1e-5, 1e-2};  // f32, bf16: relative, Euclidean norm
double Tolerance(DType dtype) { return kTolerance[int(dtype)]; }

// Runs `op` on both sides and compares the `n` elements of `dtype` that it returns a pointer to.
template <typename Op>
void ExpectSame(int64_t n, DType dtype, double tolerance, Op op) {
  Arena cpu(Cpu()), cuda(Cuda());
  const std::vector<float> expected = cpu.GetFloats(op(cpu), n, dtype);
  const std::vector<float> got = cuda.GetFloats(op(cuda), n, dtype);
  EXPECT_LT(RelativeError(got, expected), tolerance);
}

class DTypes : public testing::TestWithParam<DType> {
 protected:
  DTypes() : rng_(TestSeed()) { RecordProperty("seed", std::to_string(TestSeed())); }
  std::mt19937 rng_;
};
INSTANTIATE_TEST_SUITE_P(All, DTypes, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST(Memory, IsZeroedAndComesBack) {
  const size_t before = Cuda().FreeMemory();
  {
    Arena arena(Cuda());
    std::vector<uint8_t> poison(3 << 20, 0xab);
    for (int round = 0; round < 2; ++round) {
      Arena inner(Cuda());
      uint8_t* p = static_cast<uint8_t*>(inner.Bytes(poison.size()));
      EXPECT_EQ(inner.Get(p, poison.size()), std::vector<uint8_t>(poison.size()));
      Cuda().CopyIn(p, poison.data(), poison.size());
      EXPECT_EQ(inner.Get(p, poison.size()), poison);
    }
    EXPECT_EQ(Cuda().Alloc(size_t{1} << 50), nullptr);
  }
  EXPECT_EQ(Cuda().FreeMemory(), before);
}

TEST(Memory, CopiesRowsWithPitches) {
  Arena arena(Cuda());
  std::vector<int32_t> source(7 * 100);
  std::iota(source.begin(), source.end(), 0);
  int32_t* p = arena.Put(std::vector<int32_t>(7 * 50, -1));
  Cuda().CopyIn2D(p, 50 * 4, source.data(), 100 * 4, 30 * 4, 7);
  const std::vector<int32_t> got = arena.Get(p, 7 * 50);
  for (int row = 0; row < 7; ++row) {
    for (int i = 0; i < 50; ++i) EXPECT_EQ(got[row * 50 + i], i < 30 ? row * 100 + i : -1);
  }
}

// Sessions leave the pool and come back page by page; the copies go through several of the pinned
// ring's slots.
TEST_P(DTypes, WholePagesGoOutAndComeBackElsewhere) {
  Arena arena(Cuda());
  constexpr int32_t kPages = 900, kHeadDim = 64;
  const size_t half = kPageTokens * kHeadDim * SizeOf(GetParam());
  const size_t page_bytes = 2 * half + kPageTokens * sizeof(int32_t);
  const KvPool pool{
      .k = arena.Bytes(kPages * half),
      .v = arena.Bytes(kPages * half),
      .positions = static_cast<int32_t*>(arena.Bytes(kPages * kPageTokens * sizeof(int32_t))),
      .dtype = GetParam(),
      .head_dim = kHeadDim,
      .pages = kPages};
  std::vector<int32_t> pages(kPages);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), rng_);
  const std::span<const int32_t> from(pages.data(), 400), to(pages.data() + 450, 400);
  std::vector<uint8_t> bytes(400 * page_bytes), got(bytes.size());
  for (uint8_t& b : bytes) b = uint8_t(rng_());
  Cuda().CopyPagesIn(pool, from, bytes.data());
  Cuda().CopyPagesOut(got.data(), pool, from);
  EXPECT_EQ(got, bytes);
  // The parts are where kernels look for them.
  const uint8_t* const k = static_cast<const uint8_t*>(pool.k) + pages[3] * half;
  const std::vector<uint8_t> row = arena.Get(k, half);
  EXPECT_TRUE(std::equal(row.begin(), row.end(), bytes.begin() + 3 * page_bytes));
  Cuda().CopyPagesIn(pool, to, got.data());
  std::fill(got.begin(), got.end(), 0);
  Cuda().CopyPagesOut(got.data(), pool, to);
  EXPECT_EQ(got, bytes);
}

TEST_P(DTypes, Embed) {
  for (int64_t hidden : {64, 576, 4096, 37}) {
    const std::vector<float> table = RandomFloats(rng_, 101 * hidden);
    const std::vector<int32_t> tokens = {3, 100, 0, 3, 57};
    ExpectSame(5 * hidden, DType::kF32, 1e-9, [&](Arena& a) {
      EmbedParams p;
      p.tokens = a.Put(tokens);
      p.table = {a.PutFloats(table, GetParam()), GetParam(), 101, hidden};
      p.out = static_cast<float*>(a.Poisoned(5 * hidden, DType::kF32));
      p.rows = 5;
      a.backend.Embed(p);
      return p.out;
    });
  }
}

TEST_P(DTypes, RmsNorm) {
  for (int64_t hidden : {64, 576, 4096, 37}) {
    const std::vector<float> x = RandomFloats(rng_, 9 * hidden, 3), w = RandomFloats(rng_, hidden);
    for (const bool indexed : {false, true}) {
      ExpectSame(6 * hidden, GetParam(), Tolerance(GetParam()), [&](Arena& a) {
        RmsNormParams p;
        p.x = a.Put(x);
        p.row_index = indexed ? a.Put(std::vector<int32_t>{8, 0, 3, 3, 1, 7}) : nullptr;
        p.weight = a.Put(w);
        p.out = a.Poisoned(6 * hidden, GetParam());
        p.out_dtype = GetParam();
        p.rows = 6, p.hidden = hidden;
        a.backend.RmsNorm(p);
        return p.out;
      });
    }
  }
}

TEST_P(DTypes, SwiGlu) {
  for (int64_t ffn : {128, 1536, 35}) {
    const std::vector<float> x = RandomFloats(rng_, 11 * 2 * ffn, 2);
    ExpectSame(11 * ffn, GetParam(), Tolerance(GetParam()), [&](Arena& a) {
      SwiGluParams p;
      p.gate_up = a.PutFloats(x, GetParam());
      p.out = a.Poisoned(11 * ffn, GetParam());
      p.dtype = GetParam();
      p.rows = 11, p.ffn = ffn;
      a.backend.SwiGlu(p);
      return p.out;
    });
  }
}

TEST_P(DTypes, Linear) {
  for (const int64_t rows : {1, 3, 64, 301}) {
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{192, 64}, {1000, 576}, {48, 2048}}) {
      const std::vector<float> x = RandomFloats(rng_, rows * k),
                               w = RandomFloats(rng_, n * k, 0.1f);
      const std::vector<float> bias = RandomFloats(rng_, n),
                               residual = RandomFloats(rng_, rows * n);
      for (int variant = 0; variant < 4; ++variant) {
        SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << ", " << variant);
        const bool accumulate = variant == 3, with_bias = variant % 2 == 1;
        const DType out = variant >= 2 ? DType::kF32 : GetParam();
        ExpectSame(rows * n, out, GetParam() == DType::kF32 ? 1e-5 : 1e-2, [&](Arena& a) {
          LinearParams p;
          p.x = a.PutFloats(x, GetParam());
          p.w = {a.PutFloats(w, GetParam()), GetParam(), n, k};
          p.bias = with_bias ? a.Put(bias) : nullptr;
          p.out = accumulate ? a.PutFloats(residual, out) : a.Poisoned(rows * n, out);
          p.out_dtype = out;
          p.accumulate = accumulate;
          p.rows = rows;
          a.backend.Linear(p);
          return p.out;
        });
      }
    }
  }
}

// The whole pool afterwards: K, V, positions, bounds, window queries, and nothing else touched.
TEST_P(DTypes, QkvPost) {
  const std::vector<AttentionShape> shapes = {
      {2, 4, 2, 64}, {2, 8, 1, 128}, {1, 6, 2, 16}, {2, 9, 3, 64}};
  for (const AttentionShape& shape : shapes) {
    for (const bool norm : {false, true}) {
      PrefillParams policy;
      policy.segment = 128;
      policy.block = norm ? 16 : 8;
      const std::vector<SeqSpec> specs = {
          {.past = {70},
           .before = 128,
           .rows = 200,
           .turn_total = 400,
           .policy = policy,
           .bounds = true,
           .window = 32},
          {.past = {3}, .before = 64, .rows = 1, .window = 32},
          {.rows = 5, .turn_total = 5, .policy = policy, .bounds = true, .window = 8},
          {.past = {}, .before = 17, .rows = 1}};
      const World world(shape, GetParam(), specs, rng_());
      const std::vector<float> q_norm = RandomFloats(rng_, shape.head_dim),
                               k_norm = RandomFloats(rng_, shape.head_dim);
      std::vector<float> inv_freq;
      for (int32_t i = 0; i < shape.head_dim / 2; ++i) {
        inv_freq.push_back(std::pow(10000.0f, -2.0f * float(i) / float(shape.head_dim)));
      }
      struct Result {
        std::vector<float> q, k, v;
        std::vector<int32_t> positions;
      };
      const auto run = [&](Backend& backend) {
        Side side(backend, world);
        QkvParams p;
        p.batch = &side.batch;
        p.pool = side.pool;
        p.shape = shape;
        p.layer = world.layer;
        p.qkv = side.arena.PutFloats(world.qkv, GetParam());
        p.q = side.out;
        p.dtype = GetParam();
        p.q_norm = norm ? side.arena.Put(q_norm) : nullptr;
        p.k_norm = norm ? side.arena.Put(k_norm) : nullptr;
        p.inv_freq = side.arena.Put(inv_freq);
        p.rope_scale = 1.1f;
        backend.QkvPost(p);
        return Result{side.Out(),
                      side.arena.GetFloats(side.pool.k, int64_t(world.k.size()), GetParam()),
                      side.arena.GetFloats(side.pool.v, int64_t(world.v.size()), GetParam()),
                      side.arena.Get(side.pool.positions, world.positions.size())};
      };
      const Result cpu = run(Cpu()), cuda = run(Cuda());
      EXPECT_LT(RelativeError(cuda.q, cpu.q), Tolerance(GetParam()));
      EXPECT_LT(RelativeError(cuda.k, cpu.k), Tolerance(GetParam()));
      EXPECT_LT(RelativeError(cuda.v, cpu.v), Tolerance(GetParam()));
      EXPECT_EQ(cuda.positions, cpu.positions);
    }
  }
}

// Every combination of the sampler's settings; the counter noise makes tokens equal, not similar.
TEST(Sample, SameTokensAndLogprobs) {
  RecordProperty("seed", std::to_string(TestSeed()));
  std::mt19937 rng(TestSeed());
  for (const int64_t vocab : {50, 32000, 151936}) {
    const int32_t n = 40;
    const std::vector<float> logits = RandomFloats(rng, n * vocab, 3);
    std::vector<uint32_t> history(size_t(vocab), 0);
    for (int64_t i = 0; i < vocab; i += 3) history[size_t(i)] = (1u << 31) | uint32_t(i % 4);
    const std::vector<int32_t> banned = {1, 7, 49};
    const auto run = [&](Backend& backend) {
      Arena arena(backend);
      std::vector<SampleRow> rows;
      std::mt19937 settings(TestSeed());
      const auto pick = [&](auto... options) {
        const std::common_type_t<decltype(options)...> all[] = {options...};
        return all[settings() % sizeof...(options)];
      };
      const uint32_t* device_history = arena.Put(history);
      const int32_t* device_banned = arena.Put(banned);
      for (int32_t i = 0; i < n; ++i) {
        SampleRow row;
        row.logits_row = n - 1 - i;
        row.temperature = pick(0.0f, 0.7f, 1.0f, 1.5f);
        row.top_p = pick(1.0f, 0.9f, 0.5f, 0.0f);
        row.top_k = pick(0, 1, 20, 1000);
        row.min_p = pick(0.0f, 0.05f);
        row.repetition = pick(1.0f, 1.3f);
        row.presence = pick(0.0f, 0.5f);
        row.frequency = pick(0.0f, 0.2f);
        row.seed = settings();
        row.position = int64_t(settings());
        row.forced = i % 10 == 9 ? 5 : -1;
        row.logprobs = pick(-1, 0, 5, 20);
        row.history = i % 2 ? device_history : nullptr;
        if (i % 3 == 0) row.banned = device_banned, row.num_banned = 3;
        rows.push_back(row);
      }
      std::vector<SampleResult> results(rows.size());
      SampleParams p;
      p.logits = arena.Put(logits);
      p.vocab = vocab;
      p.rows = rows.data();
      p.n = n;
      p.results = results.data();
      backend.Sample(p);
      backend.Synchronize();
      return results;
    };
    const std::vector<SampleResult> cpu = run(Cpu()), cuda = run(Cuda());
    for (int32_t i = 0; i < n; ++i) {
      SCOPED_TRACE(testing::Message() << "vocab " << vocab << ", row " << i);
      EXPECT_EQ(cuda[i].finite, 1);
      EXPECT_EQ(cuda[i].token, cpu[i].token);
      EXPECT_NEAR(cuda[i].logprob, cpu[i].logprob, 1e-4);
      ASSERT_EQ(cuda[i].num_top, cpu[i].num_top);
      for (int32_t t = 0; t < cpu[i].num_top; ++t) {
        EXPECT_EQ(cuda[i].top_ids[t], cpu[i].top_ids[t]);
        EXPECT_NEAR(cuda[i].top_logprobs[t], cpu[i].top_logprobs[t], 1e-4);
      }
    }
  }
}

// A replayed step reads what is in its buffers now; only the first and the second call run `step`.
TEST(Replay, DoesTheSameWorkOnNewContents) {
  std::mt19937 rng(TestSeed());
  constexpr int64_t kHidden = 256, kRows = 3;
  Arena cpu(Cpu()), cuda(Cuda());
  const std::vector<float> weights = RandomFloats(rng, kHidden * kHidden, 0.1f);
  const std::vector<float> norm = RandomFloats(rng, kHidden);
  int calls = 0;
  struct Buffers {
    float* x;
    void *weights, *normed, *out;
    float* norm;
  };
  const auto make = [&](Arena& a) {
    return Buffers{static_cast<float*>(a.Bytes(kRows * kHidden * 4)),
                   a.PutFloats(weights, DType::kBF16), a.Bytes(kRows * kHidden * 2),
                   a.Bytes(kRows * kHidden * 4), a.Put(norm)};
  };
  const auto step = [&](Arena& a, const Buffers& b) {
    ++calls;
    a.backend.RmsNorm({.x = b.x,
                       .weight = b.norm,
                       .out = b.normed,
                       .out_dtype = DType::kBF16,
                       .rows = kRows,
                       .hidden = kHidden});
    a.backend.Linear({.x = b.normed,
                      .w = {b.weights, DType::kBF16, kHidden, kHidden},
                      .out = b.out,
                      .rows = kRows});
  };
  const Buffers on_cpu = make(cpu), on_cuda = make(cuda);
  for (int round = 0; round < 4; ++round) {
    const std::vector<float> x = RandomFloats(rng, kRows * kHidden, 2);
    Cpu().CopyIn(on_cpu.x, x.data(), x.size() * 4);
    Cuda().CopyIn(on_cuda.x, x.data(), x.size() * 4);
    step(cpu, on_cpu);
    const int before = calls;
    Cuda().Replay(77, [&] { step(cuda, on_cuda); });
    EXPECT_EQ(calls - before, round < 2 ? 1 : 0);
    EXPECT_LT(RelativeError(cuda.GetFloats(on_cuda.out, kRows * kHidden, DType::kF32),
                            cpu.GetFloats(on_cpu.out, kRows * kHidden, DType::kF32)),
              1e-2);
  }
}

TEST(Sample, TellsOfBrokenLogits) {
  for (const float broken : {std::nanf(""), INFINITY}) {
    Arena arena(Cuda());
    std::vector<float> logits(2 * 1000, 1.0f);
    logits[1234] = broken;
    logits[7] = -INFINITY;  // allowed
    std::vector<SampleRow> rows(2);
    rows[1].logits_row = 1;
    std::vector<SampleResult> results(2);
    SampleParams p;
    p.logits = arena.Put(logits);
    p.vocab = 1000;
    p.rows = rows.data();
    p.n = 2;
    p.results = results.data();
    Cuda().Sample(p);
    Cuda().Synchronize();
    EXPECT_EQ(results[0].finite, 1);
    EXPECT_EQ(results[1].finite, 0);
  }
}

TEST(CompareLogits, AgreesWithTheCpu) {
  std::mt19937 rng(TestSeed());
  RecordProperty("seed", std::to_string(TestSeed()));
  for (const int64_t vocab : {int64_t{1}, int64_t{33}, int64_t{1013}, int64_t{151936}}) {
    constexpr int kRows = 6;
    const std::vector<float> a = RandomFloats(rng, kRows * vocab, 3);
    std::vector<float> b = a;
    const std::vector<float> noise = RandomFloats(rng, kRows * vocab);
    for (int64_t i = vocab; i < kRows * vocab; ++i) b[size_t(i)] += noise[size_t(i)];
    b[size_t(5 * vocab)] = INFINITY;
    std::vector<int32_t> targets(kRows);
    for (int32_t& target : targets) target = int32_t(rng() % uint64_t(vocab));
    const auto run = [&](Arena& arena) {
      auto* results = arena.Put(std::vector<LogitsComparison>(kRows));
      arena.backend.CompareLogits({.a = arena.Put(a),
                                   .b = arena.Put(b),
                                   .vocab = vocab,
                                   .targets = arena.Put(targets),
                                   .n = kRows,
                                   .results = results});
      return arena.Get(results, kRows);
    };
    Arena cpu(Cpu()), cuda(Cuda());
    const std::vector<LogitsComparison> expected = run(cpu), got = run(cuda);
    EXPECT_EQ(got[0].kl, 0) << "equal rows";
    for (size_t row = 0; row < kRows; ++row) {
      EXPECT_EQ(got[row].finite, row < 5) << row;
      if (row == 5) continue;
      EXPECT_NEAR(got[row].kl, expected[row].kl, 1e-9);
      EXPECT_NEAR(got[row].logprob_a, expected[row].logprob_a, 1e-9);
      EXPECT_NEAR(got[row].logprob_b, expected[row].logprob_b, 1e-9);
      EXPECT_EQ(got[row].top1_equal, expected[row].top1_equal);
    }
  }
}

}  // namespace
}  // namespace entropyserve
