#include "kernels/check.h"
#include "kernels/cuda/attend_simple.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/early_start.cuh"
#include "kernels/cuda/mma.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kTile = 16;   // keys that a warp takes at a time
constexpr int kStages = 3;  // tiles in flight per warp
constexpr int kMaxSplits =
    32;  // with 8 kv heads: two blocks of threads per multiprocessor of a Hopper
constexpr int kMinChunk =
    256;  // keys per block of threads: below it, the merge costs more than it saves
constexpr int kMaxGroup = 16;  // rows of one mma

// By value: what the kernel needs of DecodeAttentionParams.
struct DecodeParams {
  const BatchSeq* seqs;    // [*]
  const int32_t* decodes;  // [num_decodes]
  int32_t layer;
  AttentionShape shape;
  const void *pool_k, *pool_v;  // [pages, kPageTokens, head_dim]
  const void* q;                // [rows, heads, head_dim]
  void* out;                    // the same
  int32_t* arrived;             // [num_decodes, kv_heads], zero between launches
  float2* partial_softmax;      // [num_decodes, kv_heads, kMaxSplits, group]: max (log2), sum
  float* partial_out;           // [num_decodes, kv_heads, kMaxSplits, group, head_dim]
};

__host__ __device__ constexpr int RoundUp(int x, int unit) { return (x + unit - 1) / unit * unit; }

// The sequence's keys in order, its new token included, as a dense list.
__device__ __forceinline__ KeyList ListAll(const BatchSeq& seq, const AttentionShape& shape,
                                           int32_t layer, int32_t kv_head) {
  KeyList list;
  list.view = ViewHead(seq, shape.kv_heads, layer, kv_head);
  list.blocks = nullptr;
  list.block = 1;
  list.first = list.before = list.view.turn + 1;
  return list;
}

// Merges `splits` partial results of one (sequence, kv head), in order. All threads of the block.
template <int kDim>
__device__ __forceinline__ void MergeSplits(const DecodeParams& p, int64_t item, int32_t splits,
                                            int32_t group, bf16* out) {
  for (int i = threadIdx.x; i < group * kDim; i += kWarps * 32) {
    const int row = i / kDim;
    const float2* softmax = p.partial_softmax + item * kMaxSplits * group + row;
    const float* partial = p.partial_out + item * kMaxSplits * group * kDim + i;
    float high = -INFINITY, sum = 0, o = 0;
    for (int s = 0; s < splits; ++s) high = fmaxf(high, __ldcg(&softmax[s * group]).x);
    for (int s = 0; s < splits; ++s) {
      const float2 part = __ldcg(&softmax[s * group]);
      const float weight = Exp2(part.x - high);
      sum += weight * part.y;
      o += weight * __ldcg(&partial[int64_t{s} * group * kDim]);
    }
    out[i] = FromFloat<bf16>(o / sum);
  }
}

template <int kDim>
constexpr int SharedBytes() {  // tiles; later the warps' results
  return kWarps * kStages * 2 * kTile * kDim * 2;
}

