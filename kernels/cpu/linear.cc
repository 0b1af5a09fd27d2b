// out (+)= x * w^T + bias. Many rows go through the matrix products; up to kFewRows (decode)
// through our own loop, which reads each weight once, at memory bandwidth, straight from the
// checkpoint's layout.
#include <cstring>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"

namespace entropyserve::cpu {
namespace {

using simd::F32x16, simd::kLanes;

// From here on oneDNN is faster (measured on 576 x 3072, bf16 and f32).
constexpr int64_t kFewRows = 16;
// Outputs handled together: as many independent sums as hide the latency of a multiply-add.
constexpr int kOutputs = 4;
constexpr int kRows = 4;

// sums[o][r] = w row o . x row r. x is laid out in runs of T, zero behind k, x_stride apart.
// One vector sum per (output, row) whatever R is: a row's result does not depend on the batch.
template <int R, typename T>
ES_INLINE void DotBlock(const T* w, int64_t k, const float* x, int64_t x_stride,
                        float (&sums)[kOutputs][kRows]) {
  constexpr int kVectors = simd::kRun<T> / kLanes;
  F32x16 acc[kOutputs * R];
#pragma GCC unroll 16
  for (int i = 0; i < kOutputs * R; ++i) acc[i] = F32x16{};
  const auto add = [&](int o, const simd::Run<T>& run, const float* at) ES_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        acc[o * R + r] += run.v[v] * simd::Load(at + r * x_stride + v * kLanes);
      }
    }
  };
  int64_t i = 0;
  for (; i + simd::kRun<T> <= k; i += simd::kRun<T>) {
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) add(o, simd::LoadRun(w + o * k + i), x + i);
  }
  if (i < k) {
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) add(o, simd::LoadRunPart(w + o * k + i, int(k - i)), x + i);
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[o][r] = simd::Sum(acc[o * R + r]);
  }
}

// sums of kOutputs weight rows with `rows` <= kRows rows of x.
template <typename T>
ES_INLINE void Dots(const T* w, int64_t k, const float* x, int64_t x_stride, int rows,
                    float (&sums)[kOutputs][kRows]) {
  switch (rows) {
    case 1:
      return DotBlock<1>(w, k, x, x_stride, sums);
    case 2:
      return DotBlock<2>(w, k, x, x_stride, sums);
    case 3:
      return DotBlock<3>(w, k, x, x_stride, sums);
    default:
      return DotBlock<4>(w, k, x, x_stride, sums);
  }
}
ES_SIMD void DotsF32(const float* w, int64_t k, const float* x, int64_t x_stride, int rows,
                     float (&sums)[kOutputs][kRows]) {
  Dots(w, k, x, x_stride, rows, sums);
}
ES_SIMD void DotsBF16(const bf16_t* w, int64_t k, const float* x, int64_t x_stride, int rows,
                      float (&sums)[kOutputs][kRows]) {
  Dots(w, k, x, x_stride, rows, sums);
}

// Outputs [begin, end) for all rows; x as in DotBlock.
void FewRowsBlock(const LinearParams& p, const float* x, int64_t padded, int64_t begin,
                  int64_t end) {
  const int64_t k = p.w.cols;
  const size_t item = SizeOf(p.w.dtype);
  for (int64_t o = begin; o < end; o += kOutputs) {
    // The last weight rows of a matrix whose height is no multiple of kOutputs are read again.
    const int64_t first = std::min(o, std::max<int64_t>(p.w.rows - kOutputs, 0));
    for (int64_t r = 0; r < p.rows; r += kRows) {
      const int rows = int(std::min<int64_t>(kRows, p.rows - r));
      float sums[kOutputs][kRows];
      const std::byte* w = static_cast<const std::byte*>(p.w.data) + size_t(first * k) * item;
      if (p.w.dtype == DType::kF32) {
        DotsF32(reinterpret_cast<const float*>(w), k, x + r * padded, padded, rows, sums);
      } else {
        DotsBF16(reinterpret_cast<const bf16_t*>(w), k, x + r * padded, padded, rows, sums);
      }
      for (int64_t output = o; output < std::min(end, o + kOutputs); ++output) {
        for (int i = 0; i < rows; ++i) StoreOutput(p, r + i, output, sums[output - first][i]);
      }
    }
  }
}

