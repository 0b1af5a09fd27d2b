// Attention mass of probes per block on sm_90a: checks against a plain fp32 reference, then times.
//
//   block_mass_bench [--check] [--small] [--time] [--lengths=32768,65536,131072]
//
// Options as in prefill_attention_bench.
#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/cuda/sm90/block_mass.h"
#include "tests/bench/prefill_attention_fixture.h"

namespace entropyserve::bench {
namespace {

constexpr double kMaxError =
    1e-3;  // ||mass - ref|| / ||ref|| of an item: same bf16 inputs, fp32 sums

// Row of the pool of key i, counted over both runs.
__device__ int64_t PoolRow(const cuda::MassItem& item, int32_t key) {
  const int32_t turn_page = (item.past + kPageTokens - 1) / kPageTokens;
  const int32_t token = key < item.past ? key : key - item.past;
  const int32_t page = item.pages[(key < item.past ? 0 : turn_page) + token / kPageTokens];
  return int64_t{page} * kPageTokens + token % kPageTokens;
}

// The warp's lanes share the product. In units of e.
__device__ float Score(const cuda::MassItem& item, const uint16_t* pool_k, int32_t d, int32_t row,
                       int32_t key) {
  const uint16_t* q = static_cast<const uint16_t*>(item.q) +
                      (int64_t{row / item.group} * item.q_stride + row % item.group) * d;
  const uint16_t* k = pool_k + PoolRow(item, key) * d;
  float score = 0;
  for (int32_t c = threadIdx.x % 32; c < d; c += 32)
    score += __uint_as_float(uint32_t{q[c]} << 16) * __uint_as_float(uint32_t{k[c]} << 16);
  for (int x = 16; x > 0; x /= 2) score += __shfl_xor_sync(0xffffffff, score, x);
  return score * rsqrtf(float(d));
}

// One warp per row: log of the denominator, then the row's weights into [max_rows, bins].
__global__ void ReferenceKernel(cuda::MassItem item, const uint16_t* pool_k, int32_t d,
                                float* weights) {
  const int32_t row = blockIdx.x, limit = item.first_limit + row / item.group * item.limit_step;
  float top = -INFINITY, sum = 0;
  for (int32_t key = 0; key < limit; ++key) {
    const float score = Score(item, pool_k, d, row, key), higher = fmaxf(top, score);
    sum = sum * expf(top - higher) + expf(score - higher);
    top = higher;
  }
  for (int32_t bin = 0; bin < item.bins; ++bin) {
    float mass = 0;
    for (int32_t i = 0; i < item.bin_size; ++i) {
      const int32_t key = item.bin_begin + bin * item.bin_size + i;
      if (key < limit) mass += expf(Score(item, pool_k, d, row, key) - top) / sum;
    }
    if (threadIdx.x == 0) weights[int64_t{row} * item.bins + bin] = mass;
  }
}

// The items of all segments of a problem; the stride of its correction stands for the estimator's.
class MassProblem {
 public:
  explicit MassProblem(const Problem& problem) {
    const PrefillAttentionParams p = problem.params();
    const int32_t group = p.shape.group();
    for (const BatchSegment& segment : problem.segments()) {
      const BatchSeq& seq = p.batch->seqs[segment.seq];
      const int32_t stride = std::max(seq.policy.correction, 1);
      for (int32_t h = 0; h < p.shape.kv_heads; ++h) {
        const int64_t head = int64_t{p.layer} * p.shape.kv_heads + h;
        cuda::MassItem item = {};
        item.q = static_cast<const uint16_t*>(p.q) +
                 (int64_t{segment.row_begin} * p.shape.heads + h * group) * p.shape.head_dim;
        item.pages = seq.pages + head * seq.max_pages;
        item.past = problem.Past(segment.seq, h);
        item.rows = CeilDiv(segment.rows, stride) * group;
        item.group = group;
        item.q_stride = stride * p.shape.heads;
        const int32_t before = seq.appended + segment.row_begin - seq.row_begin;
        item.first_limit = item.past + before + 1;
        item.limit_step = stride;
        item.bin_begin = item.past;
        item.bins = before / seq.policy.block;
        item.bin_size = seq.policy.block;
        items_.push_back(item);
        mass_.max_rows = std::max(mass_.max_rows, item.rows);
        mass_.max_keys = std::max(mass_.max_keys, item.past + before + segment.rows);
        mass_.max_bins = std::max(mass_.max_bins, item.bins);
        for (int32_t i = 0; i < segment.rows; i += stride)
          pairs_ += group * double(item.first_limit + i);
      }
    }
    device_items_ = DeviceArray<cuda::MassItem>(items_);
    scratch_ = DeviceArray<uint8_t>(
        sm90::BlockMassScratchBytes(items_.size(), mass_.max_rows, mass_.max_keys));
    out_ = DeviceArray<float>(items_.size() * std::max(mass_.max_bins, 1));
    mass_.items = device_items_.get();
    mass_.num_items = int32_t(items_.size());
    mass_.head_dim = p.shape.head_dim;
    mass_.dtype = DType::kBF16;
    mass_.pool_k = p.pool.k;
    mass_.scratch = scratch_.get();
    mass_.mass = out_.get();
    mass_.mass_stride = mass_.max_bins;
  }

