// 8-bit floats: their rounding against every value there is, and the CPU operators that make and
// multiply them against plain loops.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernels/backend.h"

namespace entropyserve {
namespace {

std::vector<float> RandomFloats(std::mt19937& rng, size_t n, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(rng);
  return v;
}

TEST(E4M3, HasTheValuesOfItsDefinition) {
  EXPECT_EQ(FromE4M3(0x00), 0.0f);
  EXPECT_EQ(FromE4M3(0x01), 0x1p-9f);
  EXPECT_EQ(FromE4M3(0x07), 7 * 0x1p-9f);
  EXPECT_EQ(FromE4M3(0x08), 0x1p-6f);
  EXPECT_EQ(FromE4M3(0x38), 1.0f);
  EXPECT_EQ(FromE4M3(0xb9), -1.125f);
  EXPECT_EQ(FromE4M3(0x7e), kE4M3Max);
  EXPECT_TRUE(std::isnan(FromE4M3(0x7f)));
  EXPECT_TRUE(std::isnan(FromE4M3(0xff)));
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) != 0x7f) {
      EXPECT_EQ(ToE4M3(FromE4M3(e4m3_t(code))), code);
    }
  }
}

// The nearest of all values; of two equally near ones the even code.
e4m3_t Nearest(float x) {
  int best = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const double before = std::abs(double(FromE4M3(e4m3_t(best))) - std::abs(double(x)));
    const double now = std::abs(double(FromE4M3(e4m3_t(code))) - std::abs(double(x)));
    if (now < before || (now == before && code % 2 == 0)) best = code;
  }
  return e4m3_t(best | (std::signbit(x) ? 0x80 : 0));
}

TEST(E4M3, RoundsToTheNearestEven) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> exponent(-12, 10);
  for (int i = 0; i < 20000; ++i) {
    const float x = (i % 2 ? 1.0f : -1.0f) * std::exp2(exponent(rng));
    ASSERT_EQ(ToE4M3(x), Nearest(x)) << x;
  }
  for (int code = 0; code + 1 < 0x7f; ++code) {  // halfway, and beside it
    const float half = (FromE4M3(e4m3_t(code)) + FromE4M3(e4m3_t(code + 1))) / 2;
    for (const float x : {half, std::nextafter(half, 0.0f), std::nextafter(half, 1e3f)}) {
      ASSERT_EQ(ToE4M3(x), Nearest(x)) << x;
    }
  }
  EXPECT_EQ(ToE4M3(1e9f), 0x7e);
  EXPECT_EQ(ToE4M3(-std::numeric_limits<float>::infinity()), 0xfe);
  EXPECT_EQ(ToE4M3(std::nanf("")) & 0x7f, 0x7f);
}

class E4M3Ops : public testing::TestWithParam<DType> {
 protected:
  int Pick(int low, int high) { return std::uniform_int_distribution(low, high)(rng_); }
  // As they lie in memory; `x` becomes what they stand for.
  std::vector<std::byte> Pack(std::vector<float>* x) const {
    std::vector<std::byte> bytes(x->size() * SizeOf(GetParam()));
    for (size_t i = 0; i < x->size(); ++i) {
      if (GetParam() == DType::kF32) {
        reinterpret_cast<float*>(bytes.data())[i] = (*x)[i];
      } else {
        reinterpret_cast<bf16_t*>(bytes.data())[i] = ToBF16((*x)[i]);
        (*x)[i] = FromBF16(ToBF16((*x)[i]));
      }
    }
    return bytes;
  }
  // Row r of `expected` [rows, cols] is within half a step of codes * scale, and its largest
  // element takes the whole range.
  static void ExpectRows(const std::vector<double>& expected, const std::vector<e4m3_t>& codes,
                         const std::vector<float>& scales, size_t cols) {
    for (size_t r = 0; r < scales.size(); ++r) {
      double max = 0;
      for (size_t i = 0; i < cols; ++i) max = std::max(max, std::abs(expected[r * cols + i]));
      ASSERT_NEAR(scales[r], max / 448, 1e-5 * max);
      for (size_t i = r * cols; i < (r + 1) * cols; ++i) {
        const double half_step = std::max(std::abs(expected[i]) / 16, double(scales[r]) * 0x1p-10);
        ASSERT_NEAR(double(FromE4M3(codes[i])) * scales[r], expected[i], 1.001 * half_step);
      }
    }
  }

