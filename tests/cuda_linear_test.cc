// The kernel for linears of few rows, and where cuBLASLt takes over, against the CPU.
#include <gtest/gtest.h>

#include "cuda_world.h"
#include "kernels/cuda/linear_few_rows.h"

namespace entropyserve {
namespace {

// Rows of a linear's input or weights in memory; kE4M3 with scales.
struct Operand {
  std::vector<std::byte> data;
  std::vector<float> scales;
};

Operand MakeOperand(std::mt19937& rng, DType dtype, int64_t rows, int64_t cols) {
  if (dtype == DType::kBF16) return {Pack(RandomFloats(rng, rows * cols), dtype), {}};
  Operand made;
  // Up to the end of the codes' range, as in a quantized row.
  for (const float x : RandomFloats(rng, rows * cols, 110)) {
    made.data.push_back(std::byte{ToE4M3(x)});
  }
  for (const float s : RandomFloats(rng, rows, 0.01f)) made.scales.push_back(std::abs(s));
  return made;
}

struct Case {
  DType dtype = DType::kBF16, out_dtype = DType::kF32;
  int64_t n = 0, k = 0;
  bool with_bias = false, accumulate = false;
};

Case RandomCase(std::mt19937& rng, DType dtype) {
  const auto below = [&](uint32_t n) { return int64_t(rng() % n); };
  Case c;
  c.dtype = dtype;
  c.n = 1 + below(700);
  c.k = 16 * (1 + below(below(2) ? 20 : 300));
  if (dtype == DType::kBF16 && below(2)) c.k -= 8;
  c.with_bias = below(2);
  c.accumulate = below(3) == 0;
  c.out_dtype = !c.accumulate && below(2) ? DType::kBF16 : DType::kF32;
  return c;
}

// Behind every buffer lie NaNs: what reads too far shows them, what writes too far misses them.
constexpr std::byte kNan{0xff};
constexpr size_t kGuard = 512;

class LinearCase {
 public:
  LinearCase(std::mt19937& rng, const Case& c, int64_t most_rows)
      : c_(c),
        x_(MakeOperand(rng, c.dtype, most_rows, c.k)),
        w_(MakeOperand(rng, c.dtype, c.n, c.k)),
        bias_(RandomFloats(rng, c.n, 5)),
        old_(RandomFloats(rng, most_rows * c.n, 5)) {}

  LinearParams Params(int64_t rows) const {
    return {.w = {nullptr, c_.dtype, c_.n, c_.k},
            .out_dtype = c_.out_dtype,
            .accumulate = c_.accumulate,
            .rows = rows};
  }

  // Rows [begin, begin + rows).
  std::vector<float> Run(Backend& backend, int64_t begin, int64_t rows) const {
    Arena a(backend);
    LinearParams p = Params(rows);
    const size_t row_bytes = size_t(c_.k) * SizeOf(c_.dtype);
    p.x = Guarded(a, {x_.data.data() + size_t(begin) * row_bytes, size_t(rows) * row_bytes});
    p.w.data = Guarded(a, w_.data);
    if (c_.dtype == DType::kE4M3) {
      p.w.scales = a.Put(w_.scales);
      p.x_scales = a.Put(x_.scales.data() + begin, size_t(rows));
    }
    if (c_.with_bias) p.bias = a.Put(bias_);
    const float* const old = old_.data() + begin * c_.n;
    const std::vector<std::byte> out =
        c_.accumulate ? Pack({old, old + rows * c_.n}, c_.out_dtype)
                      : std::vector<std::byte>(size_t(rows * c_.n) * SizeOf(c_.out_dtype), kNan);
    std::byte* const guarded = Guarded(a, out);
    p.out = guarded;
    backend.Linear(p);
    EXPECT_EQ(a.Get(guarded + out.size(), kGuard), std::vector<std::byte>(kGuard, kNan));
    return a.GetFloats(p.out, rows * c_.n, c_.out_dtype);
  }

  // Makes a row of x NaNs.
  void Spoil(int64_t row) {
    const size_t row_bytes = size_t(c_.k) * SizeOf(c_.dtype);
    std::fill_n(x_.data.begin() + row * int64_t(row_bytes), row_bytes, kNan);
  }

 private:
  static std::byte* Guarded(Arena& a, std::span<const std::byte> bytes) {
    std::vector<std::byte> longer(bytes.begin(), bytes.end());
    longer.resize(bytes.size() + kGuard, kNan);
    return a.Put(longer);
  }

