// The operators a model step is made of, one interface for the CPU and for CUDA.
//
// Host code builds a Batch, then calls the operators of every layer in order; a backend may run
// them later, in that order (CUDA: one stream). Nothing is read back before Synchronize(). All
// pointers are in the backend's own memory unless a comment says "host".
//
// Letters in shapes: rows = tokens of the step (all sequences, concatenated), heads, kv_heads,
// group = heads / kv_heads, head_dim, hidden, ffn, vocab, S = segment, B = block, W = window.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "kernels/policy_params.h"
#include "kernels/tensor.h"

namespace entropyserve {

// ---- The KV cache as kernels see it
// --------------------------------------------------------------

// One pool for all layers, heads and sequences. A page belongs to one kv head of one layer and has
// two halves of kPageTokens rows: K rows and V rows. The same pages also hold
//   - block bounds: row j of a bounds page is the max (K half) and min (V half) of 1 block's keys;
//   - window queries: vector i lies in page i / 128, K half when i % 128 < 64, row i % 64.
struct KvPool {
  void* k = nullptr;             // [pages, kPageTokens, head_dim]
  void* v = nullptr;             // [pages, kPageTokens, head_dim]
  int32_t* positions = nullptr;  // [pages, kPageTokens] true position of each cached token
  DType dtype = DType::kF32;
  int32_t head_dim = 0;
  int64_t pages = 0;
};

// The parts of a page, in the order in which whole pages are copied to and from the host.
struct PagePart {
  void* data = nullptr;
  size_t bytes = 0;
};
inline std::array<PagePart, 3> PageParts(const KvPool& pool, int32_t page) {
  const size_t half = size_t{kPageTokens} * pool.head_dim * SizeOf(pool.dtype);
  return {{{static_cast<std::byte*>(pool.k) + page * half, half},
           {static_cast<std::byte*>(pool.v) + page * half, half},
           {pool.positions + size_t(page) * kPageTokens, kPageTokens * sizeof(int32_t)}}};
}

// A head's cached tokens are two runs, each contiguous over its pages:
//   past: tokens [0, past) in pages [0, ceil(past / 64)): what earlier turns left;
//   turn: base + appended tokens in the pages after that. It starts on a fresh page.
// `appended` is the same for all heads of a sequence and is in BatchSeq.
struct HeadLength {
  int32_t past = 0;
  int32_t base = 0;  // turn tokens at the time the lengths were last written (0 during a prefill)
};

// State of the entropy budget rule, carried over the chunks of a turn. Zeroed at its start.
struct HeadState {
  float entropy = 0;      // of the last full segment
  float budget = 0;       // tokens, of the last full segment
  int32_t segments = 0;   // full segments seen
  int32_t not_rigid = 0;  // 1 once an entropy reached e_t
};

// Attention work done by a prefill, summed over layers and query heads.
struct SeqCounters {
  uint64_t pairs = 0;       // (query, key) pairs inside the mask; probes and correction included
  uint64_t box_blocks = 0;  // (segment, visible block) pairs that the box estimator scored
};

// One sequence's part of a step. Plain data: copied to the device as it is.
struct BatchSeq {
  const int32_t* pages = nullptr;   // [layers, kv_heads, max_pages]
  const int32_t* bounds = nullptr;  // [layers, kv_heads, max_bounds]; null: no bounds are kept
  const int32_t* window_pages =
      nullptr;  // [layers, kv_heads, max_window_pages]; null: no queries are kept
  const HeadLength* lengths = nullptr;  // [layers, kv_heads]
  HeadState* states = nullptr;          // [layers, kv_heads]; prefill only
  SeqCounters* counters = nullptr;      // one; prefill only
  float* trace_entropy = nullptr;       // [layers, kv_heads, trace_segments] or null
  float* trace_budget = nullptr;        // the same, tokens
  int32_t* trace_selected = nullptr;    // the same, blocks; -1: dense
  int32_t trace_segments = 0;
  int32_t max_pages = 0, max_bounds = 0, max_window_pages = 0;
  int32_t window = 0;      // W: a ring of the last W queries, slot = position % W
  int32_t row_begin = 0;   // first row of the batch
  int32_t rows = 0;        // 1 when decoding
  int32_t appended = 0;    // turn tokens cached before this step since `lengths` was written
  int32_t position = 0;    // true position of the first row
  int32_t turn_total = 0;  // tokens this turn prefills in all; 0 when decoding
  PrefillParams policy;    // prefill only

