// The CPU backend's row operators, its matrix products and its thread pool against plain loops.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/thread_pool.h"

namespace entropyserve {
namespace {

TEST(ThreadPool, RunsEveryItemOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(n);
      pool.ParallelFor(n, [&](int64_t i, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, threads);
        runs[i].fetch_add(1);
      });
      for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
    }
  }
}

// Plain (not atomic) data flows into and out of jobs: TSan sees any missing ordering.
TEST(ThreadPool, OrdersMemoryBetweenJobs) {
  ThreadPool pool(3);
  std::vector<int64_t> values(64, 0);
  for (int round = 0; round < 2000; ++round) {
    const int64_t add = round;
    pool.ParallelFor(int64_t(values.size()), [&](int64_t i, int) { values[i] += add; });
  }
  for (int64_t v : values) EXPECT_EQ(v, 1999 * 2000 / 2);
}

TEST(ThreadPool, WakesSleepingWorkers) {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than workers spin
    // Both items wait for the other: one thread alone would never finish.
    std::atomic<int> arrived{0};
    pool.ParallelFor(2, [&](int64_t, int) {
      arrived.fetch_add(1);
      while (arrived.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(arrived.load(), 2);
  }
}

std::vector<float> RandomFloats(std::mt19937& rng, size_t n, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(rng);
  return v;
}

std::vector<bf16_t> Rounded(std::vector<float>& v) {
  std::vector<bf16_t> bits(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    bits[i] = ToBF16(v[i]);
    v[i] = FromBF16(bits[i]);
  }
  return bits;
}

TEST(Matmul, AgreesWithPlainLoops) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  const auto pick = [&](int low, int high) {
    return std::uniform_int_distribution(low, high)(rng);
  };
  Matmul matmul;
  for (int round = 0; round < 40; ++round) {
    MatmulShape s;
    s.m = pick(1, 70), s.n = pick(1, 90), s.k = pick(1, 100);
    s.b_transposed = pick(0, 1);
    s.in = pick(0, 1) ? DType::kF32 : DType::kBF16;
    s.accumulate = pick(0, 1);
    s.bias = !s.accumulate && pick(0, 1);
    s.out = !s.accumulate && s.in == DType::kBF16 && pick(0, 1) ? DType::kBF16 : DType::kF32;
    s.lda = s.k + pick(0, 9), s.ldc = s.n + pick(0, 9);
    s.ldb = (s.b_transposed ? s.k : s.n) + pick(0, 9);
    SCOPED_TRACE(testing::Message() << s.m << " x " << s.n << " x " << s.k << " transposed "
                                    << s.b_transposed << " " << Name(s.in) << " -> " << Name(s.out)
                                    << " accumulate " << s.accumulate << " bias " << s.bias);
    std::vector<float> a = RandomFloats(rng, s.m * s.lda);
    std::vector<float> b = RandomFloats(rng, (s.b_transposed ? s.n : s.k) * s.ldb);
    const std::vector<float> bias = RandomFloats(rng, s.n);
    std::vector<float> c = RandomFloats(rng, s.m * s.ldc);
    const std::vector<float> before = c;
    std::vector<bf16_t> c16(c.size(), 0x7fc0);
    std::vector<bf16_t> a16, b16;
    if (s.in == DType::kBF16) a16 = Rounded(a), b16 = Rounded(b);
    const bool half = s.in == DType::kBF16, half_out = s.out == DType::kBF16;
    matmul.Run(s, half ? static_cast<const void*>(a16.data()) : a.data(),
               half ? static_cast<const void*>(b16.data()) : b.data(),
               half_out ? static_cast<void*>(c16.data()) : c.data(),
               s.bias ? bias.data() : nullptr);
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.ldc; ++j) {
        if (j >= s.n) {  // the gap between rows is not touched
          if (!half_out) {
            ASSERT_EQ(c[i * s.ldc + j], before[i * s.ldc + j]);
          }
          continue;
        }
        double sum = s.accumulate ? before[i * s.ldc + j] : 0, size = std::abs(sum);
        if (s.bias) sum += bias[j];
        for (int64_t t = 0; t < s.k; ++t) {
          const double term =
              double(a[i * s.lda + t]) * (s.b_transposed ? b[j * s.ldb + t] : b[t * s.ldb + j]);
          sum += term, size += std::abs(term);
        }
        const double got = half_out ? FromBF16(c16[i * s.ldc + j]) : c[i * s.ldc + j];
        ASSERT_NEAR(got, sum, (half_out ? std::abs(sum) / 250 : 0) + 1e-5 * (size + 1));
      }
    }
  }
}

