// Speed of the CPU operators on SmolLM2-135M's shapes (hidden 576, ffn 1536, 9 heads over 3 of 64).
// One line per operator: time, GFLOP/s of useful work (pairs inside the mask), GB/s where memory is
// the limit. Threads: ES_BENCH_THREADS, default all cores.
//   build/bin/kernel_bench_cpu --benchmark_filter=Prefill
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/backend.h"
#include "kernels/kv_view.h"

namespace entropyserve {
namespace {

constexpr AttentionShape kShape{.layers = 1, .heads = 9, .kv_heads = 3, .head_dim = 64};
constexpr int64_t kHidden = 576, kFfn = 1536;

int Threads() {
  const char* text = std::getenv("ES_BENCH_THREADS");
  return text ? std::atoi(text) : 0;
}

// Memory of the backend, filled with small numbers.
class Array {
 public:
  Array(Backend& backend, DType dtype, int64_t n) : backend_(backend) {
    data_ = backend.Alloc(size_t(n) * SizeOf(dtype));
    uint32_t state = 1;
    for (int64_t i = 0; i < n; ++i) {
      state = state * 1664525u + 1013904223u;
      const float x = float(state >> 8) * 0x1p-23f - 1.0f;
      if (dtype == DType::kF32) {
        static_cast<float*>(data_)[i] = x;
      } else {
        static_cast<bf16_t*>(data_)[i] = ToBF16(x);
      }
    }
  }
  ~Array() { backend_.Free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  void* data() const { return data_; }

 private:
  Backend& backend_;
  void* data_;
};

void SetRates(benchmark::State& state, double flops, double bytes) {
  using benchmark::Counter;
  state.counters["GFLOP/s"] = Counter(flops * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["GB/s"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
}

DType TypeArg(const benchmark::State& state) {
  return state.range(0) == 0 ? DType::kF32 : DType::kBF16;
}

// type, rows, outputs, inputs
void Linear(benchmark::State& state) {
  const auto backend = MakeCpuBackend(Threads());
  const DType dtype = TypeArg(state);
  const int64_t m = state.range(1), n = state.range(2), k = state.range(3);
  const Array x(*backend, dtype, m * k), w(*backend, dtype, n * k), out(*backend, dtype, m * n);
  LinearParams p;
  p.x = x.data(), p.w = {w.data(), dtype, n, k}, p.out = out.data(), p.out_dtype = dtype,
  p.rows = m;
  for (auto _ : state) backend->Linear(p);
  SetRates(state, 2.0 * double(m * n * k), double((n * k + m * (n + k)) * int64_t(SizeOf(dtype))));
  state.SetLabel(Name(dtype));
}
BENCHMARK(Linear)
    ->ArgNames({"type", "rows", "out", "in"})
    ->ArgsProduct({{0, 1}, {1, 8, 512, 2048}, {960}, {kHidden}})
    ->ArgsProduct({{0, 1}, {1, 8, 512, 2048}, {2 * kFfn}, {kHidden}})
    ->ArgsProduct({{0, 1}, {1, 512, 2048}, {kHidden}, {kFfn}})
    ->ArgsProduct({{0, 1}, {1}, {49152}, {kHidden}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

// A sequence whose cache is filled, in pages in an order that jumps.
struct Cache {
  Cache(Backend& backend, DType dtype, int32_t tokens)
      : per_head(PagesFor(tokens)),
        k(backend, dtype, PoolNumbers()),
        v(backend, dtype, PoolNumbers()),
        pages(size_t(per_head * kShape.kv_heads)),
        lengths(size_t(kShape.kv_heads)),
        positions(size_t(per_head * kShape.kv_heads * kPageTokens)) {
    const int32_t n = int32_t(pages.size());
    for (int32_t i = 0; i < n; ++i) pages[size_t(i)] = (i % 2 == 0) ? i / 2 : n - 1 - i / 2;
    pool = {.k = k.data(),
            .v = v.data(),
            .positions = positions.data(),
            .dtype = dtype,
            .head_dim = kShape.head_dim,
            .pages = n};
    seq.pages = pages.data(), seq.max_pages = per_head, seq.lengths = lengths.data();
    seq.counters = &counters;
  }
  int64_t PoolNumbers() const {
    return int64_t{per_head} * kShape.kv_heads * kPageTokens * kShape.head_dim;
  }

  int32_t per_head;
  Array k, v;
  std::vector<int32_t> pages;
  std::vector<HeadLength> lengths;
  std::vector<int32_t> positions;
  SeqCounters counters;
  KvPool pool;
  BatchSeq seq;
};

// type, tokens cached before, rows of the step, tokens that each segment reads of them (0: all)
void PrefillAttention(benchmark::State& state) {
  const auto backend = MakeCpuBackend(Threads());
  const DType dtype = TypeArg(state);
  const int32_t before = int32_t(state.range(1)), rows = int32_t(state.range(2));
  Cache cache(*backend, dtype, before + rows);
  BatchSeq& seq = cache.seq;
  seq.rows = rows, seq.appended = before, seq.position = before, seq.turn_total = before + rows;
  seq.policy.correction = 0;
  std::vector<BatchSegment> segments;
  for (int32_t row = 0; row < rows; row += seq.policy.segment) {
    segments.push_back({.row_begin = row,
                        .rows = seq.policy.segment,
                        .index = (before + row) / seq.policy.segment});
  }
  Batch batch;
  batch.rows = rows, batch.num_seqs = 1, batch.num_segments = int32_t(segments.size());
  batch.seqs = &seq, batch.segments = segments.data();
  // Every n-th block.
  const int32_t read = int32_t(state.range(3)) / seq.policy.block,
                visible = before / seq.policy.block;
  std::vector<int32_t> counts(segments.size() * size_t(kShape.kv_heads), read > 0 ? read : -1),
      blocks;
  for (size_t i = 0; i < counts.size(); ++i) {
    for (int32_t j = 0; j < read; ++j) blocks.push_back(int32_t(int64_t{j} * visible / read));
  }
  const Array q(*backend, dtype, int64_t{rows} * kHidden),
      out(*backend, dtype, int64_t{rows} * kHidden);
  PrefillAttentionParams p;
  p.batch = &batch, p.pool = cache.pool, p.shape = kShape, p.q = q.data(), p.out = out.data();
  p.lists = {counts.data(), blocks.data(), read};
  for (auto _ : state) {
    cache.counters = {};
    backend->PrefillAttention(p);
  }
  SetRates(state, 4.0 * kShape.head_dim * double(cache.counters.pairs), 0);
  state.SetLabel(Name(dtype));
}
BENCHMARK(PrefillAttention)
    ->ArgNames({"type", "before", "rows", "read"})
    ->ArgsProduct({{0, 1}, {0, 7680}, {512}, {0}})
    ->ArgsProduct({{0, 1}, {0, 6144}, {2048}, {0}})
    ->ArgsProduct({{0, 1}, {6144}, {2048}, {1024, 2048}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

// type, tokens cached
void DecodeAttention(benchmark::State& state) {
  const auto backend = MakeCpuBackend(Threads());
  const DType dtype = TypeArg(state);
  const int32_t tokens = int32_t(state.range(1));
  Cache cache(*backend, dtype, tokens);
  cache.seq.rows = 1, cache.seq.appended = tokens - 1;
  const int32_t decode = 0;
  Batch batch;
  batch.rows = batch.num_seqs = batch.num_decodes = 1, batch.seqs = &cache.seq,
  batch.decodes = &decode;
  const Array q(*backend, dtype, kHidden), out(*backend, dtype, kHidden);
  DecodeAttentionParams p;
  p.batch = &batch, p.pool = cache.pool, p.shape = kShape, p.q = q.data(), p.out = out.data();
  for (auto _ : state) backend->DecodeAttention(p);
  SetRates(state, 4.0 * double(kHidden) * tokens,
           2.0 * double(cache.PoolNumbers()) * double(SizeOf(dtype)));
  state.SetLabel(Name(dtype));
}
BENCHMARK(DecodeAttention)
    ->ArgNames({"type", "tokens"})
    ->ArgsProduct({{0, 1}, {512, 2048, 8192}})
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

// type: the row operators of one layer on 512 rows
void SwiGlu(benchmark::State& state) {
  const auto backend = MakeCpuBackend(Threads());
  const DType dtype = TypeArg(state);
  constexpr int64_t kRows = 512;
  const Array in(*backend, dtype, kRows * 2 * kFfn), out(*backend, dtype, kRows * kFfn);
  for (auto _ : state) {
    backend->SwiGlu(
        {.gate_up = in.data(), .out = out.data(), .dtype = dtype, .rows = kRows, .ffn = kFfn});
  }
  SetRates(state, 0, double(kRows * 3 * kFfn * int64_t(SizeOf(dtype))));
  state.SetLabel(Name(dtype));
}
void QkvPost(benchmark::State& state) {
  const auto backend = MakeCpuBackend(Threads());
  const DType dtype = TypeArg(state);
  constexpr int32_t kRows = 512;
  Cache cache(*backend, dtype, kRows);
  cache.seq.rows = cache.seq.turn_total = kRows;
  Batch batch;
  batch.rows = kRows, batch.num_seqs = 1, batch.seqs = &cache.seq;
  const Array qkv(*backend, dtype, kRows * 960), q(*backend, dtype, kRows * kHidden);
  std::vector<float> inv_freq(32, 0.01f);
  QkvParams p;
  p.batch = &batch, p.pool = cache.pool, p.shape = kShape, p.qkv = qkv.data(), p.q = q.data();
  p.dtype = dtype, p.inv_freq = inv_freq.data();
  for (auto _ : state) backend->QkvPost(p);
  SetRates(state, 0, double(kRows * 2 * 960 * int64_t(SizeOf(dtype))));
  state.SetLabel(Name(dtype));
}
BENCHMARK(SwiGlu)->ArgName("type")->DenseRange(0, 1)->Unit(benchmark::kMicrosecond)->UseRealTime();
BENCHMARK(QkvPost)->ArgName("type")->DenseRange(0, 1)->Unit(benchmark::kMicrosecond)->UseRealTime();

void RmsNorm(benchmark::State& state) {
  const auto backend = MakeCpuBackend(Threads());
  const DType dtype = TypeArg(state);
  constexpr int64_t kRows = 512;
  const Array x(*backend, DType::kF32, kRows * kHidden), weight(*backend, DType::kF32, kHidden);
  const Array out(*backend, dtype, kRows * kHidden);
  for (auto _ : state) {
    backend->RmsNorm({.x = static_cast<const float*>(x.data()),
                      .weight = static_cast<const float*>(weight.data()),
                      .out = out.data(),
                      .out_dtype = dtype,
                      .rows = kRows,
                      .hidden = kHidden});
  }
  SetRates(state, 0, double(kRows * kHidden * (4 + int64_t(SizeOf(dtype)))));
  state.SetLabel(Name(dtype));
}
BENCHMARK(RmsNorm)->ArgName("type")->DenseRange(0, 1)->Unit(benchmark::kMicrosecond)->UseRealTime();

}  // namespace
}  // namespace entropyserve

BENCHMARK_MAIN();
