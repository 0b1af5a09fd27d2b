// Time of the CUDA backend's operators on the Llama-3.1-8B shape, one layer each, beside the two
// ceilings of the card measured in the same run: a large copy and a large bf16 product. Attention
// over lists has a bench of its own (prefill_attention_bench).
//
//   kernel_bench [--few_rows] [--lengths=32768,131072]
//
// --few_rows: only the linears of few rows, ours beside cuBLASLt's, as CUDA graphs.
//
// A time is that of one call among many that are queued and waited for together: launches included,
// as a step meets them. Inputs are random. cuda_ops_test is the check.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/kv_view.h"
#include "tests/bench/linear_bench.h"

namespace entropyserve {
namespace {

constexpr AttentionShape kShape{.layers = 1, .heads = 32, .kv_heads = 8, .head_dim = 128};
constexpr DType kBf16 = DType::kBF16;

class Bench {
 public:
  explicit Bench(KernelTimer& timer) : timer_(timer), backend_(timer.backend()) {}

  void Run(const std::vector<int32_t>& lengths) {
    Elementwise();
    for (int32_t length : lengths) Select(length);
    Decode("decode, 1 of 2048", 1, 2048);
    Decode("decode, 32 of 2048", 32, 2048);
    for (int32_t length : lengths) Decode("decode, 1 of " + std::to_string(length), 1, length);
    Decode("decode, 16 of 32768", 16, 32768);
    for (int32_t length : lengths) Compress(length);
    Sampling();
  }

 private:
  using Buffers = KernelTimer::Buffers;

  void Elementwise() {
    Buffers b(backend_);
    const int64_t rows = kChunk;
    std::vector<int32_t> ids(size_t(rows), 0);
    std::mt19937 rng(1);
    for (int32_t& id : ids) id = int32_t(rng() % kVocab);
    EmbedParams embed;
    embed.tokens = b.Put(ids);
    embed.table = {b.Random(kVocab * kHidden, kBf16), kBf16, kVocab, kHidden};
    embed.out = static_cast<float*>(b.Random(rows * kHidden, DType::kF32));
    embed.rows = rows;
    timer_.Print("embed, 8192 rows", timer_.Time([&](int) { backend_.Embed(embed); }),
                 double(rows * kHidden) * 6, 0);
    RmsNormParams norm;
    norm.x = embed.out;
    norm.weight = static_cast<float*>(b.Random(kHidden, DType::kF32));
    norm.out = b.Random(rows * kHidden, kBf16);
    norm.out_dtype = kBf16;
    norm.rows = rows, norm.hidden = kHidden;
    timer_.Print("rms_norm, 8192 rows", timer_.Time([&](int) { backend_.RmsNorm(norm); }),
                 double(rows * kHidden) * 6, 0);
    norm.scales = static_cast<float*>(b.Random(rows, DType::kF32));
    norm.out_dtype = DType::kE4M3;
    timer_.Print("rms_norm e4m3, 8192 rows", timer_.Time([&](int) { backend_.RmsNorm(norm); }),
                 double(rows * kHidden) * 5, 0);
    norm.rows = 1;
    timer_.Print("rms_norm e4m3, 1 row", timer_.Time([&](int) { backend_.RmsNorm(norm); }), 0, 0);
    norm.out_dtype = kBf16;
    timer_.Print("rms_norm, 1 row", timer_.Time([&](int) { backend_.RmsNorm(norm); }), 0, 0);
    QuantizeParams quantize;
    quantize.x = b.Random(rows * kHidden, kBf16);
    quantize.dtype = kBf16;
    quantize.out = static_cast<e4m3_t*>(norm.out);
    quantize.scales = norm.scales;
    quantize.rows = rows, quantize.cols = kHidden;
    timer_.Print("quantize, 8192 rows", timer_.Time([&](int) { backend_.Quantize(quantize); }),
                 double(rows * kHidden) * 3, 0);
    SwiGluParams swiglu;
    swiglu.gate_up = b.Random(rows * 2 * kFfn, kBf16);
    swiglu.out = b.Random(rows * kFfn, kBf16);
    swiglu.dtype = kBf16;
    swiglu.rows = rows, swiglu.ffn = kFfn;
    timer_.Print("swiglu, 8192 rows", timer_.Time([&](int) { backend_.SwiGlu(swiglu); }),
                 double(rows * kFfn) * 6, 0);
    swiglu.scales = norm.scales;
    timer_.Print("swiglu e4m3, 8192 rows", timer_.Time([&](int) { backend_.SwiGlu(swiglu); }),
                 double(rows * kFfn) * 5, 0);
    Step step(b, 0, kChunk, 1, {});
    QkvParams qkv;
    qkv.batch = &step.batch;
    qkv.pool = step.pool;
    qkv.shape = kShape;
    qkv.qkv = b.Random(rows * 48 * 128, kBf16);
    qkv.q = step.q;
    qkv.dtype = kBf16;
    qkv.inv_freq = static_cast<float*>(b.Random(64, DType::kF32));
    timer_.Print("qkv_post with bounds, 8192 rows",
                 timer_.Time([&](int) { backend_.QkvPost(qkv); }), double(rows) * 48 * 128 * 4, 0);
  }

