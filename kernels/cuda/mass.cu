// Two passes over the keys, scores only: the rows' softmax denominators (split over keys, then
// merged), then the mass of each bin, summed over rows in a fixed order.
#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/kv_view.cuh"
#include "kernels/cuda/mass.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kTileKeys = 64;
constexpr int kTileRows = kWarps * 16;
constexpr int kSplitKeys = 4096;  // keys of a block of threads in the first pass
constexpr int kMassTiles = 4;     // key tiles of a block of threads in the second pass

struct Passes {
  MassParams p;
  int32_t splits;   // of max_keys
  float2* partial;  // [items, splits, max_rows]: max (log2), sum of 2^(x - max)
  float* log_sums;  // [items, max_rows], log2
};

__device__ __forceinline__ int32_t Limit(const MassItem& item, int32_t row) {
  return item.first_limit + row / item.group * item.limit_step;
}

// Row of the pool of key i, counted over both runs. 32 bits hold it: see KeyList.
__device__ __forceinline__ int32_t PoolRowOf(const MassItem& item, int32_t key) {
  int32_t slot = key;
  if (key >= item.past) slot = PagesFor(item.past) * kPageTokens + key - item.past;
  return item.pages[slot / kPageTokens] * kPageTokens + slot % kPageTokens;
}

template <typename T>
__device__ __forceinline__ const T* QueryAt(const MassItem& item, int32_t row, int dim) {
  return static_cast<const T*>(item.q) +
         (int64_t{row / item.group} * item.q_stride + row % item.group) * dim;
}

// Scores of 64 rows and 64 keys, in log2 units. Thread (g, t) of a warp holds rows
// warp * 16 + g (+ 8) and keys n * 8 + 2t (+ 1), as an mma does.
using Scores = float[kTileKeys / 8][4];

// bf16 on tensor cores.
template <int kDim>
struct MmaTiles {
  static constexpr int kSharedBytes = kTileKeys * kDim * 2;
  uint32_t q[kDim / 16][4];

  // Keys [begin, end), at most 64; zeros beyond. All threads; ends with a barrier.
  __device__ void LoadKeys(const MassItem& item, const void* pool_k, int, int32_t begin,
                           int32_t end, char* shared) const {
    constexpr int kChunks = kDim / 8;
    for (int i = threadIdx.x; i < kTileKeys * kChunks; i += kThreads) {
      const int key = i / kChunks, chunk = i % kChunks;
      const bool valid = begin + key < end;
      const int64_t row = valid ? PoolRowOf(item, begin + key) : 0;
      CopyAsync16(SharedAddress(shared) + SwizzledTile<kDim>::Offset(key, chunk),
                  static_cast<const bf16*>(pool_k) + row * kDim + chunk * 8, valid);
    }
    CopyAsyncCommit();
    CopyAsyncWait<0>();
    __syncthreads();
  }
  __device__ void LoadRows(const MassItem& item, int, int32_t first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = first + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
      const bf16* from = QueryAt<bf16>(item, min(row, item.rows - 1), kDim) + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        q[k][half] = *reinterpret_cast<const uint32_t*>(from + k * 16);
        q[k][half + 2] = *reinterpret_cast<const uint32_t*>(from + k * 16 + 8);
      }
    }
  }
  __device__ void Multiply(const MassItem&, int, int32_t, const char* shared, Scores& s) const {
    const uint32_t base = SharedAddress(shared);
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        uint32_t b[4];
        SwizzledTile<kDim>::LoadB(b, base, n * 16, k);
        Mma16x8x16(s[2 * n], q[k], b[0], b[1]);
        Mma16x8x16(s[2 * n + 1], q[k], b[2], b[3]);
      }
    }
  }
};

// fp32 arithmetic, any head_dim that is a multiple of 8.
template <typename T>
struct SimpleTiles {
  static constexpr int kSharedBytes = kTileKeys * 4;