  void Run() { Must(sm90::LaunchBlockMass(mass_, nullptr)); }
  double pairs() const { return pairs_; }

  // Worst relative error of at most max_items items; infinite if an unused place was written.
  double Check(size_t max_items) {
    out_.Fill(0xff);
    Run();
    Must(cudaDeviceSynchronize());
    const std::vector<float> out = out_.Host();
    double worst = 0;
    const size_t n = std::min(items_.size(), max_items);
    for (size_t i = 0; i < n; ++i) {
      const size_t at = items_.size() - 1 - i * items_.size() / n;
      const cuda::MassItem& item = items_[at];
      if (item.bins == 0) continue;
      DeviceArray<float> weights(size_t(item.rows) * item.bins);
      ReferenceKernel<<<item.rows, 32>>>(item, static_cast<const uint16_t*>(mass_.pool_k),
                                         mass_.head_dim, weights.get());
      Must(cudaDeviceSynchronize());
      const std::vector<float> rows = weights.Host();
      double diff = 0, norm = 0;
      for (int32_t bin = 0; bin < item.bins; ++bin) {
        double expect = 0;
        for (int32_t row = 0; row < item.rows; ++row) expect += rows[size_t(row) * item.bins + bin];
        expect /= item.rows;
        const double delta = out[at * mass_.mass_stride + bin] - expect;
        diff += delta * delta;
        norm += expect * expect;
      }
      const double error = std::sqrt(diff / norm);
      if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
    }
    for (size_t at = 0; at < items_.size(); ++at) {
      for (int64_t bin = items_[at].bins; bin < mass_.mass_stride; ++bin)
        if (!std::isnan(out[at * mass_.mass_stride + bin])) worst = INFINITY;
    }
    return worst;
  }

 private:
  std::vector<cuda::MassItem> items_;
  cuda::MassParams mass_;
  double pairs_ = 0;
  DeviceArray<cuda::MassItem> device_items_;
  DeviceArray<uint8_t> scratch_;
  DeviceArray<float> out_;
};

bool Report(const std::string& name, double error) {
  std::printf("%-4s %-62s %.2e\n", error < kMaxError ? "ok" : "BAD", name.c_str(), error);
  return error < kMaxError;
}

bool CheckRandomShapes(int32_t count, bool small) {
  bool ok = true;
  std::mt19937 random(20260610);
  auto pick = [&](std::vector<int32_t> values) { return values[random() % values.size()]; };
  for (int32_t n = 0; n < count; ++n) {
    const int32_t kv_heads = small ? 1 : pick({1, 2, 3}), group = pick({1, 3, 4, 7});
    const AttentionShape shape = {
        .layers = 2, .heads = kv_heads * group, .kv_heads = kv_heads, .head_dim = n % 2 ? 64 : 128};
    SeqSpec spec;
    spec.segment = small ? 128 : pick({128, 256, 512, 1024});
    spec.block = pick({8, 16, 32, 64});
    spec.correction = pick({8, 32, 64, 128});
    spec.appended = spec.segment * pick({0, 1, 9});
    spec.rows = small ? 200 : pick({1, 100, spec.segment * 2 + 77});
    spec.max_past = pick({0, 60, 700});
    Problem problem(shape, {spec}, {}, n);
    ok &= Report("d " + std::to_string(shape.head_dim) + " heads " + std::to_string(shape.heads) +
                     "/" + std::to_string(kv_heads) + " S" + std::to_string(spec.segment) + " B" +
                     std::to_string(spec.block) + " r" + std::to_string(spec.correction) + " " +
                     std::to_string(spec.appended) + "+" + std::to_string(spec.rows),
                 MassProblem(problem).Check(6));
  }
  return ok;
}

// One layer, heads as in the Llama-3.1-8B shape, a whole prompt, probes of stride 32.
void Time(int32_t tokens, int32_t head_dim) {
  const AttentionShape shape = {.layers = 1, .heads = 32, .kv_heads = 8, .head_dim = head_dim};
  Problem problem(shape, {{.correction = 32, .rows = tokens}}, {.dense_share = 1}, 1);
  MassProblem mass(problem);
  const double error = mass.Check(3);
  const double ms = MedianMilliseconds([&] { mass.Run(); });
  // Scores are made twice: 2 d per pair and pass.
  std::printf("%6d tokens, stride 32: %9.3f ms %9.0f TFLOP/s (error %.1e)\n", tokens, ms,
              mass.pairs() * 2 * 2 * shape.head_dim / ms * 1e-9, error);
  std::fflush(stdout);
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  bool ok = true;
  if (options.small) ok &= CheckRandomShapes(8, true);
  if (options.check) ok &= CheckRandomShapes(40, false);
  if (ok && options.time) {
    for (const int32_t tokens : options.lengths) Time(tokens, options.head_dim);
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace entropyserve::bench

int main(int argc, char** argv) { return entropyserve::bench::Main(argc, argv); }