  const Case c_;
  Operand x_;
  const Operand w_;
  const std::vector<float> bias_, old_;
};

class FewRows : public testing::TestWithParam<DType> {
 protected:
  FewRows() { RecordProperty("seed", std::to_string(TestSeed())); }
  std::mt19937 rng_{TestSeed()};
};
INSTANTIATE_TEST_SUITE_P(All, FewRows, testing::Values(DType::kBF16, DType::kE4M3),
                         [](const auto& info) { return std::string(Name(info.param)); });

TEST_P(FewRows, AgreesWithTheCpu) {
  const int64_t few = cuda::FewRows(GetParam());
  for (int64_t rows = 1; rows <= few + 2; ++rows) {
    for (int i = 0; i < 6; ++i) {
      Case c = RandomCase(rng_, GetParam());
      // cuBLASLt's 8-bit products come in these sizes.
      if (rows > few) c.n = CeilDiv<int64_t>(c.n, 16) * 16, c.k = CeilDiv<int64_t>(c.k, 16) * 16;
      SCOPED_TRACE(testing::Message()
                   << rows << " x " << c.n << " x " << c.k << ", to " << Name(c.out_dtype)
                   << ", bias " << c.with_bias << ", accumulate " << c.accumulate);
      const LinearCase linear(rng_, c, rows);
      const bool ours = cuda::IsFewRowsLinear(linear.Params(rows));
      EXPECT_EQ(ours, rows <= few);
      if (!ours && c.dtype == DType::kE4M3 && !Cuda().HasFastE4M3()) continue;
      // Ours sums in f32, cuBLASLt's 8-bit products keep about 14 bits.
      const double tolerance = ours && c.out_dtype == DType::kF32 ? 1e-4 : 1e-2;
      EXPECT_LT(RelativeError(linear.Run(Cuda(), 0, rows), linear.Run(Cpu(), 0, rows)), tolerance);
    }
  }
}

// To the last bit, whatever else is in the batch: alone, among the first rows, beside NaNs.
TEST_P(FewRows, RowsDoNotKnowOfEachOther) {
  constexpr int64_t kSpoiled = 2;
  for (int i = 0; i < 4; ++i) {
    const Case c = RandomCase(rng_, GetParam());
    SCOPED_TRACE(testing::Message() << c.n << " x " << c.k);
    const int64_t few = cuda::FewRows(GetParam());
    LinearCase linear(rng_, c, few);
    const std::vector<float> all = linear.Run(Cuda(), 0, few);
    linear.Spoil(kSpoiled);
    for (int64_t rows = 1; rows <= few; ++rows) {
      const std::vector<float> some = linear.Run(Cuda(), 0, rows);
      const std::vector<float> last = linear.Run(Cuda(), rows - 1, 1);
      const auto row = [&](const std::vector<float>& from, int64_t r) {
        return std::vector<float>(from.begin() + r * c.n, from.begin() + (r + 1) * c.n);
      };
      for (int64_t r = 0; r < rows; ++r) {
        if (r == kSpoiled) continue;
        EXPECT_EQ(row(some, r), row(all, r)) << r << " of " << rows;
      }
      if (rows - 1 != kSpoiled) {
        EXPECT_EQ(last, row(all, rows - 1));
      } else {
        for (const float x : last) EXPECT_TRUE(std::isnan(x));
      }
    }
  }
}

// A recorded step starts linears before their input's kernel has ended: it must compute what the
// same calls compute one after the other, to the last bit, on whatever its buffers hold now.
TEST_P(FewRows, RecordedStepsComputeTheSame) {
  constexpr int64_t kHidden = 1024, kFfn = 2048;
  constexpr int kLayers = 6;
  for (const int64_t rows : {1, 9}) {
    Arena a(Cuda());
    const auto matrix = [&](int64_t n, int64_t k) {
      const Operand made = MakeOperand(rng_, GetParam(), n, k);
      return Matrix{a.Put(made.data), GetParam(), n, k,
                    made.scales.empty() ? nullptr : a.Put(made.scales)};
    };
    std::vector<Matrix> up, down;
    for (int i = 0; i < kLayers; ++i) {
      up.push_back(matrix(2 * kFfn, kHidden)), down.push_back(matrix(kHidden, kFfn));
    }
    const std::vector<float> ones(kHidden, 1.0f);
    const float* const norm = a.Put(ones);
    float* const x = a.Put(std::vector<float>(size_t(rows * kHidden)));
    void* const normed = a.Bytes(size_t(rows * kHidden) * 2);
    void* const gate_up = a.Bytes(size_t(rows * 2 * kFfn) * 2);
    void* const mlp = a.Bytes(size_t(rows * kFfn) * 2);
    float* const scales =
        GetParam() == DType::kE4M3 ? a.Put(std::vector<float>(size_t(rows))) : nullptr;
    const auto step = [&] {
      for (int i = 0; i < kLayers; ++i) {
        Cuda().RmsNorm({.x = x,
                        .weight = norm,
                        .out = normed,
                        .out_dtype = GetParam(),
                        .rows = rows,
                        .hidden = kHidden,
                        .scales = scales});
        Cuda().Linear({.x = normed,
                       .w = up[size_t(i)],
                       .out = gate_up,
                       .out_dtype = DType::kBF16,
                       .rows = rows,
                       .x_scales = scales});
        Cuda().SwiGlu({gate_up, mlp, DType::kBF16, rows, kFfn, scales});
        Cuda().Linear({.x = mlp,
                       .w = down[size_t(i)],
                       .out = x,
                       .accumulate = true,
                       .rows = rows,
                       .x_scales = scales});
      }
    };
    const uint64_t key = rng_();
    for (int round = 0; round < 5; ++round) {
      const std::vector<float> input = RandomFloats(rng_, rows * kHidden);
      const auto run = [&](auto call) {
        Cuda().CopyIn(x, input.data(), input.size() * sizeof(float));
        call();
        return a.Get(x, input.size());
      };
      const std::vector<float> expected = run(step);
      EXPECT_TRUE(std::isfinite(expected[0]));
      EXPECT_EQ(run([&] { Cuda().Replay(key, step); }), expected) << rows << ", " << round;
    }
  }
}

}  // namespace
}  // namespace entropyserve