TEST(Matmul, CacheStaysBounded) {
  Matmul matmul;
  std::vector<float> a(400, 1.0f), b(400, 2.0f), c(400);
  for (int pass = 0; pass < 2; ++pass) {
    for (int k = 1; k <= Matmul::kMaxCached + 20; ++k) {
      matmul.Run({.m = 1, .n = 1, .k = k, .lda = 400, .ldb = 400, .ldc = 1, .b_transposed = true},
                 a.data(), b.data(), c.data());
      ASSERT_EQ(c[0], 2.0f * float(k));
    }
  }
}

// ---- Row operators ------------------------------------------------------------------------------

// A tensor of either type with its values as floats.
struct Data {
  DType dtype;
  std::vector<float> values;
  std::vector<bf16_t> bits;

  Data(std::mt19937& rng, DType type, size_t n, float scale = 1)
      : dtype(type), values(RandomFloats(rng, n, scale)) {
    if (dtype == DType::kBF16) bits = Rounded(values);
  }
  // Poison, to be overwritten.
  Data(DType type, size_t n) : dtype(type), values(n, NAN), bits(n, 0x7fc0) {}
  void* data() { return dtype == DType::kF32 ? static_cast<void*>(values.data()) : bits.data(); }
  float at(size_t i) const { return dtype == DType::kF32 ? values[i] : FromBF16(bits[i]); }
};

class Ops : public testing::TestWithParam<DType> {
 protected:
  // Relative: rounding of the result, 2^-9 in bf16.
  double tolerance() const { return GetParam() == DType::kF32 ? 1e-5 : 4e-3; }
  int Pick(int low, int high) { return std::uniform_int_distribution(low, high)(rng_); }
  const uint32_t seed_ = std::random_device{}();
  std::mt19937 rng_{seed_};
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2);
};
INSTANTIATE_TEST_SUITE_P(Types, Ops, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(Ops, Embed) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (int hidden : {1, 16, 37, 576}) {
    const int vocab = 50, rows = Pick(1, 200);
    Data table(rng_, GetParam(), size_t(vocab * hidden));
    std::vector<int32_t> tokens(static_cast<size_t>(rows));
    for (int32_t& token : tokens) token = Pick(0, vocab - 1);
    tokens[0] = vocab - 1;
    std::vector<float> out(size_t(rows * hidden), NAN);
    backend_->Embed({.tokens = tokens.data(),
                     .table = {table.data(), GetParam(), vocab, hidden},
                     .out = out.data(),
                     .rows = rows});
    for (int i = 0; i < rows * hidden; ++i) {
      ASSERT_EQ(out[size_t(i)], table.at(size_t(tokens[size_t(i / hidden)] * hidden + i % hidden)));
    }
  }
}

TEST_P(Ops, RmsNorm) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (int hidden : {1, 15, 64, 100, 576}) {
    for (bool indexed : {false, true}) {
      const int all = 70, rows = indexed ? 9 : all;
      const std::vector<float> x = RandomFloats(rng_, size_t(all * hidden), 3);
      const std::vector<float> weight = RandomFloats(rng_, size_t(hidden));
      std::vector<int32_t> index;
      for (int r = 0; r < rows; ++r) index.push_back(indexed ? Pick(0, all - 1) : r);
      Data out(GetParam(), size_t(rows * hidden));
      backend_->RmsNorm({.x = x.data(),
                         .row_index = indexed ? index.data() : nullptr,
                         .weight = weight.data(),
                         .out = out.data(),
                         .out_dtype = GetParam(),
                         .rows = rows,
                         .hidden = hidden,
                         .eps = 1e-5f});
      for (int r = 0; r < rows; ++r) {
        double squares = 0;
        const float* row = x.data() + index[size_t(r)] * hidden;
        for (int i = 0; i < hidden; ++i) squares += double(row[i]) * double(row[i]);
        for (int i = 0; i < hidden; ++i) {
          const double expected =
              double(row[i]) * double(weight[size_t(i)]) / std::sqrt(squares / hidden + 1e-5);
          ASSERT_NEAR(double(out.at(size_t(r * hidden + i))), expected,
                      tolerance() * std::abs(expected) + 1e-30);
        }
      }
    }
  }
}

