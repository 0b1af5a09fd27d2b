// The scores are SnapKV's (arXiv 2404.14469) per kv head; the shared budget is Ada-KV's (arXiv
// 2407.11550).
#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/kv_view.cuh"
#include "kernels/cuda/mass.h"
#include "kernels/cuda/select_tokens.h"
#include "kernels/cuda/topk.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = 256;

// SelectTokensParams by value, and scratch.
struct TokenParams {
  BatchSeq seq;
  AttentionShape shape;
  int32_t layer;
  KvParams kv;
  int32_t budget, window_queries;
  DType dtype;
  const void *pool_k, *pool_v;  // [pages, kPageTokens, head_dim]
  int32_t *indices, *counts;    // [kv_heads, capacity], [kv_heads]
  int32_t capacity;
  int64_t stride;   // a bound on a head's tokens
  MassItem* items;  // [kv_heads]
  void* queries;    // [kv_heads, window_queries * group, head_dim]
  float* mass;      // [kv_heads, stride]
  float* scores;    // [kv_heads, stride] pooled; +inf: a sink
  uint32_t* keys;   // [stride, kv_heads] adakv: what competes for the shared part, 0: does not
  int32_t* earlier_counts;  // [kv_heads] best earlier tokens that a head keeps
};

struct Lengths {
  int32_t length;   // tokens, both runs
  int32_t earlier;  // of them, before the window
  __device__ int32_t window() const { return length - earlier; }
};
__device__ __forceinline__ Lengths LengthsOf(const TokenParams& p, int32_t kv_head) {
  const HeadView view = ViewHead(p.seq, p.shape.kv_heads, p.layer, kv_head);
  const int32_t length = view.past + view.turn;
  return {length, max(0, length - p.kv.window)};
}

// The window's queries that count, oldest first, and what they may see. Grid: kv_heads.
template <typename T>
__global__ void __launch_bounds__(kThreads) WindowKernel(TokenParams p) {
  const int32_t kv_head = blockIdx.x, group = p.shape.heads / p.shape.kv_heads,
                dim = p.shape.head_dim;
  const HeadView view = ViewHead(p.seq, p.shape.kv_heads, p.layer, kv_head);
  const int32_t n = p.window_queries, rows = n * group, chunks = dim / 8;
  T* const out = static_cast<T*>(p.queries) + int64_t{kv_head} * rows * dim;
  for (int i = threadIdx.x; i < rows * chunks; i += kThreads) {
    const int32_t row = i / chunks, chunk = i % chunks;
    const int32_t slot = (p.seq.position - n + row / group) % p.seq.window;
    const WindowSlot at = WindowRow(view.window_pages, slot * group + row % group);
    float x[8];
    Load8(static_cast<const T*>(at.k_half ? p.pool_k : p.pool_v) + at.row * dim + chunk * 8, x);
    Store8(out + int64_t{row} * dim + chunk * 8, x);
  }
  if (threadIdx.x == 0) {
    const Lengths lengths = LengthsOf(p, kv_head);
    MassItem item = {};
    item.q = out;
    item.pages = view.pages;
    item.past = view.past;
    item.rows = lengths.earlier > 0 ? rows : 0;
    item.group = group;
    item.q_stride = group;
    item.first_limit = lengths.length - n + 1;
    item.limit_step = 1;
    item.bins = lengths.earlier;
    item.bin_size = 1;
    p.items[kv_head] = item;
  }
}

// Mean or maximum over neighbours among the earlier tokens, zeros beyond the ends.
// Grid: (tokens, kv_heads).
__global__ void __launch_bounds__(kThreads) PoolKernel(TokenParams p) {
  const int32_t kv_head = blockIdx.y, i = blockIdx.x * kThreads + threadIdx.x;
  const Lengths lengths = LengthsOf(p, kv_head);
  if (i >= lengths.earlier) return;
  const float* mass = p.mass + kv_head * p.stride;
  const int32_t before = p.kv.pool_before, after = p.kv.pool_after;
  const int32_t first = max(0, i - after), last = min(lengths.earlier - 1, i + before);
  float sum = 0, high = 0;
  for (int32_t j = first; j <= last; ++j) {
    sum += mass[j];
    high = fmaxf(high, mass[j]);
  }
  float score = p.kv.pooling == Pooling::kMax ? high : sum / float(before + 1 + after);
  if (score != score) score = 0;
  if (p.kv.keep_sinks && i < kSinkTokens) score = INFINITY;
  p.scores[kv_head * p.stride + i] = score;
}