  // A step over random pages: one prefill chunk, or decodes.
  struct Step {
    // rows > 1: a chunk after `before` tokens of the turn; else `seqs` decodes of `before` + 1
    // tokens.
    Step(Buffers& b, int32_t before, int32_t rows, int32_t seqs, const PrefillParams& policy) {
      const int32_t tokens = before + rows, heads = kShape.kv_heads;
      const int32_t max_pages = PagesFor(tokens),
                    max_bounds = PagesFor(CeilDiv(tokens, policy.block));
      const int32_t window_pages = CeilDiv(32 * kShape.group(), 2 * kPageTokens);
      const bool prefill = rows > 1;
      pool.pages = int64_t{seqs} * heads * (max_pages + window_pages + (prefill ? max_bounds : 0));
      pool.k = b.Random(pool.pages * kPageTokens * kShape.head_dim, kBf16);
      pool.v = b.Random(pool.pages * kPageTokens * kShape.head_dim, kBf16);
      pool.positions = static_cast<int32_t*>(b.Take(size_t(pool.pages) * kPageTokens * 4));
      pool.dtype = kBf16;
      pool.head_dim = kShape.head_dim;
      std::vector<int32_t> pages(static_cast<size_t>(pool.pages));
      std::iota(pages.begin(), pages.end(), 0);
      std::shuffle(pages.begin(), pages.end(), std::mt19937(2));
      const auto take = [&](int64_t n) {
        const std::vector<int32_t> table(pages.end() - n, pages.end());
        pages.resize(pages.size() - size_t(n));
        return b.Put(table);
      };
      for (int32_t i = 0; i < seqs; ++i) {
        BatchSeq seq;
        seq.pages = take(int64_t{heads} * max_pages);
        seq.max_pages = max_pages;
        seq.window_pages = take(int64_t{heads} * window_pages);
        seq.max_window_pages = window_pages;
        seq.window = 32;
        seq.row_begin = i;
        seq.rows = rows;
        seq.position = before;
        seq.lengths = b.Put(std::vector<HeadLength>(size_t(heads), {0, prefill ? 0 : before}));
        if (prefill) {
          seq.bounds = take(int64_t{heads} * max_bounds);
          seq.max_bounds = max_bounds;
          seq.appended = before;
          seq.turn_total = tokens;
          seq.policy = policy;
          seq.states = b.Put(
              std::vector<HeadState>(size_t(heads), {1, float(policy.base), before / 512, 1}));
          seq.counters = b.Put(std::vector<SeqCounters>(1));
        } else {
          decodes.push_back(i);
        }
        host_seqs.push_back(seq);
      }
      batch.rows = rows * seqs;
      batch.num_seqs = seqs;
      for (int32_t done = 0; prefill && done < rows; done += policy.segment) {
        segments.push_back({0, done, policy.segment, (before + done) / policy.segment});
      }
      batch.num_segments = int32_t(segments.size());
      batch.num_decodes = int32_t(decodes.size());
      batch.seqs = host_seqs.data(), batch.segments = segments.data(),
      batch.decodes = decodes.data();
      batch.device_seqs = b.Put(host_seqs);
      batch.device_segments = b.Put(segments);
      batch.device_decodes = b.Put(decodes);
      std::vector<int32_t> row_seq;
      for (int32_t i = 0; i < seqs; ++i) row_seq.insert(row_seq.end(), size_t(rows), i);
      batch.row_seq = b.Put(row_seq);
      const int64_t n = int64_t{batch.rows} * kShape.heads * kShape.head_dim;
      q = b.Random(n, kBf16);
      out = b.Random(n, kBf16);
      probe_out = static_cast<float*>(b.Random(prefill ? n : 1, DType::kF32));
      lists.capacity = CeilDiv(tokens, policy.block);
      lists.counts = b.Put(std::vector<int32_t>(size_t(std::max(batch.num_segments, 1)) * heads));
      lists.blocks = static_cast<int32_t*>(
          b.Take(size_t(std::max(batch.num_segments, 1)) * heads * lists.capacity * 4));
    }
    KvPool pool;
    std::vector<BatchSeq> host_seqs;
    std::vector<BatchSegment> segments;
    std::vector<int32_t> decodes;
    Batch batch;
    void *q, *out;
    float* probe_out;
    BlockLists lists;
  };

