// FlashAttention-2's scheme on mma.sync over lists of keys: a warp owns 16 queries, K and V tiles
// come through cp.async into two stages, row addresses are looked up two tiles ahead.
#include "kernels/check.h"
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kKeys = 64;  // keys of a tile

template <int kDim, int kWarps>
struct SharedLayout {
  static constexpr int kRows = kWarps * 16;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + kRows * kDim * 2;
  static constexpr uint32_t kV = kK + 2 * kKeys * kDim * 2;
  static constexpr uint32_t kTable = kV + 2 * kKeys * kDim * 2;  // int32 [2, kKeys]
  static constexpr uint32_t kBytes = kTable + 2 * kKeys * 4;
  static constexpr uint32_t kDifferences = kK;  // float [kRows, kDim] after the last tile
  static_assert(kRows * kDim * 4 <= 4 * kKeys * kDim * 2);
};

// Which queries a block of threads handles. Row m of the tile:
//   every row: query tile * kRows + m of the segment, one head;
//   probes: m = probe * group + head within the group, probe i at offset i * stride.
struct Work {
  int32_t segment, kv_head, tile, head_in_group;
};

// Segments last to first: late dense ones are the longest. Tiles and heads of one (segment, kv
// head) follow each other, so that they share K and V in L2.
template <bool kProbes>
__device__ __forceinline__ Work FindWork(const AttendParams& p, int32_t tiles) {
  const int32_t heads = kProbes ? 1 : p.shape.heads / p.shape.kv_heads;
  int32_t i = blockIdx.x;
  Work w;
  w.head_in_group = i % heads, i /= heads;
  w.tile = tiles - 1 - i % tiles, i /= tiles;
  w.kv_head = i % p.shape.kv_heads, i /= p.shape.kv_heads;
  w.segment = p.num_segments - 1 - i;
  return w;
}

