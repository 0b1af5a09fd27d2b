#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/kv_view.cuh"
#include "kernels/cuda/qkv_post.h"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = 256;

// What the kernels need of QkvParams and Batch, by value.
struct RowParams {
  const BatchSeq* seqs;    // [num_seqs]
  const int32_t* row_seq;  // [rows]
  int32_t rows, layer;
  AttentionShape shape;
  void *pool_k, *pool_v;  // [pages, kPageTokens, head_dim]
  int32_t* positions;     // [pages, kPageTokens]
  const void* qkv;        // [rows, heads + 2 * kv_heads, head_dim]
  void* q;                // [rows, heads, head_dim]
  const float *q_norm, *k_norm, *inv_freq;
  float norm_eps, rope_scale;
};

// One block per row; kDim / 8 lanes per vector, 8 channels a lane.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) RowKernel(RowParams p) {
  constexpr int kLanes = kDim / 8, kVectors = kThreads / kLanes;
  __shared__ float cosine[kDim / 2], sine[kDim / 2];
  const int64_t row = blockIdx.x;
  const BatchSeq& seq = p.seqs[p.row_seq[row]];
  const int32_t offset = int32_t(row) - seq.row_begin;
  const int32_t position = seq.position + offset;
  for (int i = threadIdx.x; i < kDim / 2; i += kThreads) {
    float s, c;
    sincosf(float(position) * p.inv_freq[i], &s, &c);  // not __sincosf: the argument reaches 1e6
    cosine[i] = c * p.rope_scale;
    sine[i] = s * p.rope_scale;
  }
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  const int heads = p.shape.heads, kv_heads = p.shape.kv_heads, vectors = heads + 2 * kv_heads;
  const int rounds = (vectors + kVectors - 1) / kVectors;
  for (int round = 0; round < rounds; ++round) {  // whole warps stay together for the shuffles
    const int vector = round * kVectors + threadIdx.x / kLanes;
    const bool active = vector < vectors;
    const bool is_v = vector >= heads + kv_heads, is_q = vector < heads;
    float x[8] = {};
    if (active) {
      Load8(static_cast<const T*>(p.qkv) + (row * vectors + vector) * kDim + lane * 8, x);
    }
    const float* norm = is_q ? p.q_norm : p.k_norm;
    float sum = 0;
#pragma unroll
    for (float e : x) sum += e * e;
    sum = WarpSum<kLanes>(sum);
    if (norm && active && !is_v) {
      const float scale = rsqrtf(sum / kDim + p.norm_eps);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= scale * norm[lane * 8 + i];
    }
    const bool first_half = lane < kLanes / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], kLanes / 2);
      const int angle = lane % (kLanes / 2) * 8 + i;
      const float rotated = x[i] * cosine[angle] + (first_half ? -other : other) * sine[angle];
      if (!is_v) x[i] = rotated;
    }
    if (!active) continue;
    if (is_q) {
      Store8(static_cast<T*>(p.q) + (row * heads + vector) * kDim + lane * 8, x);
      // Of several rows with the same slot only the last one is kept.
      if (seq.window_pages && offset >= seq.rows - seq.window) {
        const int group = heads / kv_heads, kv_head = vector / group;
        const HeadView view = ViewHead(seq, kv_heads, p.layer, kv_head);
        const WindowSlot slot =
            WindowRow(view.window_pages, position % seq.window * group + vector % group);
        T* half = static_cast<T*>(slot.k_half ? p.pool_k : p.pool_v);
        Store8(half + slot.row * kDim + lane * 8, x);
      }
    } else {
      const int kv_head = (vector - heads) % kv_heads;
      const HeadView view = ViewHead(seq, kv_heads, p.layer, kv_head);
      const int64_t pool_row = view.TurnRow(view.turn + offset);
      T* half = static_cast<T*>(is_v ? p.pool_v : p.pool_k);
      Store8(half + pool_row * kDim + lane * 8, x);
      if (!is_v && lane == 0) p.positions[pool_row] = position;
    }
  }
}

constexpr int kBoundsRows = 8;  // a warp looks after this many rows: at least one block's worth

