// Memory-bound, so everything serves the weights' stream: a block takes 16 outputs, its warps share
// their columns, and a lane has 8 to 16 independent 16-byte loads of weights on their way. Tensor
// cores multiply (16 outputs x 8 rows at once), because 8 rows of multiply-adds on two weights a
// word would be more than the other cores can do meanwhile. The order of the columns within a
// product is free, so both operands are taken from memory as they lie: no shuffles, no shared
// memory before the sums. x is small, read by all blocks of a multiprocessor, and comes from L1.
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/cuda/early_start.cuh"
#include "kernels/cuda/linear_few_rows.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kOutputs = 16;  // of a block: one tensor core product's
constexpr int kTileRows = 8;  // of x: the same
// Outputs of one row in shared memory, padded so that a warp's sums go to different banks.
constexpr int kPitch = kOutputs + 4;

// 16 bytes of a row. In a product's operands lane (g, t) = (lane / 4, lane % 4) holds columns of
// row g: a step covers 4 chunks of each of 8 rows, lane (g, t) has chunk t of row g.
struct Chunk {
  uint32_t words[4];
};
constexpr int kSteps = 4;                      // loaded together: 256 consecutive bytes of each row
constexpr int kUnitChunks = 4 * kSteps;        // of one row
constexpr int kStride = kWarps * kUnitChunks;  // from a warp's unit to its next

// Weights are read once and need no place in L1.
__device__ __forceinline__ Chunk LoadStream(const Chunk* p) {
  Chunk c;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(c.words[0]), "=r"(c.words[1]), "=r"(c.words[2]), "=r"(c.words[3])
               : "l"(p));
  return c;
}
__device__ __forceinline__ Chunk LoadCached(const Chunk* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

// This lane's part of one unit of kRows rows: their chunks 0, 4, 8... from where `rows` point,
// zeros where a row has no more than `left` chunks from there on.
template <int kRows>
struct Unit {
  Chunk chunks[kSteps][kRows];

  template <typename Load>
  __device__ __forceinline__ void Fill(const Chunk* const (&rows)[kRows], int left, Load load) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        chunks[s][r] = 4 * s < left ? load(rows[r] + 4 * s) : Chunk{};
      }
    }
  }
};

// Two of a word's four 8-bit floats as halves, which hold them exactly.
__device__ __forceinline__ uint32_t HalvesOf(uint32_t word, int pair) {
  const __half2_raw halves =
      __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(word >> (16 * pair)), __NV_E4M3);
  return uint32_t{halves.x} | uint32_t{halves.y} << 16;
}

// sums += a step's chunks of 16 weight rows (g and g + 8) times those of 8 rows of x, as the sum of
// two products that do not wait for each other.
template <DType kType>
__device__ __forceinline__ void Multiply(float (&sums)[2][4], const Chunk& w0, const Chunk& w1,
                                         const Chunk& x) {
  if constexpr (kType == DType::kBF16) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      Mma16x8x16(sums[i / 2], {w0.words[i], w1.words[i], w0.words[i + 1], w1.words[i + 1]},
                 x.words[i], x.words[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Mma16x8x16Half(sums[i % 2],
                     {HalvesOf(w0.words[i], 0), HalvesOf(w1.words[i], 0), HalvesOf(w0.words[i], 1),
                      HalvesOf(w1.words[i], 1)},
                     HalvesOf(x.words[i], 0), HalvesOf(x.words[i], 1));
    }
  }
}

__device__ __forceinline__ void PrefetchToL2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Rounded after every operation, so that no two of the kernel's instances contract differently.
__device__ __forceinline__ void StoreOutput(const LinearParams& p, int64_t row, int64_t output,
                                            float sum) {
  if (p.w.dtype == DType::kE4M3)
    sum = __fmul_rn(sum, __fmul_rn(p.w.scales[output], p.x_scales[row]));
  if (p.bias) sum = __fadd_rn(sum, p.bias[output]);
  const int64_t at = row * p.w.rows + output;
  if (p.out_dtype == DType::kBF16) {
    static_cast<bf16*>(p.out)[at] = FromFloat<bf16>(sum);
  } else {
    float* const out = static_cast<float*>(p.out) + at;
    *out = p.accumulate ? __fadd_rn(*out, sum) : sum;
  }
}