TEST_P(Ops, SwiGlu) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (int ffn : {1, 16, 45, 1536}) {
    const int rows = Pick(1, 40);
    Data in(rng_, GetParam(), size_t(rows * 2 * ffn), 6);
    // The ends of silu: gates at which exp over- and underflows.
    if (GetParam() == DType::kF32) in.values[0] = -200, in.values[size_t(ffn)] = 1e3f;
    Data out(GetParam(), size_t(rows * ffn));
    backend_->SwiGlu(
        {.gate_up = in.data(), .out = out.data(), .dtype = GetParam(), .rows = rows, .ffn = ffn});
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < ffn; ++i) {
        const double gate = double(in.at(size_t(r * 2 * ffn + i)));
        const double up = double(in.at(size_t((r * 2 + 1) * ffn + i)));
        const double expected = gate / (1 + std::exp(-gate)) * up;
        ASSERT_NEAR(double(out.at(size_t(r * ffn + i))), expected,
                    tolerance() * std::abs(expected) + 1e-30);
      }
    }
  }
}

TEST_P(Ops, Linear) {
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed_ << " round " << round);
    const int m = round < 40 ? Pick(1, 40) : Pick(17, 1100), k = Pick(1, 150);
    const int n = round < 50 ? Pick(1, 200) : Pick(500, 700);
    const DType out_dtype = Pick(0, 1) ? GetParam() : DType::kF32;
    const bool accumulate = out_dtype == DType::kF32 && Pick(0, 1), bias = Pick(0, 1);
    Data x(rng_, GetParam(), size_t(m * k)), w(rng_, GetParam(), size_t(n * k));
    const std::vector<float> b = RandomFloats(rng_, size_t(n));
    Data out(out_dtype, size_t(m * n));
    std::vector<float> before(out.values.size(), 0.0f);
    if (accumulate) out.values = before = RandomFloats(rng_, before.size());
    backend_->Linear({.x = x.data(),
                      .w = {w.data(), GetParam(), n, k},
                      .bias = bias ? b.data() : nullptr,
                      .out = out.data(),
                      .out_dtype = out_dtype,
                      .accumulate = accumulate,
                      .rows = m});
    const int stride = m * n > 20000 ? 13 : 1;  // a sample of large results
    for (int at = 0; at < m * n; at += stride) {
      const int i = at / n, j = at % n;
      double sum = double(before[size_t(at)]) + (bias ? double(b[size_t(j)]) : 0);
      double size = std::abs(sum) + 1;
      for (int t = 0; t < k; ++t) {
        const double term = double(x.at(size_t(i * k + t))) * double(w.at(size_t(j * k + t)));
        sum += term, size += std::abs(term);
      }
      const double rounding = out_dtype == DType::kBF16 ? std::abs(sum) / 250 : 0;
      ASSERT_NEAR(double(out.at(size_t(at))), sum, rounding + 1e-6 * size)
          << m << " x " << n << " x " << k << " at " << i << ", " << j;
    }
  }
}

// Decode rows go through one loop whose sums do not depend on how many rows there are.
TEST_P(Ops, LinearOfFewRowsIsTheSameAloneAndTogether) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  const int m = 13, n = 67, k = 83;
  Data x(rng_, GetParam(), size_t(m * k)), w(rng_, GetParam(), size_t(n * k));
  std::vector<float> together(size_t(m * n), NAN), alone(size_t(n), NAN);
  LinearParams p{
      .x = x.data(), .w = {w.data(), GetParam(), n, k}, .out = together.data(), .rows = m};
  backend_->Linear(p);
  for (int r = 0; r < m; ++r) {
    p.x = static_cast<std::byte*>(x.data()) + size_t(r * k) * SizeOf(GetParam());
    p.out = alone.data(), p.rows = 1;
    backend_->Linear(p);
    for (int j = 0; j < n; ++j) ASSERT_EQ(alone[size_t(j)], together[size_t(r * n + j)]);
  }
}

// ---- Memory and description ---------------------------------------------------------------------

TEST(CpuMemory, AllocatesZeroedAndCounts) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend(1);
  const size_t free = backend->FreeMemory();
  ASSERT_GT(free, size_t{64} << 20);
  constexpr size_t kBytes = size_t{32} << 20;
  auto* p = static_cast<unsigned char*>(backend->Alloc(kBytes));
  ASSERT_NE(p, nullptr);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(p) % 64, 0u);
  for (size_t i = 0; i < kBytes; i += 1000) ASSERT_EQ(p[i], 0);
  std::vector<unsigned char> host(1000, 7), back(1000, 0);
  backend->CopyIn(p + 5, host.data(), host.size());
  backend->CopyOut(back.data(), p + 5, back.size());
  EXPECT_EQ(back, host);
  backend->Zero(p, 10);
  EXPECT_EQ(p[9], 0);
  EXPECT_EQ(p[10], 7);
  // 3 rows of 4 bytes out of a matrix 10 wide, into one 6 wide.
  for (size_t i = 0; i < 30; ++i) host[i] = static_cast<unsigned char>(i);
  backend->Zero(p, 100);
  backend->CopyIn2D(p, 6, host.data() + 1, 10, 4, 3);
  for (size_t row = 0; row < 3; ++row) {
    for (size_t i = 0; i < 6; ++i) EXPECT_EQ(p[row * 6 + i], i < 4 ? row * 10 + 1 + i : 0);
  }
  backend->Free(p);
  backend->Free(nullptr);
}