  const uint32_t seed_ = std::random_device{}();
  std::mt19937 rng_{seed_};
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2);
};
INSTANTIATE_TEST_SUITE_P(Types, E4M3Ops, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(E4M3Ops, QuantizeUsesTheRangeOfEveryRow) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (const size_t cols : {1, 16, 77, 576}) {
    const size_t rows = size_t(Pick(1, 40));
    std::vector<float> x = RandomFloats(rng_, rows * cols);
    for (size_t i = 0; i < x.size(); ++i) x[i] *= std::exp2(float(i / cols % 30) - 15);
    const std::vector<std::byte> bytes = Pack(&x);
    std::vector<e4m3_t> codes(rows * cols, 0x7f);
    std::vector<float> scales(rows, NAN);
    backend_->Quantize(
        {bytes.data(), GetParam(), codes.data(), scales.data(), int64_t(rows), int64_t(cols)});
    ExpectRows({x.begin(), x.end()}, codes, scales, cols);
  }
}

TEST_P(E4M3Ops, RowsOfZerosStayZeroAndANanStaysOne) {
  std::vector<float> x = {0, 0, 0, NAN, 1, 2};
  const std::vector<std::byte> bytes = Pack(&x);
  std::vector<e4m3_t> codes(6, 0x7f);
  std::vector<float> scales(2, NAN);
  backend_->Quantize({bytes.data(), GetParam(), codes.data(), scales.data(), 2, 3});
  EXPECT_EQ(codes[0] | codes[1] | codes[2], 0);
  EXPECT_EQ(scales[0], 1.0f);
  EXPECT_TRUE(std::isnan(FromE4M3(codes[3])));
  EXPECT_EQ(codes[5], 0x7e);
}

TEST_P(E4M3Ops, SwiGluIsQuantized) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (const size_t ffn : {1, 45, 512}) {
    const size_t rows = size_t(Pick(1, 40));
    std::vector<float> x = RandomFloats(rng_, rows * 2 * ffn, 3);
    const std::vector<std::byte> bytes = Pack(&x);
    std::vector<double> expected;
    for (size_t r = 0; r < rows; ++r) {
      for (size_t i = 0; i < ffn; ++i) {
        const double gate = x[r * 2 * ffn + i], up = x[(2 * r + 1) * ffn + i];
        expected.push_back(gate / (1 + std::exp(-gate)) * up);
      }
    }
    std::vector<e4m3_t> codes(rows * ffn, 0x7f);
    std::vector<float> scales(rows, NAN);
    backend_->SwiGlu(
        {bytes.data(), codes.data(), GetParam(), int64_t(rows), int64_t(ffn), scales.data()});
    ExpectRows(expected, codes, scales, ffn);
  }
}

TEST_P(E4M3Ops, RmsNormIsQuantized) {
  SCOPED_TRACE(testing::Message() << "seed " << seed_);
  for (const size_t hidden : {1, 100, 576}) {
    const size_t all = 50;
    const std::vector<float> x = RandomFloats(rng_, all * hidden, 3),
                             weight = RandomFloats(rng_, hidden);
    const std::vector<int32_t> index = {49, 0, 7, 7};
    std::vector<double> expected;
    for (const int32_t r : index) {
      const float* row = x.data() + size_t(r) * hidden;
      double squares = 0;
      for (size_t i = 0; i < hidden; ++i) squares += double(row[i]) * row[i];
      for (size_t i = 0; i < hidden; ++i) {
        expected.push_back(double(row[i]) * weight[i] / std::sqrt(squares / double(hidden) + 1e-5));
      }
    }
    std::vector<e4m3_t> codes(index.size() * hidden, 0x7f);
    std::vector<float> scales(index.size(), NAN);
    backend_->RmsNorm({.x = x.data(),
                       .row_index = index.data(),
                       .weight = weight.data(),
                       .out = codes.data(),
                       .out_dtype = DType::kE4M3,
                       .rows = int64_t(index.size()),
                       .hidden = int64_t(hidden),
                       .eps = 1e-5f,
                       .scales = scales.data()});
    ExpectRows(expected, codes, scales, hidden);
  }
}