// One block per 16 outputs; up to kTiles * 8 rows. Warps take a row's units in turns.
template <DType kType, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) LinearFewRowsKernel(LinearParams p) {
  static_assert(kOutputs * kTileRows * kTiles <= kThreads, "a thread finishes one output at most");
  __shared__ float shared[kWarps][kTileRows * kTiles][kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t output = int64_t{blockIdx.x} * kOutputs;
  const int row_chunks = int(p.w.cols * int64_t{SizeOf(kType)} / 16);

  // Behind the last row the last one is read again; what comes of it is not stored.
  const int first = warp * kUnitChunks + t;
  const Chunk *w_rows[2], *x_rows[kTiles];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = min(output + g + 8 * i, p.w.rows - 1);
    w_rows[i] = static_cast<const Chunk*>(p.w.data) + row * row_chunks + first;
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t row = min(int64_t{g + kTileRows * i}, p.rows - 1);
    x_rows[i] = static_cast<const Chunk*>(p.x) + row * row_chunks + first;
  }
  // The next unit's weights are on their way while this one's are multiplied.
  int left = row_chunks - first;
  Unit<2> next;
  next.Fill(w_rows, left, LoadStream);
  if (threadIdx.x < kOutputs && output + threadIdx.x < p.w.rows) {  // needed last, as weights are
    if (kType == DType::kE4M3) PrefetchToL2(p.w.scales + output + threadIdx.x);
    if (p.bias) PrefetchToL2(p.bias + output + threadIdx.x);
  }
  WaitForEarlier();  // for x and what `out` holds
  float sums[kTiles][2][4] = {};
#pragma unroll 2  // two sets of registers take turns
  for (int units = (left + t + kStride - 1) / kStride; units > 0; --units) {
    const Unit<2> w = next;
    Unit<kTiles> x;
    x.Fill(x_rows, left, LoadCached);
    for (const Chunk*& row : x_rows) row += kStride;
    for (const Chunk*& row : w_rows) row += kStride;
    left -= kStride;
    next.Fill(w_rows, left, LoadStream);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        Multiply<kType>(sums[i], w.chunks[s][0], w.chunks[s][1], x.chunks[s][i]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      shared[warp][kTileRows * i + 2 * t + e % 2][g + e / 2 * 8] = sums[i][0][e] + sums[i][1][e];
    }
  }
  __syncthreads();
  const int o = threadIdx.x % kOutputs, row = threadIdx.x / kOutputs;
  if (row >= p.rows || output + o >= p.w.rows) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += shared[i][row][o];
  StoreOutput(p, row, output + o, sum);
}

template <DType kType>
void Run(const LinearParams& p, cudaStream_t stream) {
  const unsigned blocks = unsigned(CeilDiv<int64_t>(p.w.rows, kOutputs));
  if constexpr (FewRows(kType) > kTileRows) {
    if (p.rows > kTileRows)
      return LaunchEarly(LinearFewRowsKernel<kType, 2>, blocks, kThreads, stream, p);
  }
  LaunchEarly(LinearFewRowsKernel<kType, 1>, blocks, kThreads, stream, p);
}
static_assert(kFewRows <= 2 * kTileRows);

}  // namespace

void LaunchLinearFewRows(const LinearParams& p, cudaStream_t stream) {
  if (p.w.dtype == DType::kE4M3) {
    Run<DType::kE4M3>(p, stream);
  } else {
    Run<DType::kBF16>(p, stream);
  }
}

}  // namespace entropyserve::cuda
