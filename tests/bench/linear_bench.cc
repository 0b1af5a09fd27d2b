#include "tests/bench/linear_bench.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/check.h"

namespace entropyserve {

struct LinearShape {
  const char* name;
  int64_t n, k;
  DType out;
  bool accumulate;

  int64_t WeightBytes(DType in) const { return n * k * int64_t(SizeOf(in)); }
  // Read and written.
  double Bytes(int64_t rows, DType in) const {
    return double(WeightBytes(in) + rows * k * int64_t(SizeOf(in)) +
                  rows * n * int64_t(SizeOf(out)) * (accumulate ? 2 : 1));
  }
};

namespace {

constexpr DType kBf16 = DType::kBF16;
constexpr LinearShape kLinears[] = {{"qkv", 6144, kHidden, kBf16, false},
                                    {"o", kHidden, kHidden, DType::kF32, true},
                                    {"gate_up", 2 * kFfn, kHidden, kBf16, false},
                                    {"down", kHidden, kFfn, DType::kF32, true}};

// Weights to rotate over, so that they do not stay in L2, and one input.
struct LinearBuffers {
  LinearBuffers(Backend& backend, int64_t rows, const LinearShape& l, DType in) : b(backend) {
    const auto copies = std::clamp<int64_t>((int64_t{256} << 20) / l.WeightBytes(in), 1, 16);
    if (in == DType::kE4M3) {
      const Matrix x = b.Quantized(rows, l.k);
      p.x = x.data, p.x_scales = x.scales;
      for (int64_t i = 0; i < copies; ++i) weights.push_back(b.Quantized(l.n, l.k));
    } else {
      p.x = b.Random(rows * l.k, in);
      for (int64_t i = 0; i < copies; ++i) {
        weights.push_back({b.Random(l.n * l.k, in, 0.02f), in, l.n, l.k});
      }
    }
    p.out = b.Random(rows * l.n, l.out);
    p.out_dtype = l.out;
    p.accumulate = l.accumulate;
    p.rows = rows;
  }
  const LinearParams& Params(int call) {
    p.w = weights[size_t(call) % weights.size()];
    return p;
  }
  KernelTimer::Buffers b;
  LinearParams p;
  std::vector<Matrix> weights;
};

}  // namespace

double LinearBench::Time(int64_t rows, const LinearShape& l, DType in) {
  Backend& backend = timer_.backend();
  LinearBuffers b(backend, rows, l, in);
  return timer_.Time([&](int i) { backend.Linear(b.Params(i)); });
}

// One of 16 in a graph, as a decode step runs them.
double LinearBench::TimeInGraph(int64_t rows, const LinearShape& l, DType in) {
  constexpr int kCalls = 16;
  Backend& backend = timer_.backend();
  LinearBuffers b(backend, rows, l, in);
  const uint64_t key = ++graphs_;
  const double seconds = timer_.Time([&](int) {
    backend.Replay(key, [&] {
      for (int i = 0; i < kCalls; ++i) backend.Linear(b.Params(i));
    });
  });
  return seconds / kCalls;
}

void LinearBench::Run(DType in) {
  for (const int64_t rows : {int64_t{1}, int64_t{8}, int64_t{32}, int64_t{2048}, int64_t{kChunk}}) {
    for (const LinearShape& l : kLinears) {
      const double flops = 2.0 * double(rows * l.n * l.k);
      timer_.Print(
          "linear " + std::string(Name(in)) + " " + l.name + ", " + std::to_string(rows) + " rows",
          Time(rows, l, in), rows < 100 ? l.Bytes(rows, in) : 0, rows < 100 ? 0 : flops);
    }
  }
  if (in == DType::kE4M3) {  // the head is never quantized
    timer_.Print("linear e4m3 8192 x 8192, 8192 rows",
                 Time(8192, {"", 8192, 8192, kBf16, false}, in), 0, 2.0 * 8192 * 8192 * 8192);
    return;
  }
  const double seconds = Time(1, {"", kVocab, kHidden, DType::kF32, false}, in);
  timer_.Print("linear logits, 1 row", seconds, 2.0 * double(kVocab) * kHidden, 0);
}

void LinearBench::FewRows(LinearBench& cublaslt) {
  const auto compare = [&](const LinearShape& l, int64_t rows, DType in) {
    const double ours = TimeInGraph(rows, l, in), theirs = cublaslt.TimeInGraph(rows, l, in);
    const double bytes = l.Bytes(rows, in);
    std::printf("%-4s %-8s %2d rows: ours %6.1f us %5.0f GB/s, cuBLASLt %6.1f us %5.0f GB/s\n",
                Name(in), l.name, int(rows), ours * 1e6, bytes / ours * 1e-9, theirs * 1e6,
                bytes / theirs * 1e-9);
  };
  for (const DType in : {kBf16, DType::kE4M3}) {
    if (in == DType::kE4M3 && !timer_.backend().HasFastE4M3()) continue;
    for (const LinearShape& l : kLinears) {
      for (const int64_t rows : {1, 2, 4, 8, 16}) compare(l, rows, in);
    }
  }
  for (const int64_t rows : {1, 8, 16}) {
    compare({"logits", kVocab, kHidden, DType::kF32, false}, rows, kBf16);
  }
}

void LinearBench::MeasureCeilings() {
  Backend& backend = timer_.backend();
  const size_t bytes = size_t{2} << 30;
  {
    KernelTimer::Buffers b(backend);
    void *from = b.Random(int64_t(bytes / 4), DType::kF32), *to = b.Take(bytes);
    backend.Synchronize();
    cudaStream_t stream;
    Check(cudaStreamCreate(&stream) == cudaSuccess, "stream");
    const auto copy = [&](int n) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < n; ++i)
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
      Check(cudaStreamSynchronize(stream) == cudaSuccess, "copy");
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / n;
    };
    copy(2);
    timer_.ceilings.copy = 2.0 * double(bytes) / copy(10);
    cudaStreamDestroy(stream);
  }
  const double seconds = Time(8192, {"", 8192, 8192, kBf16, false}, kBf16);
  timer_.ceilings.product = 2.0 * 8192 * 8192 * 8192 / seconds;
  std::printf("ceilings: copy %.0f GB/s, bf16 product %.0f TFLOP/s\n\n",
              timer_.ceilings.copy * 1e-9, timer_.ceilings.product * 1e-12);
}

}  // namespace entropyserve
