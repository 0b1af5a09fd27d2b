// Prefill attention on sm_90a: checks against a plain fp32 reference, then times.
//
//   prefill_attention_bench [--check] [--small] [--time] [--ceiling=TFLOP/s]
//   [--lengths=32768,65536,131072] [--head_dim=64|128]
//
// --check: random shapes and two long ones. --small: a few tiny shapes, for compute-sanitizer.
// --time: one layer of the Llama-3.1-8B shape, or with head_dim 64 of the Llama-3.2-1B shape.
// Without any of the three: check, then time. Exit status 1 when a check fails.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/cuda/sm90/prefill_attention.h"
#include "tests/bench/prefill_attention_fixture.h"

namespace entropyserve::bench {
namespace {

constexpr double kMaxPairError =
    1e-2;  // ||out - ref|| / ||ref|| of a (segment, head): bf16 operands
constexpr double kMaxRowError = 3e-2;  // of one row

class Runner {
 public:
  explicit Runner(Problem& problem)
      : problem_(problem),
        scratch_(std::max(
            sm90::PrefillAttentionScratchBytes(problem.params().shape, problem.params().batch->rows,
                                               problem.params().batch->num_segments),
            sm90::ProbeAttentionScratchBytes(problem.params().shape,
                                             problem.params().batch->rows))) {}
  void Run() {
    Must(sm90::LaunchPrefillAttention(problem_.params(), scratch_.get(), scratch_.size(), nullptr));
  }
  void RunProbes(float* probe_out) {
    const PrefillAttentionParams p = problem_.params();
    const SelectParams select = {.batch = p.batch,
                                 .pool = p.pool,
                                 .shape = p.shape,
                                 .layer = p.layer,
                                 .q = p.q,
                                 .probe_out = probe_out};
    Must(sm90::LaunchProbeAttention(select, scratch_.get(), scratch_.size(), nullptr));
  }

