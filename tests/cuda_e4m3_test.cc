// 8-bit floats on CUDA against the CPU's twins, on the same codes where products are compared.
#include <gtest/gtest.h>

#include <utility>

#include "cuda_world.h"

namespace entropyserve {
namespace {

struct Rows {
  std::vector<e4m3_t> codes;
  std::vector<float> scales;
};

Rows MakeRows(std::mt19937& rng, int64_t rows, int64_t cols, float size = 1) {
  Rows r;
  r.codes.resize(size_t(rows * cols));
  // Normal numbers that reach the end of the range, as those of a quantized row do.
  std::normal_distribution<float> normal(0, 110);
  for (e4m3_t& code : r.codes) code = ToE4M3(normal(rng));
  for (float s : RandomFloats(rng, rows, size / 110)) r.scales.push_back(std::abs(s));
  return r;
}

// Codes may differ by one where a value lies between two, and the scales by rounding.
void ExpectClose(const Rows& got, const Rows& expected, double most_different) {
  int64_t different = 0;
  const size_t cols = got.codes.size() / got.scales.size();
  for (size_t r = 0; r < got.scales.size(); ++r) {
    EXPECT_NEAR(got.scales[r], expected.scales[r], 1e-5 * double(expected.scales[r]));
    for (size_t i = r * cols; i < (r + 1) * cols; ++i) {
      if (got.codes[i] == expected.codes[i]) continue;
      ++different;
      const double a = FromE4M3(got.codes[i]), b = FromE4M3(expected.codes[i]);
      ASSERT_LE(std::abs(a - b), std::max(std::abs(b) / 8, 0x1p-9)) << r << ", " << i % cols;
    }
  }
  EXPECT_LE(double(different), most_different * double(got.codes.size()) + 1);
}

class CudaE4M3 : public testing::TestWithParam<DType> {
 protected:
  template <typename Op>
  void ExpectSameRows(int64_t rows, int64_t cols, double most_different, Op op) {
    Rows result[2];
    Backend* const backends[] = {&Cuda(), &Cpu()};
    for (int i = 0; i < 2; ++i) {
      Arena a(*backends[i]);
      e4m3_t* codes = a.Put(std::vector<e4m3_t>(size_t(rows * cols), 0x7f));
      float* scales = a.Put(std::vector<float>(size_t(rows), NAN));
      op(a, codes, scales);
      result[i] = {a.Get(codes, size_t(rows * cols)), a.Get(scales, size_t(rows))};
    }
    ExpectClose(result[0], result[1], most_different);
  }
  CudaE4M3() { RecordProperty("seed", std::to_string(TestSeed())); }
  std::mt19937 rng_{TestSeed()};
};
INSTANTIATE_TEST_SUITE_P(All, CudaE4M3, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(CudaE4M3, QuantizeIsTheSame) {
  for (const int64_t cols : {16, 4096, 14336, 37}) {
    std::vector<float> x = RandomFloats(rng_, 33 * cols);
    std::fill(x.begin() + 5 * cols, x.begin() + 6 * cols, 0.0f);
    ExpectSameRows(33, cols, 0, [&](Arena& a, e4m3_t* codes, float* scales) {
      a.backend.Quantize({a.PutFloats(x, GetParam()), GetParam(), codes, scales, 33, cols});
    });
  }
}

TEST_P(CudaE4M3, SwiGlu) {
  for (const int64_t ffn : {128, 1536, 14336, 18944, 35, 40000}) {
    const std::vector<float> x = RandomFloats(rng_, 11 * 2 * ffn, 2);
    ExpectSameRows(11, ffn, 1e-2, [&](Arena& a, e4m3_t* codes, float* scales) {
      a.backend.SwiGlu({a.PutFloats(x, GetParam()), codes, GetParam(), 11, ffn, scales});
    });
  }
}

TEST_P(CudaE4M3, RmsNorm) {
  for (const int64_t hidden : {64, 576, 4096, 37}) {
    const std::vector<float> x = RandomFloats(rng_, 9 * hidden, 3), w = RandomFloats(rng_, hidden);
    for (const bool indexed : {false, true}) {
      ExpectSameRows(6, hidden, 1e-2, [&](Arena& a, e4m3_t* codes, float* scales) {
        RmsNormParams p;
        p.x = a.Put(x);
        p.row_index = indexed ? a.Put(std::vector<int32_t>{8, 0, 3, 3, 1, 7}) : nullptr;
        p.weight = a.Put(w);
        p.out = codes;
        p.out_dtype = DType::kE4M3;
        p.rows = 6, p.hidden = hidden;
        p.scales = scales;
        a.backend.RmsNorm(p);
      });
    }
  }
}

TEST_P(CudaE4M3, GatherRows) {
  for (const int64_t cols : {8, 4096, 37}) {
    const std::vector<float> x = RandomFloats(rng_, 30 * cols);
    std::vector<float> got[2];
    Backend* const backends[] = {&Cuda(), &Cpu()};
    for (int i = 0; i < 2; ++i) {
      Arena a(*backends[i]);
      void* out = a.Poisoned(4 * cols, GetParam());
      a.backend.GatherRows({a.PutFloats(x, GetParam()), a.Put(std::vector<int32_t>{29, 3, 3, 0}),
                            out, 4, cols * int64_t(SizeOf(GetParam()))});
      got[i] = a.GetFloats(out, 4 * cols, GetParam());
    }
    EXPECT_EQ(got[0], got[1]);
  }
}

// Where the card has them, as every Hopper does; GetParam() is the output's type. Sums keep about
// 14 bits (fast accumulation), so that the error grows with the largest partial sums, not with the
// result.
TEST_P(CudaE4M3, Linear) {
  if (!Cuda().HasFastE4M3()) {
    EXPECT_EQ(Cuda().Description().find("compute capability 9.0"), std::string::npos);
    return;
  }
  for (const int64_t rows : {1, 2, 7, 32, 33, 301, 2048}) {
    for (const auto& [n, k] :
         {std::pair<int64_t, int64_t>{192, 64}, {1008, 576}, {48, 2048}, {16, 16}}) {
      const Rows x = MakeRows(rng_, rows, k), w = MakeRows(rng_, n, k, 0.1f);
      const std::vector<float> bias = RandomFloats(rng_, n),
                               residual = RandomFloats(rng_, rows * n);
      for (const auto& [accumulate, with_bias] :
           {std::pair{false, false}, {false, true}, {true, false}, {true, true}}) {
        if (accumulate && GetParam() == DType::kBF16) continue;  // into f32 only
        SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << ", accumulate "
                                        << accumulate << ", bias " << with_bias);
        std::vector<float> got[2];
        Backend* const backends[] = {&Cuda(), &Cpu()};
        for (int i = 0; i < 2; ++i) {
          Arena a(*backends[i]);
          LinearParams p;
          p.x = a.Put(x.codes);
          p.x_scales = a.Put(x.scales);
          p.w = {a.Put(w.codes), DType::kE4M3, n, k, a.Put(w.scales)};
          p.bias = with_bias ? a.Put(bias) : nullptr;
          p.out = accumulate ? a.PutFloats(residual, GetParam()) : a.Poisoned(rows * n, GetParam());
          p.out_dtype = GetParam();
          p.accumulate = accumulate;
          p.rows = rows;
          a.backend.Linear(p);
          got[i] = a.GetFloats(p.out, rows * n, GetParam());
        }
        EXPECT_LT(RelativeError(got[0], got[1]), 1e-2);
      }
    }
  }
}

// Calls with other pointers and one shape share a plan: scales and bias must be those of the call.
TEST_P(CudaE4M3, LinearTakesTheScalesOfItsCall) {
  if (!Cuda().HasFastE4M3()) {
    EXPECT_EQ(Cuda().Description().find("compute capability 9.0"), std::string::npos);
    return;
  }
  const int64_t rows = 5, n = 64, k = 128;
  for (int call = 0; call < 3; ++call) {
    const Rows x = MakeRows(rng_, rows, k, float(call + 1)), w = MakeRows(rng_, n, k);
    const std::vector<float> bias = RandomFloats(rng_, n, 3);
    std::vector<float> got[2];
    Backend* const backends[] = {&Cuda(), &Cpu()};
    for (int i = 0; i < 2; ++i) {
      Arena a(*backends[i]);
      LinearParams p;
      p.x = a.Put(x.codes);
      p.x_scales = a.Put(x.scales);
      p.w = {a.Put(w.codes), DType::kE4M3, n, k, a.Put(w.scales)};
      p.bias = a.Put(bias);
      p.out = a.Poisoned(rows * n, GetParam());
      p.out_dtype = GetParam();
      p.rows = rows;
      a.backend.Linear(p);
      got[i] = a.GetFloats(p.out, rows * n, GetParam());
    }
    EXPECT_LT(RelativeError(got[0], got[1]), 1e-2);
  }
}

}  // namespace
}  // namespace entropyserve
