// Box scores on tensor cores. Bounds are bf16 as they are; query centres are fp32 and enter as sums
// of three bf16 numbers (24 bits), so that products and ranks are as good as fp32's.
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kRows = kWarps * 16;  // (segment, head of the group) pairs of a tile
constexpr int kBlocks = 64;         // blocks of keys of a tile
constexpr int kPitch =
    kBlocks + 2;  // floats of a row of products: two rows' words in different banks

template <int kDim>
constexpr int SharedBytes() {
  return 2 * kBlocks * kDim * 2 + kRows * kPitch * 4;
}

// x = parts[0] + parts[1] + parts[2], pairs of bf16.
__device__ __forceinline__ void Split(float2 x, uint32_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i] = PackBf16(x.x, x.y);
    const float2 taken = UnpackBf16(parts[i]);
    x.x -= taken.x, x.y -= taken.y;
  }
}

// All of the launch's segments belong to one sequence. Grid: (blocks / kBlocks, kv_heads).
template <int kDim>
__global__ void __launch_bounds__(kThreads) BoxScoreMmaKernel(SelectLaunch p) {
  using Tile = SwizzledTile<kDim>;
  constexpr int kChunks = kDim / 8;
  extern __shared__ __align__(128) char shared[];
  const uint32_t high_tile = SharedAddress(shared), low_tile = high_tile + kBlocks * kDim * 2;
  float* const products = reinterpret_cast<float*>(shared + 2 * kBlocks * kDim * 2);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int32_t kv_head = blockIdx.y, group = p.shape.heads / p.shape.kv_heads;
  const int32_t first_block = blockIdx.x * kBlocks;
  const BatchSegment* const segments = p.segments + p.begin;
  const BatchSeq& seq = p.seqs[segments[0].seq];
  const int32_t most = VisibleBlocks(seq, segments[p.count - 1]);  // segments ascend
  if (seq.policy.estimator != Estimator::kBox || first_block >= most) return;

  const HeadView view = ViewHead(seq, p.shape.kv_heads, p.layer, kv_head);
  for (int i = tid; i < kBlocks * kChunks; i += kThreads) {
    const int j = i / kChunks, chunk = i % kChunks;
    const bool valid = first_block + j < most;
    const int64_t element = (valid ? view.BoundsRow(first_block + j) : 0) * kDim + chunk * 8;
    const uint32_t offset = Tile::Offset(j, chunk);
    CopyAsync16(high_tile + offset, static_cast<const bf16*>(p.pool_k) + element, valid);
    CopyAsync16(low_tile + offset, static_cast<const bf16*>(p.pool_v) + element, valid);
  }
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();

  const int32_t per_tile = kRows / group;  // segments
  for (int32_t first = 0; first < p.count; first += per_tile) {
    const int32_t last = min(first + per_tile, p.count) - 1;
    if (VisibleBlocks(seq, segments[last]) <= first_block) continue;
    const float* rows[2];  // centres of this thread's rows
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = min(warp * 16 + lane / 4 + 8 * r, (last - first + 1) * group - 1);
      rows[r] =
          p.centers +
          ((int64_t{first} + row / group) * p.shape.heads + kv_head * group + row % group) * kDim;
    }
    float high[kBlocks / 8][4] = {}, low[kBlocks / 8][4] = {};
#pragma unroll 2
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t q[3][4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int c = k * 16 + e / 2 * 8 + lane % 4 * 2;
        uint32_t parts[3];
        Split(*reinterpret_cast<const float2*>(rows[e % 2] + c), parts);
#pragma unroll
        for (int i = 0; i < 3; ++i) q[i][e] = parts[i];
      }
#pragma unroll
      for (int n = 0; n < kBlocks / 16; ++n) {
        uint32_t a[4], b[4];
        Tile::LoadB(a, high_tile, n * 16, k);
        Tile::LoadB(b, low_tile, n * 16, k);
#pragma unroll
        for (int i = 2; i >= 0; --i) {  // small parts first
          Mma16x8x16(high[2 * n], q[i], a[0], a[1]);
          Mma16x8x16(high[2 * n + 1], q[i], a[2], a[3]);
          Mma16x8x16(low[2 * n], q[i], b[0], b[1]);
          Mma16x8x16(low[2 * n + 1], q[i], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // the tile before was read
#pragma unroll
    for (int n = 0; n < kBlocks / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* const at = products + (warp * 16 + lane / 4 + 8 * r) * kPitch + n * 8 + lane % 4 * 2;
        at[0] = fmaxf(high[n][2 * r], low[n][2 * r]);
        at[1] = fmaxf(high[n][2 * r + 1], low[n][2 * r + 1]);
      }
    }
    __syncthreads();
    for (int i = tid; i < (last - first + 1) * kBlocks; i += kThreads) {
      const int32_t s = i / kBlocks, j = i % kBlocks;
      const BatchSegment segment = segments[first + s];
      if (first_block + j >= VisibleBlocks(seq, segment) || !IsEstimated(seq, segment, p.layer))
        continue;
      float sum = 0;
      for (int h = 0; h < group; ++h) sum += products[(s * group + h) * kPitch + j];
      p.scores[((int64_t{first} + s) * p.shape.kv_heads + kv_head) * p.stride + first_block + j] =
          sum * (seq.policy.temperature / float(group));
    }
  }
}

template <int kDim>
void Run(const SelectLaunch& p, cudaStream_t stream) {
  auto* kernel = &BoxScoreMmaKernel<kDim>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  SharedBytes<kDim>()));
  const dim3 grid(unsigned(CeilDiv<int64_t>(p.stride, kBlocks)), unsigned(p.shape.kv_heads));
  kernel<<<grid, kThreads, SharedBytes<kDim>(), stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

bool CanScoreMma(const AttentionShape& shape, DType dtype) {
  return dtype == DType::kBF16 && (shape.head_dim == 64 || shape.head_dim == 128) &&
         shape.group() <= kRows;
}

void LaunchBoxScoresMma(const SelectLaunch& p, cudaStream_t stream) {
  p.shape.head_dim == 64 ? Run<64>(p, stream) : Run<128>(p, stream);
}

}  // namespace entropyserve::cuda