 private:
  Problem& problem_;
  DeviceArray<uint8_t> scratch_;
};

float Widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Errors {
  double pair = 0, row = 0;  // worst relative ones
  int64_t touched = 0;       // values written outside of segments
  bool ok() const { return pair < kMaxPairError && row < kMaxRowError && touched == 0; }
};

// Sums of squares: of differences and of expected values.
struct Sums {
  double diff = 0, norm = 0;
  void Add(double value, double expect) {
    diff += (value - expect) * (value - expect);
    norm += expect * expect;
  }
  void Add(const Sums& other) {
    diff += other.diff;
    norm += other.norm;
  }
  // NaN is the worst.
  void RaiseTo(double& worst) const {
    const double error = std::sqrt(diff / norm);
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  }
};

// Compares the pairs' rows, correction applied in fp32.
Errors Compare(const Problem& problem, const std::vector<ReferencePair>& pairs,
               const std::vector<float>& probes, const std::vector<uint16_t>& out) {
  const AttentionShape shape = problem.params().shape;
  const int32_t d = shape.head_dim;
  int32_t max_rows = 0;
  for (const ReferencePair& pair : pairs)
    max_rows = std::max(max_rows, problem.segments()[pair.segment].rows);
  const std::vector<float> reference = problem.Reference(pairs, max_rows);
  Errors errors;
  for (size_t n = 0; n < pairs.size(); ++n) {
    const BatchSegment& segment = problem.segments()[pairs[n].segment];
    const int32_t count =
        problem
            .counts()[int64_t{pairs[n].segment} * shape.kv_heads + pairs[n].head / shape.group()];
    const int32_t stride = count < 0 ? 0 : problem.spec(segment.seq).correction;
    const float* pair_reference = reference.data() + n * max_rows * d;
    Sums whole;
    for (int32_t i = 0; i < segment.rows; ++i) {
      Sums one;
      const int64_t row = (int64_t{segment.row_begin} + i) * shape.heads + pairs[n].head;
      for (int32_t c = 0; c < d; ++c) {
        double expect = pair_reference[i * d + c];
        if (stride > 0) {
          const int32_t m = i / stride * stride;
          const int64_t probe = (int64_t{segment.row_begin} + m) * shape.heads + pairs[n].head;
          expect += double(probes[probe * d + c]) - pair_reference[m * d + c];
        }
        one.Add(Widen(out[row * d + c]), expect);
      }
      one.RaiseTo(errors.row);
      whole.Add(one);
    }
    whole.RaiseTo(errors.pair);
  }
  return errors;
}

int64_t CountTouched(const Problem& problem, const std::vector<uint16_t>& out) {
  const AttentionShape shape = problem.params().shape;
  std::vector<bool> inside(problem.params().batch->rows);
  for (const BatchSegment& segment : problem.segments())
    std::fill_n(inside.begin() + segment.row_begin, segment.rows, true);
  const int64_t width = int64_t{shape.heads} * shape.head_dim;
  int64_t touched = 0;
  for (size_t row = 0; row < inside.size(); ++row) {
    for (int64_t c = 0; !inside[row] && c < width; ++c) touched += out[row * width + c] != 0xffff;
  }
  return touched;
}

// All (segment, head) pairs where max_pairs allows it, else evenly spread ones.
std::vector<ReferencePair> ChoosePairs(const Problem& problem, size_t max_pairs) {
  std::vector<ReferencePair> all, pairs;
  for (int32_t s = 0; s < int32_t(problem.segments().size()); ++s) {
    for (int32_t h = 0; h < problem.params().shape.heads; ++h) all.push_back({s, h});
  }
  const size_t n = std::min(all.size(), max_pairs);
  for (size_t i = 0; i < n; ++i) pairs.push_back(all[all.size() - 1 - i * all.size() / n]);
  return pairs;
}

// Exact outputs of the probes against the reference; every other row must stay as it was.
Errors CheckProbes(Problem& problem, size_t max_pairs) {
  const AttentionShape shape = problem.params().shape;
  const int32_t d = shape.head_dim;
  const int64_t width = int64_t{shape.heads} * d;
  DeviceArray<float> probe_out(problem.params().batch->rows * width);
  probe_out.Fill(0xff);
  Runner(problem).RunProbes(probe_out.get());
  Must(cudaDeviceSynchronize());
  const std::vector<float> out = probe_out.Host();
  const std::vector<ReferencePair> pairs = ChoosePairs(problem, max_pairs);
  int32_t max_rows = 0;
  for (const BatchSegment& segment : problem.segments())
    max_rows = std::max(max_rows, segment.rows);
  const std::vector<float> reference = problem.Reference(pairs, max_rows, /*dense=*/true);
  Errors errors;
  for (size_t n = 0; n < pairs.size(); ++n) {
    const BatchSegment& segment = problem.segments()[pairs[n].segment];
    const int32_t stride = problem.StrideOf(segment);
    Sums whole;
    for (int32_t i = 0; stride > 0 && i < segment.rows; i += stride) {
      Sums one;
      for (int32_t c = 0; c < d; ++c)
        one.Add(out[(segment.row_begin + i) * width + pairs[n].head * d + c],
                reference[(n * max_rows + i) * d + c]);
      one.RaiseTo(errors.row);
      whole.Add(one);
    }
    if (stride > 0) whole.RaiseTo(errors.pair);
  }
  std::vector<bool> probe(problem.params().batch->rows);
  for (const BatchSegment& segment : problem.segments()) {
    const int32_t stride = problem.StrideOf(segment);
    for (int32_t i = 0; stride > 0 && i < segment.rows; i += stride)
      probe[segment.row_begin + i] = true;
  }
  for (size_t row = 0; row < probe.size(); ++row) {
    for (int64_t c = 0; !probe[row] && c < width; ++c)
      errors.touched += !std::isnan(out[row * width + c]);
  }
  return errors;
}

Errors CheckProblem(Problem& problem, size_t max_pairs) {
  const std::vector<ReferencePair> pairs = ChoosePairs(problem, max_pairs);
  std::vector<float> probes;
  if (problem.probe_out() != nullptr) {
    probes.resize(size_t(problem.params().batch->rows) * problem.params().shape.heads *
                  problem.params().shape.head_dim);
    Must(cudaMemcpy(probes.data(), problem.probe_out(), probes.size() * sizeof(float),
                    cudaMemcpyDeviceToHost));
  }
  problem.Poison();
  Runner(problem).Run();
  Must(cudaDeviceSynchronize());
  const std::vector<uint16_t> out = problem.Out();
  Errors errors = Compare(problem, pairs, probes, out);
  errors.touched = CountTouched(problem, out);
  return errors;
}

bool Report(const std::string& name, const Errors& errors) {
  std::printf("%-4s %-58s pair %.2e row %.2e outside %lld\n", errors.ok() ? "ok" : "BAD",
              name.c_str(), errors.pair, errors.row, static_cast<long long>(errors.touched));
  return errors.ok();
}

bool CheckRandomShapes(int32_t count, bool small) {
  bool ok = true;
  std::mt19937 random(20260609);
  auto pick = [&](std::vector<int32_t> values) { return values[random() % values.size()]; };
  for (int32_t n = 0; n < count; ++n) {
    const int32_t kv_heads = small ? 1 : pick({1, 2, 3});
    const int32_t group = small ? pick({1, 3}) : pick({1, 2, 3, 4, 6, 7, 8});
    const AttentionShape shape = {
        .layers = 2, .heads = kv_heads * group, .kv_heads = kv_heads, .head_dim = n % 2 ? 64 : 128};
    std::vector<SeqSpec> specs(small ? 1 : pick({1, 2, 3}));
    std::string name = "d " + std::to_string(shape.head_dim) + " heads " +
                       std::to_string(shape.heads) + "/" + std::to_string(kv_heads);
    for (SeqSpec& spec : specs) {
      spec.segment = small ? 128 : pick({128, 256, 512, 1024});
      spec.block = pick({8, 16, 32, 64});
      spec.correction = pick({0, 0, 8, 16, 32, 64, 128, std::min(spec.segment, 256)});
      spec.appended = spec.segment * pick({0, 1, 2, 5});
      spec.rows =
          small ? 150 : pick({1, 100, spec.segment, spec.segment * 2 + 77, spec.segment * 3});
      spec.max_past = pick({0, 60, 700});
      spec.decode = !small && specs.size() > 1 && random() % 4 == 0;
      name += " [S" + std::to_string(spec.segment) + " B" + std::to_string(spec.block) + " r" +
              std::to_string(spec.correction) + " " + std::to_string(spec.appended) + "+" +
              std::to_string(spec.rows) + (spec.decode ? " decode]" : "]");
    }
    specs[0].decode = false;
    Problem problem(shape, specs, {}, n);
    ok &= Report(name, CheckProblem(problem, 64));
    ok &= Report("  its probes", CheckProbes(problem, 64));
  }
  return ok;
}

// One layer of a Llama shape: 3.1-8B with head_dim 128, 3.2-1B with 64.
AttentionShape LlamaShape(int32_t head_dim = 128) {
  return {.layers = 1, .heads = 32, .kv_heads = 8, .head_dim = head_dim};
}

// A whole prompt in one step.
Problem LlamaPrompt(int32_t tokens, int32_t budget, int32_t correction, int32_t head_dim = 128) {
  const ListSpec dense = {.dense_share = 1};
  const ListSpec sparse = {
      .dense_share = 0, .tokens = budget, .dense_prefix = 4096, .dense_suffix = 256};
  return Problem(LlamaShape(head_dim), {{.correction = correction, .rows = tokens}},
                 budget < 0 ? dense : sparse, 1);
}

// Thousands of tiles of one or two steps with a correction that spans both warpgroups.
bool CheckShortTiles() {
  const AttentionShape shape = {.layers = 1, .heads = 32, .kv_heads = 8, .head_dim = 64};
  std::vector<SeqSpec> specs(64, {.segment = 128, .block = 8, .correction = 128, .rows = 256});
  Problem problem(shape, specs, {.dense_share = 0}, 3);
  return Report("64 sequences of 256 tokens, S128 r128", CheckProblem(problem, 1 << 20));
}

// The end of a long turn after a long past: tiles whose keys are split.
bool CheckSplitTiles() {
  bool ok = true;
  for (const int32_t head_dim : {64, 128}) {
    for (const int32_t past : {0, 9000}) {
      const AttentionShape shape = {.layers = 2, .heads = 14, .kv_heads = 2, .head_dim = head_dim};
      Problem problem(shape,
                      {{.correction = 32, .appended = 60 * 512, .rows = 1200, .max_past = past},
                       {.correction = 64, .appended = 512, .rows = 9000, .max_past = past}},
                      {.dense_share = 0.2}, 5);
      ok &= Report(
          "d " + std::to_string(head_dim) + " long turns, past up to " + std::to_string(past),
          CheckProblem(problem, 20));
      ok &= Report("  its probes", CheckProbes(problem, 64));
    }
  }
  return ok;
}

bool CheckLongPrompts() {
  Problem dense = LlamaPrompt(32768, -1, 0);
  bool ok = Report("llama-3.1-8b 32768 dense", CheckProblem(dense, 12));
  Problem sparse = LlamaPrompt(32768, 2048, 32);
  ok &= Report("llama-3.1-8b 32768 budget 2048 correction 32", CheckProblem(sparse, 40));
  ok &= Report("  its probes", CheckProbes(sparse, 40));
  size_t free = 0, total = 0;
  Must(cudaMemGetInfo(&free, &total));
  constexpr size_t kMillionBytes = size_t{24}
                                   << 30;  // 2^20 tokens: q and out 8 GiB each, K and V 2
  if (free < kMillionBytes) return ok;
  Problem million = LlamaPrompt(1 << 20, 2048, 0);
  return Report("llama-3.1-8b 1048576 budget 2048", CheckProblem(million, 10)) && ok;
}

void Time(const Options& options) {
  const std::string title = "one layer, 32/8 heads, d " + std::to_string(options.head_dim);
  std::printf("%-34s %9s %9s %9s %11s\n", title.c_str(), "ms", "TFLOP/s", "ceiling", "dense/this");
  for (const int32_t tokens : options.lengths) {
    double dense_ms = 0;
    struct Row {
      const char* name;
      int32_t budget, correction;
    };
    for (const Row row :
         {Row{"dense", -1, 0}, Row{"budget 2048", 2048, 0}, Row{"budget 4096", 4096, 0},
          Row{"budget 6144", 6144, 0}, Row{"budget 2048 correction 32", 2048, 32}}) {
      Problem problem = LlamaPrompt(tokens, row.budget, row.correction, options.head_dim);
      Runner runner(problem);
      auto report = [&](const char* name, double pairs, double ms) {
        const double rate = pairs * 4 * problem.params().shape.head_dim / ms * 1e-9;
        std::printf("%6d %-27s %9.3f %9.0f %8.0f%% %10.2fx\n", tokens, name, ms, rate,
                    100 * rate / options.ceiling, dense_ms / ms);
        std::fflush(stdout);
      };
      const double ms = MedianMilliseconds([&] { runner.Run(); });
      if (row.budget < 0) dense_ms = ms;
      report(row.name, problem.MaskedPairs(), ms);
      if (row.correction == 0) continue;
      const PrefillAttentionParams& p = problem.params();
      DeviceArray<float> probe_out(int64_t{p.batch->rows} * p.shape.heads * p.shape.head_dim);
      report("probes of stride 32", problem.ProbePairs(),
             MedianMilliseconds([&] { runner.RunProbes(probe_out.get()); }));
      constexpr int32_t kStep = 4096;  // tokens of a step that also decodes
      Problem last(LlamaShape(options.head_dim),
                   {{.correction = 32, .appended = tokens - kStep, .rows = kStep}},
                   {.dense_share = 0, .tokens = row.budget, .dense_suffix = 256}, 1);
      Runner last_runner(last);
      report("  of the last 4096 tokens", last.ProbePairs(),
             MedianMilliseconds([&] { last_runner.RunProbes(probe_out.get()); }));
    }
  }
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  bool ok = true;
  if (options.small) ok &= CheckRandomShapes(6, true);
  if (options.check)
    ok &= CheckRandomShapes(60, false) && CheckShortTiles() && CheckSplitTiles() &&
          CheckLongPrompts();
  if (ok && options.time) Time(options);
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace entropyserve::bench

int main(int argc, char** argv) { return entropyserve::bench::Main(argc, argv); }
