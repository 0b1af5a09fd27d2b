// Linears of 8-bit floats: what the CUDA ones are tested against. Plain, and slower than bf16.
#include <cmath>

#include "kernels/cpu/ops.h"

namespace entropyserve::cpu {
namespace {

// [begin, begin + rows) of a kE4M3 matrix, multiplied by their scales.
void Widen(const void* data, const float* scales, int64_t begin, int64_t rows, int64_t cols,
           float* out) {
  const e4m3_t* x = static_cast<const e4m3_t*>(data) + begin * cols;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < cols; ++i) {
      out[r * cols + i] = FromE4M3(x[r * cols + i]) * scales[begin + r];
    }
  }
}

}  // namespace

float QuantizeRow(const float* x, int64_t n, e4m3_t* out) {
  float max = 0;
  for (int64_t i = 0; i < n; ++i) max = std::fmax(max, std::fabs(x[i]));
  const float factor = E4M3Factor(max);
  for (int64_t i = 0; i < n; ++i) out[i] = ToE4M3(x[i] * factor);
  return E4M3Scale(max);
}

void Quantize(ThreadPool& pool, const QuantizeParams& p) {
  constexpr int64_t kRowsPerTask = 16;
  pool.ParallelFor(CeilDiv(p.rows, kRowsPerTask), [&](int64_t task, int) {
    std::vector<float> wide(p.dtype == DType::kF32 ? 0 : size_t(p.cols));
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      const float* x = static_cast<const float*>(p.x) + row * p.cols;
      if (p.dtype == DType::kBF16) {
        const bf16_t* narrow = static_cast<const bf16_t*>(p.x) + row * p.cols;
        for (int64_t i = 0; i < p.cols; ++i) wide[size_t(i)] = FromBF16(narrow[i]);
        x = wide.data();
      }
      p.scales[row] = QuantizeRow(x, p.cols, p.out + row * p.cols);
    }
  });
}

void LinearE4M3(Workers& workers, const LinearParams& p) {
  constexpr int64_t kTileRows = 256, kTileOutputs = 128;
  const int64_t n = p.w.rows, k = p.w.cols;
  float* const x = static_cast<float*>(workers.shared.Get(size_t(p.rows * k) * sizeof(float)));
  Widen(p.x, p.x_scales, 0, p.rows, k, x);
  const int64_t tiles = CeilDiv(n, kTileOutputs);
  workers.pool.ParallelFor(CeilDiv(p.rows, kTileRows) * tiles, [&](int64_t task, int thread) {
    const int64_t row = task / tiles * kTileRows, output = task % tiles * kTileOutputs;
    MatmulShape shape;
    shape.m = std::min(kTileRows, p.rows - row);
    shape.n = shape.ldc = std::min(kTileOutputs, n - output);
    shape.k = shape.lda = shape.ldb = k;
    shape.b_transposed = true;
    Workers::PerThread& own = workers.threads[size_t(thread)];
    Carver carver(own.scratch.Get(size_t(kTileOutputs * (k + kTileRows)) * sizeof(float) + 64));
    float* const w = carver.Take<float>(size_t(kTileOutputs * k));
    float* const product = carver.Take<float>(size_t(kTileOutputs * kTileRows));
    Widen(p.w.data, p.w.scales, output, shape.n, k, w);
    own.matmul.Run(shape, x + row * k, w, product);
    for (int64_t r = 0; r < shape.m; ++r) {
      for (int64_t i = 0; i < shape.n; ++i) {
        StoreOutput(p, row + r, output + i, product[r * shape.n + i]);
      }
    }
  });
}

}  // namespace entropyserve::cpu