// A warp finds which of its rows close a block (or the step) and reduces those blocks' keys.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) BoundsKernel(RowParams p) {
  constexpr int kLanes = kDim / 8, kKeys = 32 / kLanes;  // keys that a warp reads at once
  const int lane = threadIdx.x % 32, kv_head = blockIdx.y;
  const int64_t first = (int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32) * kBoundsRows;
  bool closes = false;
  if (lane < kBoundsRows && first + lane < p.rows) {
    const int64_t row = first + lane;
    const BatchSeq& seq = p.seqs[p.row_seq[row]];
    if (seq.bounds) {
      const HeadView view = ViewHead(seq, p.shape.kv_heads, p.layer, kv_head);
      const int32_t offset = int32_t(row) - seq.row_begin;
      closes = offset == seq.rows - 1 || (view.turn + offset + 1) % seq.policy.block == 0;
    }
  }
  for (unsigned mask = __ballot_sync(~0u, closes); mask; mask &= mask - 1) {
    const int64_t row = first + __ffs(mask) - 1;
    const BatchSeq& seq = p.seqs[p.row_seq[row]];
    const HeadView view = ViewHead(seq, p.shape.kv_heads, p.layer, kv_head);
    const int32_t last = view.turn + int32_t(row) - seq.row_begin;  // turn token
    const int32_t block = last / seq.policy.block;
    float high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) high[i] = -INFINITY, low[i] = INFINITY;
    for (int32_t t = block * seq.policy.block + lane / kLanes; t <= last; t += kKeys) {
      float x[8];
      Load8(static_cast<const T*>(p.pool_k) + view.TurnRow(t) * kDim + lane % kLanes * 8, x);
#pragma unroll
      for (int i = 0; i < 8; ++i) high[i] = fmaxf(high[i], x[i]), low[i] = fminf(low[i], x[i]);
    }
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], offset));
        low[i] = fminf(low[i], __shfl_xor_sync(~0u, low[i], offset));
      }
    }
    if (lane < kLanes) {
      const int64_t out = view.BoundsRow(block) * kDim + lane * 8;
      Store8(static_cast<T*>(p.pool_k) + out, high);
      Store8(static_cast<T*>(p.pool_v) + out, low);
    }
  }
}

template <typename T, int kDim>
void Run(const RowParams& p, bool any_bounds, cudaStream_t stream) {
  RowKernel<T, kDim><<<unsigned(p.rows), kThreads, 0, stream>>>(p);
  if (any_bounds) {
    const dim3 grid(unsigned(CeilDiv(p.rows, kThreads / 32 * kBoundsRows)),
                    unsigned(p.shape.kv_heads));
    BoundsKernel<T, kDim><<<grid, kThreads, 0, stream>>>(p);
  }
  CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void RunForDim(const RowParams& p, bool any_bounds, cudaStream_t stream) {
  switch (p.shape.head_dim) {
    case 16:
      return Run<T, 16>(p, any_bounds, stream);
    case 32:
      return Run<T, 32>(p, any_bounds, stream);
    case 64:
      return Run<T, 64>(p, any_bounds, stream);
    case 128:
      return Run<T, 128>(p, any_bounds, stream);
    case 256:
      return Run<T, 256>(p, any_bounds, stream);
    default:
      Check(false, "head_dim is none of 16, 32, 64, 128, 256");
  }
}

}  // namespace

void LaunchQkvPost(const QkvParams& p, cudaStream_t stream) {
  const Batch& batch = *p.batch;
  if (batch.rows == 0) return;
  const RowParams params{
      batch.device_seqs, batch.row_seq, batch.rows,       p.layer,    p.shape,
      p.pool.k,          p.pool.v,      p.pool.positions, p.qkv,      p.q,
      p.q_norm,          p.k_norm,      p.inv_freq,       p.norm_eps, p.rope_scale};
  const bool any_bounds = std::any_of(batch.seqs, batch.seqs + batch.num_seqs,
                                      [](const BatchSeq& seq) { return seq.bounds != nullptr; });
  if (p.dtype == DType::kF32) {
    RunForDim<float>(params, any_bounds, stream);
  } else {
    RunForDim<bf16>(params, any_bounds, stream);
  }
}

}  // namespace entropyserve::cuda
