// Time of selection on the CPU, one layer of SmolLM2-135M's shape (9 heads over 3 of 64), a whole
// prompt in chunks of 2048; correctness is tests/select_test.cc. Threads: ES_BENCH_THREADS, default
// all.
//   build/bin/select_bench_cpu --benchmark_filter=SelectBlocks
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <memory>

#include "kernels/cpu/thread_pool.h"
#include "tests/select_testing.h"

namespace entropyserve {
namespace {

constexpr AttentionShape kShape{.layers = 1, .heads = 9, .kv_heads = 3, .head_dim = 64};
constexpr int32_t kChunk = 2048;

std::unique_ptr<Backend> MakeBackend() {
  const char* text = std::getenv("ES_BENCH_THREADS");
  return MakeCpuBackend(text ? std::atoi(text) : UsableCores());
}

struct Preset {
  const char* name;
  PrefillParams params;
};
constexpr Preset kPresets[] = {
    {"box", {.correction = 0, .first_sparse_layer = 0}},
    {"box, correction 32", {.correction = 32, .first_sparse_layer = 0}},
    {"probe, coverage",
     {.estimator = Estimator::kProbe,
      .budget = BudgetRule::kCoverage,
      .correction = 0,
      .first_sparse_layer = 0}},
};

// type, preset, tokens
void SelectBlocks(benchmark::State& state) {
  const auto backend = MakeBackend();
  std::mt19937 rng(1);
  const DType dtype = state.range(0) == 0 ? DType::kF32 : DType::kBF16;
  const Preset& preset = kPresets[state.range(1)];
  const int32_t tokens = int32_t(state.range(2));
  const LayerInputs in = RandomInputs(rng, kShape, dtype, tokens);
  PagedLayer paged(in, preset.params, 32, 1);
  for (auto _ : state) {
    for (int32_t begin = 0; begin < tokens; begin += kChunk) {
      state.PauseTiming();
      paged.Step(begin, std::min(tokens, begin + kChunk));
      state.ResumeTiming();
      backend->SelectBlocks(paged.Select());
    }
  }
  state.SetLabel(std::string(Name(dtype)) + ", " + preset.name);
}
BENCHMARK(SelectBlocks)
    ->ArgNames({"type", "preset", "tokens"})
    ->ArgsProduct({{0, 1}, {0, 1, 2}, {8192, 32768}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// type, tokens
void SelectTokens(benchmark::State& state) {
  const auto backend = MakeBackend();
  std::mt19937 rng(1);
  const DType dtype = state.range(0) == 0 ? DType::kF32 : DType::kBF16;
  const int32_t tokens = int32_t(state.range(1));
  const LayerInputs in = RandomInputs(rng, kShape, dtype, tokens);
  const KvParams kv;
  PagedLayer paged(in, {}, kv.window, 1);
  paged.Cache(tokens);
  const BatchSeq seq = paged.AfterPrefill();
  std::vector<int32_t> indices(size_t(kShape.kv_heads) * kv.budget), counts(kShape.kv_heads);
  SelectTokensParams p;
  p.seq = &seq, p.pool = paged.pool(), p.shape = kShape, p.kv = kv, p.budget = kv.budget,
  p.window_queries = kv.window, p.capacity = kv.budget;
  p.indices = indices.data(), p.counts = counts.data();
  for (auto _ : state) backend->SelectTokens(p);
  state.SetLabel(Name(dtype));
}
BENCHMARK(SelectTokens)
    ->ArgNames({"type", "tokens"})
    ->ArgsProduct({{0, 1}, {8192, 32768}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace entropyserve

BENCHMARK_MAIN();