  bool decoding() const { return turn_total == 0; }
};

// A segment of a prefill that this step runs: rows of one sequence that share one selection.
struct BatchSegment {
  int32_t seq = 0;        // index into Batch::seqs
  int32_t row_begin = 0;  // row of the batch
  int32_t rows = 0;       // == S except for the last of a turn
  int32_t index = 0;      // s: number of the segment in its turn
};

struct Batch {
  int32_t rows = 0;
  int32_t num_seqs = 0;
  int32_t num_segments = 0;
  int32_t num_decodes = 0;
  // Host copies, for launch shapes.
  const BatchSeq* seqs = nullptr;          // host [num_seqs]
  const BatchSegment* segments = nullptr;  // host [num_segments], ascending (seq, index)
  const int32_t* decodes = nullptr;        // host [num_decodes] indices of decoding sequences
  // The same in the backend's memory (on the CPU: the same pointers).
  const BatchSeq* device_seqs = nullptr;
  const BatchSegment* device_segments = nullptr;
  const int32_t* device_decodes = nullptr;
  const int32_t* tokens = nullptr;   // [rows] ids
  const int32_t* row_seq = nullptr;  // [rows] index into seqs
};

// ---- Operators' parameters
// -----------------------------------------------------------------------

// A weight matrix, row-major as in a checkpoint: out = x * w^T.
struct Matrix {
  void* data = nullptr;  // [rows, cols]
  DType dtype = DType::kF32;
  int64_t rows = 0;               // outputs
  int64_t cols = 0;               // inputs
  const float* scales = nullptr;  // [rows] of kE4M3: a weight is data * scales[its row]
};

struct AttentionShape {
  int32_t layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int32_t group() const { return heads / kv_heads; }
};

struct EmbedParams {
  const int32_t* tokens = nullptr;  // [rows]
  Matrix table;                     // [vocab, hidden]
  float* out = nullptr;             // [rows, hidden]
  int64_t rows = 0;
};

struct RmsNormParams {
  const float* x = nullptr;            // [*, hidden] residual stream
  const int32_t* row_index = nullptr;  // [rows] rows of x to take; null: the first `rows`
  const float* weight = nullptr;       // [hidden]
  void* out = nullptr;                 // [rows, hidden]
  DType out_dtype = DType::kF32;
  int64_t rows = 0, hidden = 0;
  float eps = 1e-5f;
  float* scales = nullptr;  // [rows], written when out_dtype is kE4M3
};

struct LinearParams {
  const void* x = nullptr;  // [rows, w.cols], of w.dtype
  Matrix w;
  const float* bias = nullptr;  // [w.rows] or null
  void* out = nullptr;          // [rows, w.rows]
  DType out_dtype = DType::kF32;
  bool accumulate = false;  // out += instead of out = (out_dtype kF32 only)
  int64_t rows = 0;
  const float* x_scales = nullptr;  // [rows] when w is kE4M3
};

struct SwiGluParams {
  const void* gate_up = nullptr;  // [rows, 2, ffn]: gate, then up
  void* out = nullptr;            // [rows, ffn]: silu(gate) * up
  DType dtype = DType::kF32;      // of both; of gate_up when there are scales
  int64_t rows = 0, ffn = 0;
  float* scales = nullptr;  // [rows], written; out is kE4M3 then
};

// Rows as kE4M3, each with the scale that makes its largest element 448.
struct QuantizeParams {
  const void* x = nullptr;  // [rows, cols]
  DType dtype = DType::kF32;
  e4m3_t* out = nullptr;    // [rows, cols]
  float* scales = nullptr;  // [rows]
  int64_t rows = 0, cols = 0;
};

// Copies rows: out[i] = x[row_index[i]].
struct GatherRowsParams {
  const void* x = nullptr;             // [*, row_bytes]
  const int32_t* row_index = nullptr;  // [rows]
  void* out = nullptr;                 // [rows, row_bytes]
  int64_t rows = 0, row_bytes = 0;     // row_bytes: a multiple of 2
};

// q/k norm, RoPE, writes to the cache: K, V, positions, block bounds (bounds of blocks that this
// step touches, over the keys cached so far; sequences with `bounds` only) and the window's
// queries.
struct QkvParams {
  const Batch* batch = nullptr;
  KvPool pool;
  AttentionShape shape;
  int32_t layer = 0;
  const void* qkv = nullptr;      // [rows, heads + 2 * kv_heads, head_dim]: q, k, v
  void* q = nullptr;              // [rows, heads, head_dim], after norm and RoPE
  DType dtype = DType::kF32;      // of qkv, q and pool
  const float* q_norm = nullptr;  // [head_dim] or null
  const float* k_norm = nullptr;  // [head_dim] or null
  float norm_eps = 1e-6f;
  const float* inv_freq =
      nullptr;              // [head_dim / 2], radians per position; half-split pairs (i, i + d/2)
  float rope_scale = 1.0f;  // multiplies cos and sin (YaRN's attention factor)
};

// Lists made by SelectBlocks, read by PrefillAttention.
struct BlockLists {
  int32_t* counts = nullptr;  // [segments, kv_heads] blocks; -1: dense
  int32_t* blocks = nullptr;  // [segments, kv_heads, capacity] ascending block numbers of the turn
  int32_t capacity = 0;
};

struct SelectParams {
  const Batch* batch = nullptr;
  KvPool pool;
  AttentionShape shape;
  int32_t layer = 0;
  const void* q = nullptr;  // [rows, heads, head_dim] of pool.dtype
  BlockLists lists;         // written for every segment of the batch
  // What the probes of sparse segments found, for the correction: exact outputs of the queries at
  // offsets 0, r, 2r... of each row range. Row i of the batch with a probe uses row i here.
  float* probe_out = nullptr;  // [rows, heads, head_dim]
};

struct PrefillAttentionParams {
  const Batch* batch = nullptr;
  KvPool pool;
  AttentionShape shape;
  int32_t layer = 0;
  const void* q = nullptr;  // [rows, heads, head_dim] of pool.dtype
  BlockLists lists;
  const float* probe_out = nullptr;  // see SelectParams; read where the policy's correction is on
  void* out = nullptr;               // [rows, heads, head_dim] of pool.dtype; rows of segments only
};

struct DecodeAttentionParams {
  const Batch* batch = nullptr;
  KvPool pool;
  AttentionShape shape;
  int32_t layer = 0;
  const void* q = nullptr;  // [rows, heads, head_dim] of pool.dtype
  void* out = nullptr;      // the same; rows of decoding sequences only
};

// Chooses which cached tokens of one sequence survive. `seq` describes the cache as after the last
// step: base + appended turn tokens, `position` = the next one's.
struct SelectTokensParams {
  const BatchSeq* seq = nullptr;  // host
  KvPool pool;
  AttentionShape shape;
  int32_t layer = 0;
  KvParams kv;
  int32_t budget = 0;          // tokens per kv head: kv.budget or the fraction, resolved
  int32_t window_queries = 0;  // queries in the ring that count, the last ones, <= W
  int32_t* indices = nullptr;  // [kv_heads, capacity] kept tokens (past run first), ascending
  int32_t* counts = nullptr;   // [kv_heads]
  int32_t capacity = 0;        // >= longest list (adakv: up to kv_heads * budget)
};

// Gathers tokens of one layer into fresh pages: K, V and positions.
struct CompactParams {
  const BatchSeq* seq = nullptr;  // host: the source
  KvPool pool;
  AttentionShape shape;
  int32_t layer = 0;
  const int32_t* indices = nullptr;  // [kv_heads, capacity]; null: identity
  const int32_t* counts = nullptr;   // [kv_heads]
  int32_t capacity = 0;
  const int32_t* new_pages = nullptr;  // [kv_heads, max_new_pages]
  int32_t max_new_pages = 0;
};

struct SampleRow {
  int32_t logits_row = 0;
  float temperature = 1, top_p = 1, min_p = 0;
  int32_t top_k = 0;
  float repetition = 1, presence = 0, frequency = 0;
  uint64_t seed = 0;
  int64_t position = 0;   // the new token's: noise is a function of (seed, position) only
  int32_t forced = -1;    // >= 0: this token is taken
  int32_t logprobs = -1;  // -1: none; 0..20: how many of the top
  const uint32_t* history =
      nullptr;  // [vocab]: bit 31: in the session; low bits: count in this answer
  const int32_t* banned =
      nullptr;  // [num_banned] ids that may not be taken (end ids before min_new_tokens)
  int32_t num_banned = 0;
};

inline constexpr int kMaxTopLogprobs = 20;

struct SampleResult {
  int32_t token = -1;
  float logprob = 0;  // of `token`, raw model
  int32_t num_top = 0;
  int32_t top_ids[kMaxTopLogprobs] = {};
  float top_logprobs[kMaxTopLogprobs] = {};
  int32_t finite = 1;  // 0: a logit was NaN or +inf
};

struct SampleParams {
  const float* logits = nullptr;  // [n, vocab] raw
  int64_t vocab = 0;
  const SampleRow* rows = nullptr;  // host [n]; pointers inside are in the backend's memory
  int32_t n = 0;
  SampleResult* results = nullptr;  // host [n]; valid after Synchronize()
};

// How far two predictions of one token lie apart.
struct LogitsComparison {
  double kl = 0;                        // KL(softmax(a) || softmax(b)), nats; at least 0
  double logprob_a = 0, logprob_b = 0;  // of the target
  int32_t top1_equal = 0;               // the largest logits are the same id (lowest of equal ones)
  int32_t finite = 1;                   // 0: a logit was NaN or +inf; nothing else is set then
};

struct CompareLogitsParams {
  const float* a = nullptr;  // [n, vocab] raw
  const float* b = nullptr;  // [n, vocab] raw
  int64_t vocab = 0;
  const int32_t* targets = nullptr;  // [n] ids in [0, vocab)
  int32_t n = 0;
  LogitsComparison* results = nullptr;  // [n], in the backend's memory
};

// SplitMix64 of (seed, i), its upper 24 bits as a number in [-range, range).
constexpr float RandomUniform(uint64_t seed, uint64_t i, float range) {
  uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return (float(z >> 40) * 0x1p-23f - 1.0f) * range;
}

// ---- The interface
// -------------------------------------------------------------------------------

// Not thread-safe: one thread at a time (the engine thread). Operators cannot fail on valid input;
// a CUDA error ends the process (kernels/cuda/cuda_check.h).
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string Description()
      const = 0;                        // "CPU: 2 threads, avx512_bf16, amx", "CUDA: NVIDIA H100"
  virtual DType AutoDType() const = 0;  // what --dtype=auto means here
  // Whether linears of kE4M3 are fast here; they work on a CPU too, as the twin of a GPU's.
  virtual bool HasFastE4M3() const = 0;

