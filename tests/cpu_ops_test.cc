// The CPU backend's row operators, its matrix products and its thread pool against plain loops.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <thread>
#include <vector>

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

}  // namespace
}  // namespace entropyserve