// Earlier tokens that a head keeps for certain: all (full), its budget (latent, snapkv), its floor
// (adakv).
__device__ int32_t OwnCount(const TokenParams& p, const Lengths& lengths) {
  if (p.kv.rule == KvRule::kFull) return lengths.earlier;
  if (p.kv.rule != KvRule::kAdaKv) {
    return min(max(p.budget - lengths.window(), 0), lengths.earlier);
  }
  const int32_t sinks = p.kv.keep_sinks ? min(kSinkTokens, lengths.earlier) : 0;
  const int32_t floor = int32_t(p.kv.adakv_floor * float(p.budget)) - lengths.window();
  return floor < sinks ? sinks : min(floor, lengths.earlier);
}

__global__ void CountKernel(TokenParams p) {
  const int32_t kv_head = blockIdx.x * blockDim.x + threadIdx.x;
  if (kv_head < p.shape.kv_heads) p.earlier_counts[kv_head] = OwnCount(p, LengthsOf(p, kv_head));
}

// adakv: what is above a head's floor competes. Grid: kv_heads.
__global__ void __launch_bounds__(kTopKThreads) CompeteKernel(TokenParams p) {
  __shared__ TopKShared shared;
  const int32_t kv_head = blockIdx.x, kv_heads = p.shape.kv_heads;
  const Lengths lengths = LengthsOf(p, kv_head);
  const float* scores = p.scores + kv_head * p.stride;
  const auto key = [&](int64_t i) { return OrderedKey(scores[i]); };
  for (int64_t i = threadIdx.x; i < p.stride; i += kTopKThreads) {
    p.keys[i * kv_heads + kv_head] = i < lengths.earlier ? key(i) : 0;
  }
  __syncthreads();
  const int32_t floor = p.earlier_counts[kv_head];
  if (floor == 0) return;
  const Threshold best = FindThreshold(key, lengths.earlier, floor, shared);
  ForChosen(key, lengths.earlier, best, shared,
            [&](int32_t, int32_t i, uint32_t) { p.keys[int64_t{i} * kv_heads + kv_head] = 0; });
}

// adakv: the rest of the layer's budget goes to the highest scores of all heads; ties to the
// earlier token, then the lower head. One block of threads.
__global__ void __launch_bounds__(kTopKThreads) ShareKernel(TokenParams p) {
  __shared__ TopKShared shared;
  const int32_t kv_heads = p.shape.kv_heads;
  int64_t left = int64_t{p.budget} * kv_heads, rest = 0, longest = 0;
  for (int32_t kv = 0; kv < kv_heads; ++kv) {
    const Lengths lengths = LengthsOf(p, kv);
    const int32_t floor = OwnCount(p, lengths);
    left -= lengths.window() + floor;
    rest += lengths.earlier - floor;
    longest = max(longest, int64_t{lengths.earlier});
  }
  const int64_t take = min(max(left, int64_t{0}), rest);
  if (take == 0) return;
  const auto key = [&](int64_t i) { return p.keys[i]; };
  const int64_t n = longest * kv_heads;
  const Threshold best = FindThreshold(key, n, int32_t(take), shared);
  ForChosen(key, n, best, shared,
            [&](int32_t, int32_t i, uint32_t) { atomicAdd(&p.earlier_counts[i % kv_heads], 1); });
}