TEST(CpuMemory, RefusesMoreThanThereIs) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend(1);
  EXPECT_EQ(backend->Alloc(backend->FreeMemory() + (size_t{1} << 30)), nullptr);
  EXPECT_EQ(backend->Alloc(size_t{1} << 62), nullptr);
}

TEST(CpuBackendInfo, DescribesItself) {
  EXPECT_EQ(MakeCpuBackend(1)->Description().rfind("CPU: 1 thread, ", 0), 0u);
  const std::unique_ptr<Backend> backend = MakeCpuBackend(3);
  const std::string text = backend->Description();
  EXPECT_EQ(text.rfind("CPU: 3 threads, ", 0), 0u);
  EXPECT_EQ(backend->AutoDType() == DType::kBF16, text.find("bf16") != std::string::npos);
  Backend::Limits limits;
  limits.shape = {.layers = 2, .heads = 9, .kv_heads = 3, .head_dim = 64};
  limits.max_rows = 512, limits.max_context = 8192, limits.max_seqs = 4, limits.vocab = 1000;
  EXPECT_GT(backend->Reserve(limits),
            size_t{3} * 512 * 3 * 64 * 4);  // three threads' outputs alone
}

// Against sums in another order and a wider type; the vocabulary is no multiple of anything.
TEST(CompareLogits, AgreesWithPlainSums) {
  auto backend = MakeCpuBackend(2);
  std::mt19937 rng(3);
  constexpr int kVocab = 1013, kRows = 5;
  std::vector<float> a = RandomFloats(rng, kRows * kVocab, 3), b = a;
  for (int row = 1; row < kRows; ++row) {  // row 0 stays equal
    for (int i = 0; i < kVocab; ++i) {
      b[size_t(row * kVocab + i)] += RandomFloats(rng, 1, row == 1 ? 1e-3f : 1.0f)[0];
    }
  }
  a[size_t(2 * kVocab + 7)] = -std::numeric_limits<float>::infinity();  // allowed
  a[size_t(3 * kVocab + 7)] = a[size_t(3 * kVocab + 900)] = 50;         // equal: the lower id
  b[size_t(3 * kVocab + 7)] = 60;
  b[size_t(4 * kVocab + 5)] = std::nanf("");
  const std::vector<int32_t> targets = {0, 1012, 3, 900, 5};
  std::vector<LogitsComparison> results(kRows);
  backend->CompareLogits({.a = a.data(),
                          .b = b.data(),
                          .vocab = kVocab,
                          .targets = targets.data(),
                          .n = kRows,
                          .results = results.data()});
  for (int row = 0; row < 4; ++row) {
    const auto share = [&](const std::vector<float>& x, int i) {
      long double sum = 0;
      for (int j = kVocab - 1; j >= 0; --j) sum += std::exp((long double)(x[row * kVocab + j]));
      return std::exp((long double)(x[row * kVocab + i])) / sum;
    };
    long double kl = 0;
    for (int i = kVocab - 1; i >= 0; --i) {
      const long double p = share(a, i);
      if (p > 0) kl += p * std::log(p / share(b, i));
    }
    const LogitsComparison& got = results[size_t(row)];
    EXPECT_EQ(got.finite, 1);
    EXPECT_NEAR(got.kl, double(kl), 1e-12) << row;
    EXPECT_NEAR(got.logprob_a, double(std::log(share(a, targets[size_t(row)]))), 1e-12);
    EXPECT_NEAR(got.logprob_b, double(std::log(share(b, targets[size_t(row)]))), 1e-12);
  }
  EXPECT_EQ(results[0].kl, 0);
  EXPECT_GT(results[1].kl, 0);
  EXPECT_LT(results[1].kl, 1e-5);
  EXPECT_EQ(results[0].top1_equal, 1);
  EXPECT_EQ(results[3].top1_equal, 1);
  EXPECT_EQ(results[4].finite, 0);
}

}  // namespace
}  // namespace entropyserve
