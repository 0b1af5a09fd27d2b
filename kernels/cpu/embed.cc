#include <cstring>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"

namespace entropyserve::cpu {
namespace {

ES_SIMD void Widen(const bf16_t* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + simd::kLanes <= n; i += simd::kLanes) simd::Store(out + i, simd::Load(x + i));
  for (; i < n; ++i) out[i] = FromBF16(x[i]);
}

}  // namespace

void Embed(ThreadPool& pool, const EmbedParams& p) {
  constexpr int64_t kRowsPerTask = 64;
  const int64_t hidden = p.table.cols;
  pool.ParallelFor(CeilDiv(p.rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const int64_t token = p.tokens[row];
      Check(token >= 0 && token < p.table.rows, "a token id is outside the vocabulary");
      float* out = p.out + row * hidden;
      if (p.table.dtype == DType::kF32) {
        std::memcpy(out, static_cast<const float*>(p.table.data) + token * hidden,
                    size_t(hidden) * sizeof(float));
      } else {
        Widen(static_cast<const bf16_t*>(p.table.data) + token * hidden, out, hidden);
      }
    }
  });
}

}  // namespace entropyserve::cpu