// The head's best earlier tokens and its window, ascending. Grid: kv_heads.
__global__ void __launch_bounds__(kTopKThreads) WriteKernel(TokenParams p) {
  __shared__ TopKShared shared;
  const int32_t kv_head = blockIdx.x;
  const Lengths lengths = LengthsOf(p, kv_head);
  const float* scores = p.scores + kv_head * p.stride;
  int32_t* const out = p.indices + int64_t{kv_head} * p.capacity;
  const int32_t window = min(lengths.window(), p.capacity);
  const int32_t count = min(p.earlier_counts[kv_head], p.capacity - window);
  if (count == lengths.earlier) {
    for (int32_t i = threadIdx.x; i < count; i += kTopKThreads) out[i] = i;
  } else if (count > 0) {
    const auto key = [&](int64_t i) { return OrderedKey(scores[i]); };
    const Threshold best = FindThreshold(key, lengths.earlier, count, shared);
    ForChosen(key, lengths.earlier, best, shared,
              [&](int32_t position, int32_t i, uint32_t) { out[position] = i; });
  }
  for (int32_t i = threadIdx.x; i < window; i += kTopKThreads) {
    out[count + i] = lengths.length - window + i;
  }
  if (threadIdx.x == 0) p.counts[kv_head] = count + window;
}

struct CompactArgs {
  BatchSeq seq;
  AttentionShape shape;
  int32_t layer;
  char *pool_k, *pool_v;
  int32_t* positions;
  int32_t row_chunks;  // of 16 bytes, per vector
  const int32_t *indices, *counts, *new_pages;
  int32_t capacity, max_new_pages;
};

// Grid: (max_new_pages, kv_heads).
__global__ void __launch_bounds__(kThreads) CompactKernel(CompactArgs p) {
  __shared__ int64_t from_rows[kPageTokens];
  const int32_t page = blockIdx.x, kv_head = blockIdx.y;
  const int32_t begin = page * kPageTokens, tokens = min(p.counts[kv_head] - begin, kPageTokens);
  if (tokens <= 0) return;
  const HeadView view = ViewHead(p.seq, p.shape.kv_heads, p.layer, kv_head);
  const int64_t to = PageRow(p.new_pages[int64_t{kv_head} * p.max_new_pages + page], 0);
  if (int(threadIdx.x) < tokens) {
    const int32_t i = begin + threadIdx.x;
    const int64_t from = view.Row(p.indices ? p.indices[int64_t{kv_head} * p.capacity + i] : i);
    from_rows[threadIdx.x] = from;
    p.positions[to + threadIdx.x] = p.positions[from];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * p.row_chunks; i += kThreads) {
    const int64_t row = i / p.row_chunks, chunk = i % p.row_chunks;
    const int64_t source = (from_rows[row] * p.row_chunks + chunk) * 16;
    const int64_t target = ((to + row) * p.row_chunks + chunk) * 16;
    *reinterpret_cast<uint4*>(p.pool_k + target) =
        *reinterpret_cast<const uint4*>(p.pool_k + source);
    *reinterpret_cast<uint4*>(p.pool_v + target) =
        *reinterpret_cast<const uint4*>(p.pool_v + source);
  }
}

size_t Align(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Pieces of the scratch for `tokens` cached tokens a head and `queries` window queries.
struct Pieces {
  Pieces(const AttentionShape& shape, int64_t tokens, int64_t queries, DType dtype)
      : items(Align(size_t(shape.kv_heads) * sizeof(MassItem))),
        counts(Align(size_t(shape.kv_heads) * sizeof(int32_t))),
        vectors(Align(size_t(queries) * shape.heads * shape.head_dim * SizeOf(dtype))),
        per_token(Align(size_t(shape.kv_heads) * tokens * sizeof(float))),
        passes(Align(MassScratchBytes(shape.kv_heads, queries * shape.group(), tokens))) {}
  size_t items, counts, vectors, per_token, passes;
  size_t total() const { return items + counts + vectors + 3 * per_token + passes; }
};

}  // namespace

size_t SelectTokensScratchBytes(const Backend::Limits& limits) {
  return Pieces(limits.shape, limits.max_context, kMaxWindow, DType::kF32).total();
}