// Grid: (kMaxSplits, kv_heads, num_decodes). A warp takes every kWarps-th tile of the block's keys;
// the group's heads are the rows of one mma, so that K and V are read once for all of them.
template <int kDim>
__global__ void __launch_bounds__(kWarps * 32) DecodeKernel(DecodeParams p) {
  LetNextStart();
  using Tile = SwizzledTile<kDim>;
  constexpr int kChunks = kDim / 8, kTileBytes = kTile * kDim * 2;
  extern __shared__ __align__(128) char shared[];
  __shared__ float warp_high[kWarps][kMaxGroup], warp_sum[kWarps][kMaxGroup];
  __shared__ bool last_to_arrive;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int32_t kv_head = blockIdx.y, group = p.shape.heads / p.shape.kv_heads;
  const BatchSeq& seq = p.seqs[p.decodes[blockIdx.z]];
  const KeyList list = ListAll(seq, p.shape, p.layer, kv_head);
  const int32_t total = list.own_begin();
  const int32_t chunk = max(kMinChunk, RoundUp((total + kMaxSplits - 1) / kMaxSplits, 64));
  const int32_t splits = (total + chunk - 1) / chunk, split = blockIdx.x;
  if (split >= splits) return;
  const int32_t begin = split * chunk, end = min(total, begin + chunk);
  const int32_t tiles = (end - begin + kTile - 1) / kTile;
  const int64_t q_begin = (int64_t{seq.row_begin} * p.shape.heads + kv_head * group) * kDim;

  const uint32_t base = SharedAddress(shared) + warp * kStages * 2 * kTileBytes;
  const auto row_of = [&](int32_t tile) {  // lane's key of the tile; -1 beyond the end
    const int32_t key = begin + tile * kTile + lane % kTile;
    return tile < tiles && key < end ? list.PoolRow(list.Slot(key)) : -1;
  };
  const auto load = [&](int stage, int32_t row) {
#pragma unroll
    for (int i = 0; i < kTile * kChunks / 32; ++i) {
      const int index = i * 32 + lane, key = index / kChunks, c = index % kChunks;
      const int32_t pool_row = __shfl_sync(~0u, row, key);
      const int64_t element = int64_t{max(pool_row, 0)} * kDim + c * 8;
      const uint32_t dst = base + stage * 2 * kTileBytes + Tile::Offset(key, c);
      CopyAsync16(dst, static_cast<const bf16*>(p.pool_k) + element, pool_row >= 0);
      CopyAsync16(dst + kTileBytes, static_cast<const bf16*>(p.pool_v) + element, pool_row >= 0);
    }
  };

  int32_t row_next = row_of(warp);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    load(stage, row_next);
    CopyAsyncCommit();
    row_next = row_of(warp + (stage + 1) * kWarps);
  }
  uint32_t q[kDim / 16][4];  // A operand, rows above the group are zero
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e % 2 * 8, c = k * 16 + e / 2 * 8 + lane % 4 * 2;
      q[k][e] = row < group ? *reinterpret_cast<const uint32_t*>(static_cast<const bf16*>(p.q) +
                                                                 q_begin + row * kDim + c)
                            : 0u;
    }
  }
  const float scale = 1.4426950408889634f * rsqrtf(float(kDim));
  float o[kDim / 8][4] = {}, high[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  int stage = 0;
  for (int32_t tile = warp; tile < tiles; tile += kWarps) {
    CopyAsyncWait<kStages - 2>();
    __syncwarp();
    load((stage + kStages - 1) % kStages, row_next);  // read by the iteration before: done
    CopyAsyncCommit();
    row_next = row_of(tile + kStages * kWarps);
    const uint32_t k_tile = base + stage * 2 * kTileBytes, v_tile = k_tile + kTileBytes;
    stage = (stage + 1) % kStages;
    float s[2][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t b[4];
      Tile::LoadB(b, k_tile, 0, k);
      Mma16x8x16(s[0], q[k], b[0], b[1]);
      Mma16x8x16(s[1], q[k], b[2], b[3]);
    }
    const int32_t key = begin + tile * kTile + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = high[r];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * r + e];
          x = key + n * 8 + e < end ? x * scale : -INFINITY;
          now = fmaxf(now, x);
        }
      }
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));  // finite: a tile has at least one key
      const float keep = Exp2(high[r] - now);
      high[r] = now;
      sum[r] *= keep;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * r + e];
          x = Exp2(x - now);
          sum[r] += x;
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) o[n][2 * r] *= keep, o[n][2 * r + 1] *= keep;
    }
    const uint32_t probabilities[4] = {PackBf16(s[0][0], s[0][1]), PackBf16(s[0][2], s[0][3]),
                                       PackBf16(s[1][0], s[1][1]), PackBf16(s[1][2], s[1][3])};
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      Tile::LoadBTransposed(b, v_tile, 0, n);
      Mma16x8x16(o[2 * n], probabilities, b[0], b[1]);
      Mma16x8x16(o[2 * n + 1], probabilities, b[2], b[3]);
    }
    __syncwarp();
  }

  // The warps' results meet in shared memory.
  CopyAsyncWait<0>();
  __syncthreads();
  float* const warp_out = reinterpret_cast<float*>(shared);  // [kWarps, group, kDim]
  static_assert(kWarps * kMaxGroup * kDim * 4 <= SharedBytes<kDim>());
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int row = lane / 4 + 8 * r;
    if (row >= group) continue;
    if (lane % 4 == 0) warp_high[warp][row] = high[r], warp_sum[warp][row] = sum[r];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<float2*>(warp_out + (warp * group + row) * kDim + n * 8 + lane % 4 * 2) = {
          o[n][2 * r], o[n][2 * r + 1]};
    }
  }
  __syncthreads();
  const int64_t item = int64_t{blockIdx.z} * p.shape.kv_heads + kv_head;
  const int64_t part = (item * kMaxSplits + split) * group;
  bf16* const out = static_cast<bf16*>(p.out) + q_begin;
  for (int i = tid; i < group * kDim; i += kWarps * 32) {
    const int row = i / kDim;
    float top = -INFINITY, total_sum = 0, total_out = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warp_high[w][row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {  // a warp without tiles has weight 0
      const float weight = Exp2(warp_high[w][row] - top);
      total_sum += weight * warp_sum[w][row];
      total_out += weight * warp_out[(w * group) * kDim + i];
    }
    if (splits == 1) {
      out[i] = FromFloat<bf16>(total_out / total_sum);
    } else {
      p.partial_out[part * kDim + i] = total_out;
      if (i % kDim == 0) p.partial_softmax[part + row] = {top, total_sum};
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (tid == 0) {
    last_to_arrive = atomicAdd(&p.arrived[item], 1) == splits - 1;
    if (last_to_arrive) p.arrived[item] = 0;
  }
  __syncthreads();
  if (!last_to_arrive) return;
  __threadfence();
  MergeSplits<kDim>(p, item, splits, group, out);
}

constexpr int kSimpleWarps = 8;

// Grid: (heads, num_decodes); the warps take every kSimpleWarps-th tile of 32 keys.
template <typename T>
__global__ void __launch_bounds__(kSimpleWarps * 32) DecodeSimpleKernel(DecodeParams p) {
  LetNextStart();
  __shared__ float q[kMaxDim], highs[kSimpleWarps], sums[kSimpleWarps], outs[kSimpleWarps][kMaxDim];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = p.shape.head_dim;
  const int32_t head = blockIdx.x;
  const BatchSeq& seq = p.seqs[p.decodes[blockIdx.y]];
  const KeyList list = ListAll(seq, p.shape, p.layer, head / (p.shape.heads / p.shape.kv_heads));
  const int64_t element = (int64_t{seq.row_begin} * p.shape.heads + head) * dim;
  for (int c = threadIdx.x; c < dim; c += kSimpleWarps * 32) {
    q[c] = ToFloat(static_cast<const T*>(p.q)[element + c]);
  }
  __syncthreads();
  WarpOutput result;
  AttendKeys(list, warp, kSimpleWarps, list.own_begin(), static_cast<const T*>(p.pool_k),
             static_cast<const T*>(p.pool_v), q, dim, &result);
  if (lane == 0) highs[warp] = result.high, sums[warp] = result.sum;
#pragma unroll
  for (int i = 0; i < kMaxDim / 32; ++i) {
    if (i * 32 + lane < dim) outs[warp][i * 32 + lane] = result.o[i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < dim; c += kSimpleWarps * 32) {
    float high = -INFINITY, sum = 0, o = 0;
    for (int w = 0; w < kSimpleWarps; ++w) high = fmaxf(high, highs[w]);
    for (int w = 0; w < kSimpleWarps; ++w) {
      const float weight = expf(highs[w] - high);
      sum += weight * sums[w];
      o += weight * outs[w][c];
    }
    static_cast<T*>(p.out)[element + c] = FromFloat<T>(o / sum);
  }
}

size_t ArrivedBytes(const AttentionShape& shape, int64_t seqs) {
  return CeilDiv<size_t>(size_t(seqs) * shape.kv_heads * sizeof(int32_t), 256) * 256;
}
size_t SoftmaxBytes(const AttentionShape& shape, int64_t seqs) {
  return CeilDiv<size_t>(size_t(seqs) * shape.heads * kMaxSplits * sizeof(float2), 256) * 256;
}

template <int kDim>
void Run(const DecodeParams& p, int32_t num_decodes, cudaStream_t stream) {
  auto* kernel = &DecodeKernel<kDim>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  SharedBytes<kDim>()));
  const dim3 grid(kMaxSplits, unsigned(p.shape.kv_heads), unsigned(num_decodes));
  kernel<<<grid, kWarps * 32, SharedBytes<kDim>(), stream>>>(p);
}

}  // namespace