// Row r of x as floats in runs of T.
template <typename T>
void LayOutRow(const T* x, int64_t k, float* out, int64_t padded) {
  std::fill(out, out + padded, 0.0f);
  for (int64_t i = 0; i < k; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = x[i];
    } else {
      out[simd::RunSlot<T>(i)] = FromBF16(x[i]);
    }
  }
}

void LinearFewRows(Workers& workers, const LinearParams& p) {
  const int64_t k = p.w.cols, run = simd::kRun<bf16_t>, padded = CeilDiv(k, run) * run;
  float* x = static_cast<float*>(workers.shared.Get(size_t(p.rows * padded) * sizeof(float)));
  for (int64_t r = 0; r < p.rows; ++r) {
    if (p.w.dtype == DType::kF32) {
      LayOutRow(static_cast<const float*>(p.x) + r * k, k, x + r * padded, padded);
    } else {
      LayOutRow(static_cast<const bf16_t*>(p.x) + r * k, k, x + r * padded, padded);
    }
  }
  // About 32 KB of weights a task: small enough to balance, large enough to stream.
  const int64_t row_bytes = k * int64_t(SizeOf(p.w.dtype));
  const int64_t outputs = std::max<int64_t>(1, 32768 / (row_bytes * kOutputs)) * kOutputs;
  workers.pool.ParallelFor(CeilDiv(p.w.rows, outputs), [&](int64_t task, int) {
    FewRowsBlock(p, x, padded, task * outputs, std::min(p.w.rows, (task + 1) * outputs));
  });
}

void AddBias(const LinearParams& p, int64_t row_begin, int64_t rows, int64_t begin, int64_t n) {
  for (int64_t r = row_begin; r < row_begin + rows; ++r) {
    float* out = static_cast<float*>(p.out) + r * p.w.rows;
    for (int64_t i = begin; i < begin + n; ++i) out[i] += p.bias[i];
  }
}

// Tiles of the product: wide and tall enough to pay for oneDNN's repacking of the weights in each
// call, small enough for L2. 755 to 910 GFLOP/s per core on SmolLM2-135M's three shapes in bf16
// (Xeon with AMX); 1024 x 512 gave 660 to 800.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileOutputs = 384;

void LinearManyRows(Workers& workers, const LinearParams& p) {
  const int64_t n = p.w.rows, k = p.w.cols;
  // At least two tiles a thread, so that none waits long for the last one.
  int64_t tile_outputs = kTileOutputs;
  const int64_t row_tiles = CeilDiv(p.rows, kTileRows);
  while (tile_outputs > 64 &&
         row_tiles * CeilDiv(n, tile_outputs) < 2 * int64_t(workers.pool.threads())) {
    tile_outputs /= 2;
  }
  const int64_t tiles = CeilDiv(n, tile_outputs);
  const size_t item = SizeOf(p.w.dtype);
  workers.pool.ParallelFor(row_tiles * tiles, [&](int64_t task, int thread) {
    const int64_t row = task / tiles * kTileRows, output = task % tiles * tile_outputs;
    MatmulShape shape;
    shape.m = std::min(kTileRows, p.rows - row);
    shape.n = std::min(tile_outputs, n - output);
    shape.k = shape.lda = shape.ldb = k;
    shape.ldc = n;
    shape.in = p.w.dtype;
    shape.out = p.out_dtype;
    shape.b_transposed = true;
    shape.accumulate = p.accumulate;
    shape.bias = p.bias != nullptr && !p.accumulate;
    const auto* x = static_cast<const std::byte*>(p.x) + size_t(row * k) * item;
    const auto* w = static_cast<const std::byte*>(p.w.data) + size_t(output * k) * item;
    auto* out = static_cast<std::byte*>(p.out) + size_t(row * n + output) * SizeOf(p.out_dtype);
    workers.threads[size_t(thread)].matmul.Run(shape, x, w, out,
                                               shape.bias ? p.bias + output : nullptr);
    if (p.bias && p.accumulate) AddBias(p, row, shape.m, output, shape.n);
  });
}

}  // namespace

void Linear(Workers& workers, const LinearParams& p) {
  Check(!p.accumulate || p.out_dtype == DType::kF32, "Linear accumulates into f32 only");
  if (p.rows <= 0 || p.w.rows <= 0) return;
  if (p.w.dtype == DType::kE4M3) {
    LinearE4M3(workers, p);
  } else if (p.rows <= kFewRows && p.w.rows >= kOutputs) {
    LinearFewRows(workers, p);
  } else {
    LinearManyRows(workers, p);
  }
}

}  // namespace entropyserve::cpu
