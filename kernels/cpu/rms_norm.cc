#include <cmath>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"

namespace entropyserve::cpu {
namespace {

using simd::F32x16, simd::kLanes;

template <typename T>
ES_INLINE void NormRow(const float* x, const float* weight, T* out, int64_t n, float eps) {
  F32x16 squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const F32x16 v = simd::Load(x + i + u * kLanes);
      squares[u] += v * v;
    }
  }
  float sum = simd::Sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / float(n) + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    simd::Store(out + i, simd::Load(x + i) * scale * simd::Load(weight + i));
  }
  if (i < n) {
    const int rest = int(n - i);
    simd::StorePart(out + i, simd::LoadPart(x + i, rest) * scale * simd::LoadPart(weight + i, rest),
                    rest);
  }
}

ES_SIMD void NormRowF32(const float* x, const float* weight, float* out, int64_t n, float eps) {
  NormRow(x, weight, out, n, eps);
}
ES_SIMD void NormRowBF16(const float* x, const float* weight, bf16_t* out, int64_t n, float eps) {
  NormRow(x, weight, out, n, eps);
}

}  // namespace

void RmsNorm(ThreadPool& pool, const RmsNormParams& p) {
  constexpr int64_t kRowsPerTask = 32;
  pool.ParallelFor(CeilDiv(p.rows, kRowsPerTask), [&](int64_t task, int) {
    std::vector<float> wide(p.out_dtype == DType::kE4M3 ? size_t(p.hidden) : 0);
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const float* x = p.x + (p.row_index ? p.row_index[row] : row) * p.hidden;
      if (p.out_dtype == DType::kF32) {
        NormRowF32(x, p.weight, static_cast<float*>(p.out) + row * p.hidden, p.hidden, p.eps);
      } else if (p.out_dtype == DType::kE4M3) {
        NormRowF32(x, p.weight, wide.data(), p.hidden, p.eps);
        p.scales[row] =
            QuantizeRow(wide.data(), p.hidden, static_cast<e4m3_t*>(p.out) + row * p.hidden);
      } else {
        NormRowBF16(x, p.weight, static_cast<bf16_t*>(p.out) + row * p.hidden, p.hidden, p.eps);
      }
    }
  });
}

}  // namespace entropyserve::cpu