size_t DecodeScratchBytes(const AttentionShape& shape, int64_t seqs) {
  return ArrivedBytes(shape, seqs) + SoftmaxBytes(shape, seqs) +
         size_t(seqs) * shape.heads * kMaxSplits * shape.head_dim * sizeof(float);
}

void LaunchDecodeAttention(const DecodeAttentionParams& p, void* scratch, int64_t max_seqs,
                           cudaStream_t stream) {
  const Batch& batch = *p.batch;
  if (batch.num_decodes == 0) return;
  Check(batch.num_decodes <= max_seqs, "more decoding sequences than Reserve was told");
  char* const bytes = static_cast<char*>(scratch);
  const size_t arrived = ArrivedBytes(p.shape, max_seqs), softmax = SoftmaxBytes(p.shape, max_seqs);
  const DecodeParams params{batch.device_seqs,
                            batch.device_decodes,
                            p.layer,
                            p.shape,
                            p.pool.k,
                            p.pool.v,
                            p.q,
                            p.out,
                            reinterpret_cast<int32_t*>(bytes),
                            reinterpret_cast<float2*>(bytes + arrived),
                            reinterpret_cast<float*>(bytes + arrived + softmax)};
  const bool bf16_pool = p.pool.dtype == DType::kBF16;
  if (bf16_pool && p.shape.group() <= kMaxGroup && p.shape.head_dim == 64) {
    Run<64>(params, batch.num_decodes, stream);
  } else if (bf16_pool && p.shape.group() <= kMaxGroup && p.shape.head_dim == 128) {
    Run<128>(params, batch.num_decodes, stream);
  } else {
    Check(p.shape.head_dim % 8 == 0 && p.shape.head_dim <= kMaxDim,
          "attention: head_dim must be a multiple of 8 up to 256");
    const dim3 grid(unsigned(p.shape.heads), unsigned(batch.num_decodes));
    if (bf16_pool) {
      DecodeSimpleKernel<bf16><<<grid, kSimpleWarps * 32, 0, stream>>>(params);
    } else {
      DecodeSimpleKernel<float><<<grid, kSimpleWarps * 32, 0, stream>>>(params);
    }
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