void RunSelectTokens(const SelectTokensParams& op, void* scratch, size_t scratch_bytes,
                     cudaStream_t stream) {
  Check(op.window_queries <= op.kv.window && op.window_queries <= op.seq->window,
        "no more window queries than the ring holds");
  const AttentionShape& shape = op.shape;
  const int64_t tokens = std::max(op.seq->position, 1);  // a bound: no token without a position
  const Pieces pieces(shape, tokens, op.window_queries, op.pool.dtype);
  Check(pieces.total() <= scratch_bytes, "Reserve took room for SelectTokens");
  char* at = static_cast<char*>(scratch);
  const auto take = [&](size_t bytes) {
    char* piece = at;
    at += bytes;
    return static_cast<void*>(piece);
  };
  TokenParams p;
  p.seq = *op.seq;
  p.shape = shape, p.layer = op.layer, p.kv = op.kv;
  p.budget = op.budget, p.window_queries = op.window_queries;
  p.dtype = op.pool.dtype, p.pool_k = op.pool.k, p.pool_v = op.pool.v;
  p.indices = op.indices, p.counts = op.counts, p.capacity = op.capacity;
  p.stride = tokens;
  p.items = static_cast<MassItem*>(take(pieces.items));
  p.earlier_counts = static_cast<int32_t*>(take(pieces.counts));
  p.queries = take(pieces.vectors);
  p.mass = static_cast<float*>(take(pieces.per_token));
  p.scores = static_cast<float*>(take(pieces.per_token));
  p.keys = static_cast<uint32_t*>(take(pieces.per_token));

  const unsigned kv_heads = unsigned(shape.kv_heads);
  if (op.kv.rule != KvRule::kFull) {
    CUDA_CHECK(cudaMemsetAsync(p.mass, 0, pieces.per_token, stream));
    if (op.window_queries > 0) {
      if (p.dtype == DType::kF32) {
        WindowKernel<float><<<kv_heads, kThreads, 0, stream>>>(p);
      } else {
        WindowKernel<bf16><<<kv_heads, kThreads, 0, stream>>>(p);
      }
      MassParams mass;
      mass.items = p.items;
      mass.num_items = shape.kv_heads;
      mass.max_rows = op.window_queries * shape.group();
      mass.max_keys = mass.max_bins = int32_t(tokens);
      mass.head_dim = shape.head_dim;
      mass.dtype = p.dtype;
      mass.pool_k = p.pool_k;
      mass.scratch = at;
      mass.mass = p.mass;
      mass.mass_stride = p.stride;
      LaunchMass(mass, stream);
    }
    const dim3 grid(unsigned(CeilDiv<int64_t>(tokens, kThreads)), kv_heads);
    PoolKernel<<<grid, kThreads, 0, stream>>>(p);
  }
  CountKernel<<<unsigned(CeilDiv(shape.kv_heads, 32)), 32, 0, stream>>>(p);
  if (op.kv.rule == KvRule::kAdaKv) {
    CompeteKernel<<<kv_heads, kTopKThreads, 0, stream>>>(p);
    ShareKernel<<<1, kTopKThreads, 0, stream>>>(p);
  }
  WriteKernel<<<kv_heads, kTopKThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchCompact(const CompactParams& op, cudaStream_t stream) {
  if (op.max_new_pages == 0) return;
  CompactArgs p;
  p.seq = *op.seq;
  p.shape = op.shape, p.layer = op.layer;
  p.pool_k = static_cast<char*>(op.pool.k), p.pool_v = static_cast<char*>(op.pool.v);
  p.positions = op.pool.positions;
  p.row_chunks = int32_t(op.shape.head_dim * SizeOf(op.pool.dtype) / 16);
  p.indices = op.indices, p.counts = op.counts, p.new_pages = op.new_pages;
  p.capacity = op.capacity, p.max_new_pages = op.max_new_pages;
  CompactKernel<<<dim3(unsigned(op.max_new_pages), unsigned(op.shape.kv_heads)), kThreads, 0,
                  stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
