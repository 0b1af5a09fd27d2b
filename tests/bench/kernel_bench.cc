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
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
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

namespace entropyserve {
namespace {

constexpr AttentionShape kShape{.layers = 1, .heads = 32, .kv_heads = 8, .head_dim = 128};
constexpr int64_t kHidden = 4096, kFfn = 14336, kVocab = 128256;
constexpr int32_t kChunk = 8192;  // tokens of a prefill step
constexpr DType kBf16 = DType::kBF16;

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
constexpr LinearShape kLinears[] = {{"qkv", 6144, kHidden, kBf16, false},
                                    {"o", kHidden, kHidden, DType::kF32, true},
                                    {"gate_up", 2 * kFfn, kHidden, kBf16, false},
                                    {"down", kHidden, kFfn, DType::kF32, true}};

struct Ceilings {
  double copy = 0;     // bytes/s, read and written
  double product = 0;  // FLOP/s
};

class Bench {
 public:
  explicit Bench(Backend& backend) : backend_(backend) {}

  // cublaslt: a bench of the backend whose linears are all cuBLASLt's.
  void FewRows(Bench& cublaslt) {
    MeasureCeilings();
    for (const DType in : {kBf16, DType::kE4M3}) {
      if (in == DType::kE4M3 && !backend_.HasFastE4M3()) continue;
      for (const LinearShape& l : kLinears) {
        for (const int64_t rows : {1, 2, 4, 8, 16}) {
          const std::string name =
              std::string(Name(in)) + " " + l.name + ", " + std::to_string(rows);
          const double bytes = l.Bytes(rows, in);
          Print(name + ": ours", TimeLinearGraph(rows, l, in), bytes, 0);
          Print(name + ": cuBLASLt", cublaslt.TimeLinearGraph(rows, l, in), bytes, 0);
        }
      }
    }
    const LinearShape logits{"logits", kVocab, kHidden, DType::kF32, false};
    for (const int64_t rows : {1, 8}) {
      const std::string name = "bf16 logits, " + std::to_string(rows);
      Print(name + ": ours", TimeLinearGraph(rows, logits, kBf16), logits.Bytes(rows, kBf16), 0);
      Print(name + ": cuBLASLt", cublaslt.TimeLinearGraph(rows, logits, kBf16),
            logits.Bytes(rows, kBf16), 0);
    }
  }

