#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"

namespace entropyserve::cpu {
namespace {

using simd::F32x16, simd::kLanes;

ES_INLINE F32x16 SiluTimes(F32x16 gate, F32x16 up) {
  // exp's argument stays under 88: beyond it silu is 0 in f32 anyway.
  const F32x16 e = simd::Exp(simd::Min(-gate, simd::Set(87.0f)));
  return gate / (1.0f + e) * up;
}

template <typename T, typename Out>
ES_INLINE void SwiGluRow(const T* gate, const T* up, Out* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    simd::Store(out + i, SiluTimes(simd::Load(gate + i), simd::Load(up + i)));
  }
  if (i < n) {
    const int rest = int(n - i);
    simd::StorePart(out + i,
                    SiluTimes(simd::LoadPart(gate + i, rest), simd::LoadPart(up + i, rest)), rest);
  }
}

ES_SIMD void RowF32(const float* gate, const float* up, float* out, int64_t n) {
  SwiGluRow(gate, up, out, n);
}
ES_SIMD void RowBF16(const bf16_t* gate, const bf16_t* up, bf16_t* out, int64_t n) {
  SwiGluRow(gate, up, out, n);
}
ES_SIMD void RowBF16ToF32(const bf16_t* gate, const bf16_t* up, float* out, int64_t n) {
  SwiGluRow(gate, up, out, n);
}

// Rows of f32 or bf16 as kE4M3, by way of `wide` [ffn].
void QuantizedRow(const SwiGluParams& p, int64_t row, float* wide) {
  if (p.dtype == DType::kF32) {
    const float* gate = static_cast<const float*>(p.gate_up) + row * 2 * p.ffn;
    RowF32(gate, gate + p.ffn, wide, p.ffn);
  } else {
    const bf16_t* gate = static_cast<const bf16_t*>(p.gate_up) + row * 2 * p.ffn;
    RowBF16ToF32(gate, gate + p.ffn, wide, p.ffn);
  }
  p.scales[row] = QuantizeRow(wide, p.ffn, static_cast<e4m3_t*>(p.out) + row * p.ffn);
}

}  // namespace

void SwiGlu(ThreadPool& pool, const SwiGluParams& p) {
  constexpr int64_t kRowsPerTask = 16;
  pool.ParallelFor(CeilDiv(p.rows, kRowsPerTask), [&](int64_t task, int) {
    std::vector<float> wide(p.scales ? size_t(p.ffn) : 0);
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      if (p.scales) {
        QuantizedRow(p, row, wide.data());
      } else if (p.dtype == DType::kF32) {
        const float* gate = static_cast<const float*>(p.gate_up) + row * 2 * p.ffn;
        RowF32(gate, gate + p.ffn, static_cast<float*>(p.out) + row * p.ffn, p.ffn);
      } else {
        const bf16_t* gate = static_cast<const bf16_t*>(p.gate_up) + row * 2 * p.ffn;
        RowBF16(gate, gate + p.ffn, static_cast<bf16_t*>(p.out) + row * p.ffn, p.ffn);
      }
    }
  });
}

}  // namespace entropyserve::cpu