  // The last chunk of a prompt of `length` tokens: the dearest.
  void Select(int32_t length) {
    struct Variant {
      const char* name;
      Estimator estimator;
      BudgetRule budget;
      int32_t correction;
    };
    for (const Variant& v :
         {Variant{"box, entropy", Estimator::kBox, BudgetRule::kEntropy, 0},
          Variant{"box, entropy, correction", Estimator::kBox, BudgetRule::kEntropy, 32},
          Variant{"probe, coverage", Estimator::kProbe, BudgetRule::kCoverage, 0}}) {
      PrefillParams policy;
      policy.first_sparse_layer = 0;
      policy.estimator = v.estimator, policy.budget = v.budget, policy.correction = v.correction;
      policy.dense_suffix = 0;
      Buffers b(backend_);
      Step step(b, length - kChunk, kChunk, 1, policy);
      SelectParams p;
      p.batch = &step.batch;
      p.pool = step.pool;
      p.shape = kShape;
      p.q = step.q;
      p.lists = step.lists;
      p.probe_out = step.probe_out;
      timer_.Print("select " + std::to_string(length) + ": " + v.name,
                   timer_.Time([&](int) { backend_.SelectBlocks(p); }), 0, 0);
    }
  }

  void Decode(const std::string& name, int32_t seqs, int32_t length) {
    Buffers b(backend_);
    Step step(b, length - 1, 1, seqs, {});
    DecodeAttentionParams p;
    p.batch = &step.batch;
    p.pool = step.pool;
    p.shape = kShape;
    p.q = step.q;
    p.out = step.out;
    const double bytes = double(seqs) * length * kShape.kv_heads * kShape.head_dim * 4;
    timer_.Print(name, timer_.Time([&](int) { backend_.DecodeAttention(p); }), bytes, 0);
  }