// phase: 0 all tiles but those that need another tile's difference, 1 those.
template <int kDim, int kWarps, bool kProbes>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 4 ? 2 : 1)
    AttendMmaKernel(AttendParams p, int32_t tiles, int32_t phase) {
  using Layout = SharedLayout<kDim, kWarps>;
  using Tile = SwizzledTile<kDim>;
  constexpr int kRows = Layout::kRows, kThreads = kWarps * 32, kChunks = kDim / 8;
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = SharedAddress(shared);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;

  const Work work = FindWork<kProbes>(p, tiles);
  const BatchSegment segment = p.segments[work.segment];
  const BatchSeq& seq = p.seqs[segment.seq];
  const int32_t heads = p.shape.heads, group = heads / p.shape.kv_heads;
  const int32_t stride = seq.policy.correction;
  int32_t valid;  // rows of the tile that exist
  if constexpr (kProbes) {
    if (stride == 0 || IsDense(seq, segment, p.layer)) return;
    valid = (segment.rows + stride - 1) / stride * group - work.tile * kRows;
  } else {
    valid = segment.rows - work.tile * kRows;
  }
  if (valid <= 0) return;
  valid = min(valid, kRows);
  // Offset in the segment, and head, of the tile's row m.
  const auto offset = [&](int32_t m) {
    return kProbes ? (work.tile * kRows + m) / group * stride : work.tile * kRows + m;
  };
  const auto head = [&](int32_t m) {
    return work.kv_head * group + (kProbes ? (work.tile * kRows + m) % group : work.head_in_group);
  };

  const int64_t list_row = int64_t{work.segment} * p.shape.kv_heads + work.kv_head;
  const int32_t count = kProbes ? -1 : p.lists.counts[list_row];
  const bool correct = !kProbes && p.probe_out && count >= 0 && stride > 0;
  const bool far = correct && stride > kRows && work.tile * kRows % stride != 0;
  if (!kProbes && far != (phase == 1)) return;

  const KeyList list = ListKeys(seq, segment, p.shape, p.layer, work.kv_head, count,
                                p.lists.blocks + list_row * p.lists.capacity);
  const int32_t own_begin = list.own_begin(), total = own_begin + offset(valid - 1) + 1;
  const int32_t key_tiles = (total + kKeys - 1) / kKeys;

  int32_t* const table = reinterpret_cast<int32_t*>(shared + Layout::kTable);
  const auto slot_at = [&](int32_t tile) {  // for threads below kKeys
    const int32_t i = tile * kKeys + tid;
    return i < total ? list.Slot(i) : -1;
  };
  const auto row_of = [&](int32_t slot) { return slot < 0 ? -1 : list.PoolRow(slot); };
  const auto load = [&](int32_t tile) {
    const int stage = tile & 1;
#pragma unroll
    for (int i = 0; i < kKeys * kChunks / kThreads; ++i) {
      const int index = i * kThreads + tid, row = index / kChunks, chunk = index % kChunks;
      const int32_t pool_row = table[stage * kKeys + row];
      const int64_t element = int64_t{max(pool_row, 0)} * kDim + chunk * 8;
      const uint32_t dst = stage * (kKeys * kDim * 2) + Tile::Offset(row, chunk);
      CopyAsync16(base + Layout::kK + dst, static_cast<const bf16*>(p.pool_k) + element,
                  pool_row >= 0);
      CopyAsync16(base + Layout::kV + dst, static_cast<const bf16*>(p.pool_v) + element,
                  pool_row >= 0);
    }
    CopyAsyncCommit();
  };

  int32_t slot_next = -1;
  if (tid < kKeys) {
    table[tid] = row_of(slot_at(0));
    table[kKeys + tid] = row_of(slot_at(1));
    slot_next = slot_at(2);
  }
  for (int index = tid; index < kRows * kChunks; index += kThreads) {
    const int m = index / kChunks, chunk = index % kChunks;
    const int64_t row = segment.row_begin + (m < valid ? offset(m) : 0);
    CopyAsync16(
        base + Layout::kQ + Tile::Offset(m, chunk),
        static_cast<const bf16*>(p.q) + (row * heads + head(m < valid ? m : 0)) * kDim + chunk * 8,
        m < valid);
  }
  __syncthreads();
  load(0);

  // log2 units: softmax(x) = 2^(x * scale - max).
  const float scale = 1.4426950408889634f * rsqrtf(float(kDim));
  const int m0 = warp * 16 + lane / 4;  // this thread's rows: m0 and m0 + 8
  const int32_t last_key[2] = {own_begin + offset(m0), own_begin + offset(m0 + 8)};
  uint32_t q[kDim / 16][4];
  float o[kDim / 8][4] = {}, high[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  for (int32_t tile = 0; tile < key_tiles; ++tile) {
    CopyAsyncWait<0>();
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) Tile::LoadA(q[k], base + Layout::kQ, warp * 16, k);
    }
    if (tile + 1 < key_tiles) load(tile + 1);
    int32_t row_next = -1;
    if (tid < kKeys) {
      row_next = row_of(slot_next);
      slot_next = slot_at(tile + 3);
    }
    const uint32_t k_tile = base + Layout::kK + (tile & 1) * (kKeys * kDim * 2);
    const uint32_t v_tile = base + Layout::kV + (tile & 1) * (kKeys * kDim * 2);
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        Tile::LoadB(b, k_tile, n * 16, k);
        Mma16x8x16(s[2 * n], q[k], b[0], b[1]);
        Mma16x8x16(s[2 * n + 1], q[k], b[2], b[3]);
      }
    }
    if ((tile + 1) * kKeys > own_begin) {  // the tile holds keys that some queries may not see
      const int32_t key = tile * kKeys + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (key + n * 8 + e % 2 > min(last_key[e / 2], total - 1)) s[n][e] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float tile_high = s[0][2 * r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        tile_high = fmaxf(tile_high, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      }
      tile_high = fmaxf(tile_high, __shfl_xor_sync(~0u, tile_high, 1));
      tile_high = fmaxf(tile_high, __shfl_xor_sync(~0u, tile_high, 2));
      // Key 0 is visible to every query, so `high` is finite from the first tile on.
      const float now = fmaxf(high[r], tile_high * scale);
      const float keep = Exp2(high[r] - now);
      high[r] = now;
      float tile_sum = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        s[n][2 * r] = Exp2(fmaf(s[n][2 * r], scale, -now));
        s[n][2 * r + 1] = Exp2(fmaf(s[n][2 * r + 1], scale, -now));
        tile_sum += s[n][2 * r] + s[n][2 * r + 1];
      }
      sum[r] = sum[r] * keep + tile_sum;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) o[n][2 * r] *= keep, o[n][2 * r + 1] *= keep;
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint32_t probabilities[4] = {
          PackBf16(s[2 * k][0], s[2 * k][1]), PackBf16(s[2 * k][2], s[2 * k][3]),
          PackBf16(s[2 * k + 1][0], s[2 * k + 1][1]), PackBf16(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        Tile::LoadBTransposed(b, v_tile, k * 16, n);
        Mma16x8x16(o[2 * n], probabilities, b[0], b[1]);
        Mma16x8x16(o[2 * n + 1], probabilities, b[2], b[3]);
      }
    }
    if (tid < kKeys) table[(tile & 1) * kKeys + tid] = row_next;
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const float inverse = 1.0f / sum[r];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) o[n][2 * r] *= inverse, o[n][2 * r + 1] *= inverse;
  }
  const auto element = [&](int32_t m) {  // of out and probe_out
    return ((int64_t{segment.row_begin} + offset(m)) * heads + head(m)) * kDim + lane % 4 * 2;
  };
  if (correct) {  // o[i] += o*[m] - o[m] (Delta Attention, arXiv 2505.11254)
    float* const near = reinterpret_cast<float*>(shared + Layout::kDifferences);
    float* const beyond =
        p.differences + ((int64_t{work.segment} * kMaxFarProbes * heads) + head(0)) * kDim;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = m0 + 8 * r;
      if (m >= valid || offset(m) % stride != 0) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float2 exact = *reinterpret_cast<const float2*>(p.probe_out + element(m) + n * 8);
        const float2 d = {exact.x - o[n][2 * r], exact.y - o[n][2 * r + 1]};
        const int c = n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(near + m / min(stride, kRows) * kDim + c) = d;
        if (stride > kRows) {
          *reinterpret_cast<float2*>(beyond + int64_t{offset(m) / stride} * heads * kDim + c) = d;
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = m0 + 8 * r;
      if (m >= valid) continue;
      const float* difference = far ? beyond + int64_t{offset(m) / stride} * heads * kDim
                                    : near + m / min(stride, kRows) * kDim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float2 d = *reinterpret_cast<const float2*>(difference + n * 8 + lane % 4 * 2);
        o[n][2 * r] += d.x, o[n][2 * r + 1] += d.y;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int m = m0 + 8 * r;
    if (m >= valid) continue;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if constexpr (kProbes) {
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + element(m) + n * 8) = {
            o[n][2 * r], o[n][2 * r + 1]};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + element(m) + n * 8) =
            PackBf16(o[n][2 * r], o[n][2 * r + 1]);
      }
    }
  }
}