  __device__ void LoadKeys(const MassItem& item, const void* pool_k, int, int32_t begin,
                           int32_t end, char* shared) {
    keys = static_cast<const T*>(pool_k);
    int32_t* rows = reinterpret_cast<int32_t*>(shared);
    if (threadIdx.x < kTileKeys) {
      rows[threadIdx.x] = PoolRowOf(item, min(begin + int32_t(threadIdx.x), end - 1));
    }
    __syncthreads();
  }
  __device__ void LoadRows(const MassItem&, int, int32_t) {}
  __device__ void Multiply(const MassItem& item, int dim, int32_t first, const char* shared,
                           Scores& s) const {
    const int lane = threadIdx.x % 32;
    const int32_t* rows = reinterpret_cast<const int32_t*>(shared);
    for (int n = 0; n < kTileKeys / 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        const int32_t row =
            min(first + int32_t(threadIdx.x) / 32 * 16 + lane / 4 + e / 2 * 8, item.rows - 1);
        const T* q = QueryAt<T>(item, row, dim);
        const T* k = keys + int64_t{rows[n * 8 + lane % 4 * 2 + e % 2]} * dim;
        float dot = 0;
        for (int c = 0; c < dim; c += 8) {
          float a[8], b[8];
          Load8(q + c, a);
          Load8(k + c, b);
#pragma unroll
          for (int i = 0; i < 8; ++i) dot += a[i] * b[i];
        }
        s[n][e] = dot;
      }
    }
  }
  const T* keys = nullptr;
};

// Grid: (splits, row tiles, items).
template <typename Tiles>
__global__ void __launch_bounds__(kThreads) DenominatorKernel(Passes passes) {
  extern __shared__ __align__(128) char shared[];
  const MassParams& p = passes.p;
  const MassItem item = p.items[blockIdx.z];
  const int32_t first = blockIdx.y * kTileRows;
  if (first >= item.rows) return;
  const int32_t last = min(first + kTileRows, item.rows) - 1;
  const int32_t begin = blockIdx.x * kSplitKeys, end = min(begin + kSplitKeys, Limit(item, last));
  const int lane = threadIdx.x % 32, own = first + threadIdx.x / 32 * 16 + lane / 4;
  const float scale = 1.4426950408889634f * rsqrtf(float(p.head_dim));
  const int32_t limits[2] = {Limit(item, min(own, last)), Limit(item, min(own + 8, last))};
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  Tiles tiles;
  tiles.LoadRows(item, p.head_dim, first);
  for (int32_t key = begin; key < end; key += kTileKeys) {
    __syncthreads();
    tiles.LoadKeys(item, p.pool_k, p.head_dim, key, end, shared);
    Scores s;
    tiles.Multiply(item, p.head_dim, first, shared, s);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = high[r];
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[n][2 * r + e];
          x = key + n * 8 + lane % 4 * 2 + e < limits[r] ? x * scale : -INFINITY;
          now = fmaxf(now, x);
        }
      }
      if (now == -INFINITY) continue;
      sum[r] *= exp2f(high[r] - now);
      high[r] = now;
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        sum[r] += exp2f(s[n][2 * r] - now) + exp2f(s[n][2 * r + 1] - now);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    for (int offset = 1; offset < 4; offset *= 2) {  // the four threads of a row, pairwise
      const float other_high = __shfl_xor_sync(~0u, high[r], offset);
      const float other_sum = __shfl_xor_sync(~0u, sum[r], offset);
      const float now = fmaxf(high[r], other_high);
      if (now > -INFINITY) {
        sum[r] = sum[r] * exp2f(high[r] - now) + other_sum * exp2f(other_high - now);
        high[r] = now;
      }
    }
    const int32_t row = own + 8 * r;
    if (lane % 4 == 0 && row <= last) {
      passes.partial[(int64_t{blockIdx.z} * passes.splits + blockIdx.x) * p.max_rows + row] = {
          high[r], sum[r]};
    }
  }
}

// Grid: (rows / kThreads, items).
__global__ void __launch_bounds__(kThreads) MergeKernel(Passes passes) {
  const MassItem item = passes.p.items[blockIdx.y];
  const int32_t row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= item.rows) return;
  // Splits beyond the row tile's last limit wrote an empty sum: -inf, 0.
  const float2* parts =
      passes.partial + int64_t{blockIdx.y} * passes.splits * passes.p.max_rows + row;
  float high = -INFINITY, sum = 0;
  for (int32_t s = 0; s < passes.splits; ++s)
    high = fmaxf(high, parts[int64_t{s} * passes.p.max_rows].x);
  for (int32_t s = 0; s < passes.splits; ++s) {
    const float2 part = parts[int64_t{s} * passes.p.max_rows];
    sum += part.y * exp2f(part.x - high);
  }
  passes.log_sums[int64_t{blockIdx.y} * passes.p.max_rows + row] = high + log2f(sum);
}