  void Compress(int32_t length) {
    Buffers b(backend_);
    Step step(b, length - 1, 1, 1, {});
    const size_t heads = size_t(kShape.kv_heads);
    SelectTokensParams p;
    p.seq = &step.host_seqs[0];
    p.pool = step.pool;
    p.shape = kShape;
    p.budget = p.kv.budget;
    p.window_queries = 32;
    p.capacity = 4096;
    p.indices = b.Put(std::vector<int32_t>(heads * size_t(p.capacity)));
    p.counts = b.Put(std::vector<int32_t>(heads));
    timer_.Print("select_tokens, " + std::to_string(length),
                 timer_.Time([&](int) { backend_.SelectTokens(p); }), 0, 0);
    CompactParams c;
    c.seq = p.seq;
    c.pool = p.pool;
    c.shape = kShape;
    c.indices = p.indices, c.counts = p.counts, c.capacity = p.capacity;
    c.max_new_pages = PagesFor(p.budget);
    std::vector<int32_t> targets(heads * size_t(c.max_new_pages));
    std::iota(targets.begin(), targets.end(), 0);
    c.new_pages = b.Put(targets);
    timer_.Print("compact to 2048", timer_.Time([&](int) { backend_.Compact(c); }),
                 double(heads) * p.budget * kShape.head_dim * 8, 0);
  }

  void Sampling() {
    Buffers b(backend_);
    SampleParams p;
    p.logits = static_cast<float*>(b.Random(32 * kVocab, DType::kF32, 8));
    p.vocab = kVocab;
    for (const int32_t n : {1, 32}) {
      for (const bool greedy : {true, false}) {
        std::vector<SampleRow> rows(static_cast<size_t>(n));
        std::vector<SampleResult> results(static_cast<size_t>(n));
        for (int32_t i = 0; i < n; ++i) {
          rows[size_t(i)].logits_row = i;
          rows[size_t(i)].temperature = greedy ? 0.0f : 0.7f;
          rows[size_t(i)].top_p = 0.9f;
          rows[size_t(i)].top_k = 50;
        }
        p.rows = rows.data(), p.n = n, p.results = results.data();
        timer_.Print(std::string("sample, ") + std::to_string(n) +
                         (greedy ? " rows, greedy" : " rows, top-k and top-p"),
                     timer_.Time([&](int) { backend_.Sample(p); }), 0, 0);
      }
    }
  }

  KernelTimer& timer_;
  Backend& backend_;
};

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  using namespace entropyserve;
  std::vector<int32_t> lengths = {32768, 131072};
  bool few_rows = false;
  constexpr const char kLengths[] = "--lengths=";
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--few_rows") == 0) {
      few_rows = true;
      continue;
    }
    if (std::strncmp(argv[i], kLengths, sizeof(kLengths) - 1) != 0) {
      std::fprintf(stderr, "usage: kernel_bench [--few_rows] [--lengths=32768,131072]\n");
      return 2;
    }
    lengths.clear();
    for (char* at = argv[i] + sizeof(kLengths) - 1; *at;) {
      lengths.push_back(int32_t(std::strtol(at, &at, 10)));
      if (*at) ++at;
    }
  }
  Backend::Limits limits;
  limits.shape = kShape;
  limits.max_rows = kChunk;
  limits.max_context = *std::max_element(lengths.begin(), lengths.end());
  limits.max_seqs = 64;
  limits.vocab = kVocab;
  const auto make = [&](bool cublaslt_only) {
    CudaOptions options;
    options.pool_bytes = size_t{24} << 30;
    options.cublaslt_only = cublaslt_only;
    std::string error;
    std::unique_ptr<Backend> backend = MakeCudaBackend(options, &error);
    if (backend) {
      backend->Reserve(limits);
    } else {
      std::fprintf(stderr, "kernel_bench: %s\n", error.c_str());
    }
    return backend;
  };
  const std::unique_ptr<Backend> backend = make(false);
  if (!backend) return 1;
  std::printf("%s\n", backend->Description().c_str());
  KernelTimer timer(*backend);
  LinearBench linears(timer);
  linears.MeasureCeilings();
  if (few_rows) {
    const std::unique_ptr<Backend> cublaslt_only = make(true);
    if (!cublaslt_only) return 1;
    KernelTimer other(*cublaslt_only);
    LinearBench cublaslt(other);
    linears.FewRows(cublaslt);
    return 0;
  }
  linears.Run(DType::kBF16);
  if (backend->HasFastE4M3()) linears.Run(DType::kE4M3);
  Bench(timer).Run(lengths);
  return 0;
}