template <int kDim, int kWarps, bool kProbes>
void Run(const AttendParams& p, int32_t phase, cudaStream_t stream) {
  using Layout = SharedLayout<kDim, kWarps>;
  auto* kernel = &AttendMmaKernel<kDim, kWarps, kProbes>;
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kBytes));
  const int32_t group = p.shape.group();
  const int32_t tiles = CeilDiv(kProbes ? p.max_rows * group : p.max_rows, Layout::kRows);
  const int64_t blocks = int64_t{p.num_segments} * p.shape.kv_heads * tiles * (kProbes ? 1 : group);
  kernel<<<unsigned(blocks), kWarps * 32, Layout::kBytes, stream>>>(p, tiles, phase);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

bool CanAttendMma(const AttentionShape& shape, DType dtype) {
  return dtype == DType::kBF16 && (shape.head_dim == 64 || shape.head_dim == 128);
}

void LaunchAttendMma(const AttendParams& p, bool far_probes, cudaStream_t stream) {
  if (p.num_segments == 0) return;
  Check(CanAttendMma(p.shape, p.dtype), "LaunchAttendMma: bf16 and head_dim 64 or 128 only");
  for (int phase = 0; phase < (far_probes ? 2 : 1); ++phase) {
    if (p.probes) {
      p.shape.head_dim == 64 ? Run<64, 4, true>(p, phase, stream)
                             : Run<128, 4, true>(p, phase, stream);
    } else {
      p.shape.head_dim == 64 ? Run<64, 8, false>(p, phase, stream)
                             : Run<128, 8, false>(p, phase, stream);
    }
  }
}

}  // namespace entropyserve::cuda