// Grid: (bin ranges, items). A block sums all rows over kMassTiles tiles of keys.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads) MassKernel(Passes passes) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float columns[kWarps][kTileKeys];
  const MassParams& p = passes.p;
  const MassItem item = p.items[blockIdx.y];
  if (item.rows == 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = 1.4426950408889634f * rsqrtf(float(p.head_dim));
  const float* log_sums = passes.log_sums + int64_t{blockIdx.y} * p.max_rows;
  const int32_t bin_end = item.bin_begin + item.bins * item.bin_size;
  Tiles tiles;
  for (int tile = 0; tile < kMassTiles; ++tile) {
    const int32_t begin = item.bin_begin + (int32_t(blockIdx.x) * kMassTiles + tile) * kTileKeys;
    if (begin >= bin_end) return;
    __syncthreads();
    tiles.LoadKeys(item, p.pool_k, p.head_dim, begin, bin_end, shared);
    float total[kTileKeys / 8][2] = {};  // of this thread's columns
    for (int32_t first = 0; first < item.rows; first += kTileRows) {
      tiles.LoadRows(item, p.head_dim, first);
      Scores s;
      tiles.Multiply(item, p.head_dim, first, shared, s);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int32_t row = first + warp * 16 + lane / 4 + 8 * r;
        const float log_sum = row < item.rows ? log_sums[row] : INFINITY;
        const int32_t limit = min(Limit(item, min(row, item.rows - 1)), bin_end);
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool visible = begin + n * 8 + lane % 4 * 2 + e < limit;
            if (visible) total[n][e] += exp2f(s[n][2 * r + e] * scale - log_sum);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x = total[n][e];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
        if (lane < 4) columns[warp][n * 8 + lane * 2 + e] = x;
      }
    }
    __syncthreads();
    const int32_t bins = kTileKeys / item.bin_size,
                  bin = (begin - item.bin_begin) / item.bin_size + threadIdx.x;
    if (int(threadIdx.x) < bins && bin < item.bins) {
      float sum = 0;
      for (int32_t k = threadIdx.x * item.bin_size; k < (int(threadIdx.x) + 1) * item.bin_size;
           ++k) {
        for (int w = 0; w < kWarps; ++w) sum += columns[w][k];
      }
      p.mass[int64_t{blockIdx.y} * p.mass_stride + bin] = sum / float(item.rows);
    }
  }
}

size_t PartialBytes(int64_t items, int64_t max_rows, int64_t max_keys) {
  return size_t(items * max_rows * CeilDiv<int64_t>(max_keys, kSplitKeys)) * sizeof(float2);
}

template <typename Tiles>
void Run(const Passes& passes, cudaStream_t stream) {
  constexpr int kBytes = Tiles::kSharedBytes;
  const MassParams& p = passes.p;
  const unsigned items = unsigned(p.num_items);
  const dim3 splits(unsigned(passes.splits), unsigned(CeilDiv(p.max_rows, kTileRows)), items);
  DenominatorKernel<Tiles><<<splits, kThreads, kBytes, stream>>>(passes);
  const dim3 rows(unsigned(CeilDiv(p.max_rows, kThreads)), items);
  MergeKernel<<<rows, kThreads, 0, stream>>>(passes);
  // A tile holds at least one bin.
  const dim3 ranges(unsigned(CeilDiv(CeilDiv(p.max_keys, kTileKeys), kMassTiles)), items);
  MassKernel<Tiles><<<ranges, kThreads, kBytes, stream>>>(passes);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

size_t MassScratchBytes(int64_t items, int64_t max_rows, int64_t max_keys) {
  return PartialBytes(items, max_rows, max_keys) + size_t(items * max_rows) * sizeof(float);
}

void LaunchMass(const MassParams& p, cudaStream_t stream) {
  if (p.num_items == 0 || p.max_rows == 0 || p.max_bins == 0) return;
  Check(p.head_dim % 8 == 0, "attention: head_dim must be a multiple of 8");
  Passes passes;
  passes.p = p;
  passes.splits = CeilDiv(p.max_keys, kSplitKeys);
  passes.partial = static_cast<float2*>(p.scratch);
  passes.log_sums = reinterpret_cast<float*>(static_cast<char*>(p.scratch) +
                                             PartialBytes(p.num_items, p.max_rows, p.max_keys));
  if (p.dtype == DType::kF32) {
    Run<SimpleTiles<float>>(passes, stream);
  } else if (p.head_dim == 64) {
    Run<MmaTiles<64>>(passes, stream);
  } else if (p.head_dim == 128) {
    Run<MmaTiles<128>>(passes, stream);
  } else {
    Run<SimpleTiles<bf16>>(passes, stream);
  }
}

}  // namespace entropyserve::cuda