  // Memory. Alloc returns zeroed memory, or null when there is not enough.
  virtual void* Alloc(size_t bytes) = 0;
  virtual void Free(void* p) = 0;
  virtual size_t FreeMemory() const = 0;  // bytes that may still be allocated
  virtual void CopyIn(void* dst, const void* host_src,
                      size_t bytes) = 0;  // src may be reused on return
  // `height` rows of `width` bytes each; pitches in bytes.
  virtual void CopyIn2D(void* dst, size_t dst_pitch, const void* host_src, size_t src_pitch,
                        size_t width, size_t height) = 0;
  virtual void CopyOut(void* host_dst, const void* src, size_t bytes) = 0;  // synchronizes
  // Whole pages: the K half of pages[0], its V half, its positions, then pages[1]... packed in
  // host memory. CopyPagesOut synchronizes; CopyPagesIn's source may be reused on return.
  virtual void CopyPagesOut(void* host_dst, const KvPool& pool, std::span<const int32_t> pages) = 0;
  virtual void CopyPagesIn(const KvPool& pool, std::span<const int32_t> pages,
                           const void* host_src) = 0;
  virtual void Zero(void* p, size_t bytes) = 0;
  // n elements drawn uniformly from [-range, range): element i is a hash of (seed, i), so every
  // backend makes the same weights (RandomUniform below).
  virtual void FillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed) = 0;
  virtual void Synchronize() = 0;

  // Called once before the first operator, with the largest step that will come, so that scratch is
  // taken at start. Returns bytes taken.
  struct Limits {
    AttentionShape shape;
    int64_t max_rows = 0;     // of a step
    int64_t max_context = 0;  // tokens of a sequence
    int64_t max_seqs = 0;
    int64_t vocab = 0;
  };
  virtual size_t Reserve(const Limits& limits) = 0;

  virtual void Embed(const EmbedParams& p) = 0;
  virtual void RmsNorm(const RmsNormParams& p) = 0;
  virtual void Linear(const LinearParams& p) = 0;
  virtual void SwiGlu(const SwiGluParams& p) = 0;
  virtual void Quantize(const QuantizeParams& p) = 0;
  virtual void GatherRows(const GatherRowsParams& p) = 0;
  virtual void QkvPost(const QkvParams& p) = 0;
  virtual void SelectBlocks(const SelectParams& p) = 0;
  virtual void PrefillAttention(const PrefillAttentionParams& p) = 0;
  virtual void DecodeAttention(const DecodeAttentionParams& p) = 0;
  virtual void SelectTokens(const SelectTokensParams& p) = 0;
  virtual void Compact(const CompactParams& p) = 0;
  virtual void Sample(const SampleParams& p) = 0;
  virtual void CompareLogits(const CompareLogitsParams& p) = 0;

  // Runs `step`, which calls Embed, RmsNorm, Linear, SwiGlu, Quantize, GatherRows, QkvPost and
  // DecodeAttention and nothing else of the backend. Calls with one key do the same work on the
  // same buffers (only what is in them differs), so that a backend may record the work once and
  // replay it: then `step` is not called. No weights are written in it.
  virtual void Replay(uint64_t /*key*/, const std::function<void()>& step) { step(); }
};

// threads: 0 means one per core this process may use.
std::unique_ptr<Backend> MakeCpuBackend(int threads);

}  // namespace entropyserve