  void Run(const std::vector<int32_t>& lengths) {
    MeasureCeilings();
    Linears(kBf16);
    if (backend_.HasFastE4M3()) Linears(DType::kE4M3);
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
  // Buffers of one measurement.
  class Buffers {
   public:
    explicit Buffers(Backend& backend) : backend_(backend) {}
    ~Buffers() {
      for (void* p : taken_) backend_.Free(p);
    }
    void* Random(int64_t n, DType dtype, float range = 1) {
      void* p = Take(size_t(n) * SizeOf(dtype));
      backend_.FillRandom(p, dtype, n, range, ++seed_);
      return p;
    }
    template <typename T>
    T* Put(const std::vector<T>& x) {
      T* p = static_cast<T*>(Take(x.size() * sizeof(T)));
      backend_.CopyIn(p, x.data(), x.size() * sizeof(T));
      return p;
    }
    Matrix Quantized(int64_t rows, int64_t cols) {
      Matrix m{Take(size_t(rows * cols)), DType::kE4M3, rows, cols, nullptr};
      float* const scales = static_cast<float*>(Take(size_t(rows) * sizeof(float)));
      m.scales = scales;
      void* const wide = Random(rows * cols, kBf16);
      backend_.Quantize({wide, kBf16, static_cast<e4m3_t*>(m.data), scales, rows, cols});
      return m;
    }
    void* Take(size_t bytes) {
      void* p = backend_.Alloc(bytes);
      Check(p != nullptr, "not enough device memory for the bench");
      taken_.push_back(p);
      return p;
    }

   private:
    Backend& backend_;
    uint64_t seed_ = 0;
    std::vector<void*> taken_;
  };

  // Seconds of one call: the median of rounds of about 20 ms each.
  template <typename Call>
  double Time(Call call) {
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto seconds = [](auto d) { return std::chrono::duration<double>(d).count(); };
    const auto round = [&](int calls) {
      const auto begin = now();
      for (int i = 0; i < calls; ++i) call(i);
      backend_.Synchronize();
      return seconds(now() - begin) / calls;
    };
    round(2);
    const int calls = std::clamp(int(0.02 / round(3)), 3, 500);
    std::vector<double> times;
    for (int i = 0; i < 7; ++i) times.push_back(round(calls));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  void Print(const std::string& name, double seconds, double bytes, double flops) const {
    std::printf("%-34s %9.1f us", name.c_str(), seconds * 1e6);
    if (bytes > 0) {
      std::printf("  %6.0f GB/s %3.0f %%", bytes / seconds * 1e-9,
                  100 * bytes / seconds / ceilings_.copy);
    }
    if (flops > 0) {
      std::printf("  %6.1f TFLOP/s %3.0f %%", flops / seconds * 1e-12,
                  100 * flops / seconds / ceilings_.product);
    }
    std::printf("\n");
  }

  void MeasureCeilings() {
    const size_t bytes = size_t{2} << 30;
    {
      Buffers b(backend_);
      void *from = b.Random(int64_t(bytes / 4), DType::kF32), *to = b.Take(bytes);
      backend_.Synchronize();
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
      ceilings_.copy = 2.0 * double(bytes) / copy(10);
      cudaStreamDestroy(stream);
    }
    const double seconds = TimeLinear(8192, {"", 8192, 8192, kBf16, false}, kBf16);
    ceilings_.product = 2.0 * 8192 * 8192 * 8192 / seconds;
    std::printf("ceilings: copy %.0f GB/s, bf16 product %.0f TFLOP/s\n\n", ceilings_.copy * 1e-9,
                ceilings_.product * 1e-12);
  }

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
    Buffers b;
    LinearParams p;
    std::vector<Matrix> weights;
  };

  double TimeLinear(int64_t rows, const LinearShape& l, DType in) {
    LinearBuffers b(backend_, rows, l, in);
    return Time([&](int i) { backend_.Linear(b.Params(i)); });
  }

  // One of 16 in a graph, as a decode step runs them.
  double TimeLinearGraph(int64_t rows, const LinearShape& l, DType in) {
    constexpr int kCalls = 16;
    LinearBuffers b(backend_, rows, l, in);
    const uint64_t key = ++graphs_;
    const double seconds = Time([&](int) {
      backend_.Replay(key, [&] {
        for (int i = 0; i < kCalls; ++i) backend_.Linear(b.Params(i));
      });
    });
    return seconds / kCalls;
  }

  void Linears(DType in) {
    for (const int64_t rows :
         {int64_t{1}, int64_t{8}, int64_t{32}, int64_t{2048}, int64_t{kChunk}}) {
      for (const LinearShape& l : kLinears) {
        const double flops = 2.0 * double(rows * l.n * l.k);
        Print("linear " + std::string(Name(in)) + " " + l.name + ", " + std::to_string(rows) +
                  " rows",
              TimeLinear(rows, l, in), rows < 100 ? l.Bytes(rows, in) : 0, rows < 100 ? 0 : flops);
      }
    }
    if (in == DType::kE4M3) {  // the head is never quantized
      Print("linear e4m3 8192 x 8192, 8192 rows",
            TimeLinear(8192, {"", 8192, 8192, kBf16, false}, in), 0, 2.0 * 8192 * 8192 * 8192);
      return;
    }
    const double seconds = TimeLinear(1, {"", kVocab, kHidden, DType::kF32, false}, in);
    Print("linear logits, 1 row", seconds, 2.0 * double(kVocab) * kHidden, 0);
  }

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
    Print("embed, 8192 rows", Time([&](int) { backend_.Embed(embed); }), double(rows * kHidden) * 6,
          0);
    RmsNormParams norm;
    norm.x = embed.out;
    norm.weight = static_cast<float*>(b.Random(kHidden, DType::kF32));
    norm.out = b.Random(rows * kHidden, kBf16);
    norm.out_dtype = kBf16;
    norm.rows = rows, norm.hidden = kHidden;
    Print("rms_norm, 8192 rows", Time([&](int) { backend_.RmsNorm(norm); }),
          double(rows * kHidden) * 6, 0);
    norm.scales = static_cast<float*>(b.Random(rows, DType::kF32));
    norm.out_dtype = DType::kE4M3;
    Print("rms_norm e4m3, 8192 rows", Time([&](int) { backend_.RmsNorm(norm); }),
          double(rows * kHidden) * 5, 0);
    norm.rows = 1;
    Print("rms_norm e4m3, 1 row", Time([&](int) { backend_.RmsNorm(norm); }), 0, 0);
    norm.out_dtype = kBf16;
    Print("rms_norm, 1 row", Time([&](int) { backend_.RmsNorm(norm); }), 0, 0);
    QuantizeParams quantize;
    quantize.x = b.Random(rows * kHidden, kBf16);
    quantize.dtype = kBf16;
    quantize.out = static_cast<e4m3_t*>(norm.out);
    quantize.scales = norm.scales;
    quantize.rows = rows, quantize.cols = kHidden;
    Print("quantize, 8192 rows", Time([&](int) { backend_.Quantize(quantize); }),
          double(rows * kHidden) * 3, 0);
    SwiGluParams swiglu;
    swiglu.gate_up = b.Random(rows * 2 * kFfn, kBf16);
    swiglu.out = b.Random(rows * kFfn, kBf16);
    swiglu.dtype = kBf16;
    swiglu.rows = rows, swiglu.ffn = kFfn;
    Print("swiglu, 8192 rows", Time([&](int) { backend_.SwiGlu(swiglu); }), double(rows * kFfn) * 6,
          0);
    swiglu.scales = norm.scales;
    Print("swiglu e4m3, 8192 rows", Time([&](int) { backend_.SwiGlu(swiglu); }),
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
    Print("qkv_post with bounds, 8192 rows", Time([&](int) { backend_.QkvPost(qkv); }),
          double(rows) * 48 * 128 * 4, 0);
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
      Print("select " + std::to_string(length) + ": " + v.name,
            Time([&](int) { backend_.SelectBlocks(p); }), 0, 0);
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
    Print(name, Time([&](int) { backend_.DecodeAttention(p); }), bytes, 0);
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
    Print("select_tokens, " + std::to_string(length), Time([&](int) { backend_.SelectTokens(p); }),
          0, 0);
    p.kv.query_reduce = Reduce::kMax;
    Print("select_tokens, query_reduce max, " + std::to_string(length),
          Time([&](int) { backend_.SelectTokens(p); }), 0, 0);
    CompactParams c;
    c.seq = p.seq;
    c.pool = p.pool;
    c.shape = kShape;
    c.indices = p.indices, c.counts = p.counts, c.capacity = p.capacity;
    c.max_new_pages = PagesFor(p.budget);
    std::vector<int32_t> targets(heads * size_t(c.max_new_pages));
    std::iota(targets.begin(), targets.end(), 0);
    c.new_pages = b.Put(targets);
    Print("compact to 2048", Time([&](int) { backend_.Compact(c); }),
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
        Print(std::string("sample, ") + std::to_string(n) +
                  (greedy ? " rows, greedy" : " rows, top-k and top-p"),
              Time([&](int) { backend_.Sample(p); }), 0, 0);
      }
    }
  }

  Backend& backend_;
  uint64_t graphs_ = 0;  // recorded so far
  Ceilings ceilings_;
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
  Bench bench(*backend);
  if (few_rows) {
    const std::unique_ptr<Backend> cublaslt_only = make(true);
    if (!cublaslt_only) return 1;
    Bench cublaslt(*cublaslt_only);
    bench.FewRows(cublaslt);
  } else {
    bench.Run(lengths);
  }
  return 0;
}