// GetParam() is the output's type.
TEST_P(E4M3Ops, LinearMultipliesWhatTheCodesStandFor) {
  for (int round = 0; round < 20; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed_ << " round " << round);
    const size_t m = size_t(round < 15 ? Pick(1, 40) : Pick(200, 300)), k = size_t(Pick(1, 150)),
                 n = size_t(Pick(1, 300));
    const bool accumulate = GetParam() == DType::kF32 && Pick(0, 1), bias = Pick(0, 1);
    std::vector<e4m3_t> x(m * k), w(n * k);
    for (e4m3_t& code : x) code = e4m3_t(Pick(0, 0x7e) | Pick(0, 1) << 7);
    for (e4m3_t& code : w) code = e4m3_t(Pick(0, 0x7e) | Pick(0, 1) << 7);
    std::vector<float> x_scales = RandomFloats(rng_, m), w_scales = RandomFloats(rng_, n);
    const std::vector<float> b = RandomFloats(rng_, n);
    std::vector<float> before = RandomFloats(rng_, m * n);
    std::vector<std::byte> out = Pack(&before);
    backend_->Linear({.x = x.data(),
                      .w = {w.data(), DType::kE4M3, int64_t(n), int64_t(k), w_scales.data()},
                      .bias = bias ? b.data() : nullptr,
                      .out = out.data(),
                      .out_dtype = GetParam(),
                      .accumulate = accumulate,
                      .rows = int64_t(m),
                      .x_scales = x_scales.data()});
    for (size_t at = 0; at < m * n; ++at) {
      const size_t i = at / n, j = at % n;
      double sum = 0, size = 1;
      for (size_t t = 0; t < k; ++t) {
        const double term = double(FromE4M3(x[i * k + t])) * double(FromE4M3(w[j * k + t]));
        sum += term, size += std::abs(term);
      }
      const double scale = double(x_scales[i]) * double(w_scales[j]);
      sum = sum * scale + (bias ? double(b[j]) : 0) + (accumulate ? double(before[at]) : 0);
      const float got = GetParam() == DType::kF32
                            ? reinterpret_cast<const float*>(out.data())[at]
                            : FromBF16(reinterpret_cast<const bf16_t*>(out.data())[at]);
      const double rounding = GetParam() == DType::kBF16 ? std::abs(sum) / 250 : 0;
      ASSERT_NEAR(double(got), sum, rounding + 2e-6 * (size * std::abs(scale) + 3))
          << m << " " << n;
    }
  }
}

TEST_P(E4M3Ops, GatherRowsCopies) {
  std::vector<float> x = RandomFloats(rng_, 30 * 7);
  const std::vector<std::byte> bytes = Pack(&x);
  const std::vector<int32_t> index = {29, 3, 3, 0};
  const size_t row_bytes = 7 * SizeOf(GetParam());
  std::vector<std::byte> out(index.size() * row_bytes);
  backend_->GatherRows(
      {bytes.data(), index.data(), out.data(), int64_t(index.size()), int64_t(row_bytes)});
  for (size_t i = 0; i < out.size(); ++i) {
    ASSERT_EQ(out[i], bytes[size_t(index[i / row_bytes]) * row_bytes + i % row_bytes]);
  }
}

}  // namespace
}  // namespace entropyserve
