// What segments would look at: box scores, probes' items, and each row's softmax and entropy.
#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxDim = 256;

// Per query head and channel, (max + min) / 2 over the segment's queries. Grid: (heads, count).
template <typename T>
__global__ void __launch_bounds__(kThreads) CenterKernel(SelectLaunch p) {
  __shared__ float highs[kThreads * 8], lows[kThreads * 8];
  const BatchSegment segment = p.segments[p.begin + blockIdx.y];
  const BatchSeq& seq = p.seqs[segment.seq];
  if (seq.policy.estimator != Estimator::kBox || !IsEstimated(seq, segment, p.layer)) return;
  const int dim = p.shape.head_dim, lanes = dim / 8, groups = kThreads / lanes;
  const int lane = threadIdx.x % lanes, row_group = threadIdx.x / lanes;
  float high[8], low[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) high[i] = -INFINITY, low[i] = INFINITY;
  for (int32_t row = row_group; row < segment.rows && row_group < groups; row += groups) {
    float x[8];
    const int64_t vector = (int64_t{segment.row_begin} + row) * p.shape.heads + blockIdx.x;
    Load8(static_cast<const T*>(p.q) + vector * dim + lane * 8, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) high[i] = fmaxf(high[i], x[i]), low[i] = fminf(low[i], x[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    highs[threadIdx.x * 8 + i] = high[i];
    lows[threadIdx.x * 8 + i] = low[i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float a = -INFINITY, b = INFINITY;
    for (int g = 0; g < groups; ++g) {
      a = fmaxf(a, highs[g * dim + c]);
      b = fminf(b, lows[g * dim + c]);
    }
    p.centers[(int64_t{blockIdx.y} * p.shape.heads + blockIdx.x) * dim + c] = (a + b) * 0.5f;
  }
}

constexpr int kScoreThreads = 128;
constexpr int kMaxGroup = 64;  // bounds the shared memory: group * head_dim floats

// a[j] = mean over the group's heads of max(qc . kmax[j], qc . kmin[j]), times the temperature.
// fp32: ranks must not tie by rounding. A thread per block. Grid: (blocks / kScoreThreads,
// kv_heads, count).
template <typename T>
__global__ void __launch_bounds__(kScoreThreads) BoxScoreKernel(SelectLaunch p) {
  extern __shared__ __align__(16) float centers[];  // [group, head_dim]
  const BatchSegment segment = p.segments[p.begin + blockIdx.z];
  const BatchSeq& seq = p.seqs[segment.seq];
  if (seq.policy.estimator != Estimator::kBox || !IsEstimated(seq, segment, p.layer)) return;
  const int32_t visible = VisibleBlocks(seq, segment), kv_head = blockIdx.y;
  if (int32_t(blockIdx.x) * kScoreThreads >= visible) return;
  const int dim = p.shape.head_dim, group = p.shape.heads / p.shape.kv_heads;
  const float* from = p.centers + (int64_t{blockIdx.z} * p.shape.heads + kv_head * group) * dim;
  for (int i = threadIdx.x; i < group * dim; i += kScoreThreads) centers[i] = from[i];
  __syncthreads();
  const int32_t j = blockIdx.x * kScoreThreads + threadIdx.x;
  if (j >= visible) return;
  const HeadView view = ViewHead(seq, p.shape.kv_heads, p.layer, kv_head);
  const int64_t row = view.BoundsRow(j) * dim;
  const T* const high = static_cast<const T*>(p.pool_k) + row;
  const T* const low = static_cast<const T*>(p.pool_v) + row;
  constexpr int kHeads = 4;  // heads at a time, in registers
  float sum = 0;
  for (int first = 0; first < group; first += kHeads) {
    float dot_high[kHeads] = {}, dot_low[kHeads] = {};
    for (int c = 0; c < dim; c += 8) {
      float a[8], b[8];
      Load8(high + c, a);
      Load8(low + c, b);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float* q = centers + min(first + h, group - 1) * dim + c;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          dot_high[h] += q[i] * a[i];
          dot_low[h] += q[i] * b[i];
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (first + h < group) sum += fmaxf(dot_high[h], dot_low[h]);
    }
  }
  p.scores[(int64_t{blockIdx.z} * p.shape.kv_heads + kv_head) * p.stride + j] =
      sum * (seq.policy.temperature / float(group));
}

// Queries at offsets 0, r, 2r... of the segment, all heads of the group; bins are the visible
// blocks.
__global__ void __launch_bounds__(kThreads) ProbeItemKernel(SelectLaunch p) {
  const int32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= p.count * p.shape.kv_heads) return;
  const int32_t kv_head = index % p.shape.kv_heads;
  const BatchSegment segment = p.segments[p.begin + index / p.shape.kv_heads];
  const BatchSeq& seq = p.seqs[segment.seq];
  MassItem item = {};
  if (seq.policy.estimator == Estimator::kProbe && IsEstimated(seq, segment, p.layer)) {
    const int32_t group = p.shape.heads / p.shape.kv_heads, stride = seq.policy.probe_stride;
    const int64_t vector = int64_t{segment.row_begin} * p.shape.heads + kv_head * group;
    const int64_t element = p.dtype == DType::kF32 ? 4 : 2;
    const HeadView view = ViewHead(seq, p.shape.kv_heads, p.layer, kv_head);
    item.q = static_cast<const char*>(p.q) + vector * p.shape.head_dim * element;
    item.pages = view.pages;
    item.past = view.past;
    item.rows = (segment.rows + stride - 1) / stride * group;
    item.group = group;
    item.q_stride = stride * p.shape.heads;
    item.first_limit = view.past + segment.index * seq.policy.segment + 1;
    item.limit_step = stride;
    item.bin_begin = view.past;
    item.bins = VisibleBlocks(seq, segment);
    item.bin_size = seq.policy.block;
  }
  p.items[index] = item;
}

// Softmax and entropy -sum p log(p + 1e-9) of each estimated row. Grid: (kv_heads, count).
__global__ void __launch_bounds__(kThreads) RowStatKernel(SelectLaunch p) {
  __shared__ float shared[33];
  const BatchSegment segment = p.segments[p.begin + blockIdx.y];
  const BatchSeq& seq = p.seqs[segment.seq];
  RowStat stat = {0, 1, 0, 0, NAN, 0};
  if (IsEstimated(seq, segment, p.layer)) {
    const int32_t visible = VisibleBlocks(seq, segment);
    const float* x = p.scores + (int64_t{blockIdx.y} * p.shape.kv_heads + blockIdx.x) * p.stride;
    const bool box = seq.policy.estimator == Estimator::kBox;
    if (box) {
      float high = -INFINITY, sum = 0;
      for (int32_t j = threadIdx.x; j < visible; j += kThreads) high = fmaxf(high, x[j]);
      stat.high = BlockMax(high, shared);
      for (int32_t j = threadIdx.x; j < visible; j += kThreads) sum += expf(x[j] - stat.high);
      stat.inverse = 1.0f / BlockSum(sum, shared);
    }
    float mass = 0, entropy = 0;
    for (int32_t j = threadIdx.x; j < visible; j += kThreads) mass += BlockMass(x[j], box, stat);
    mass = BlockSum(mass, shared);
    if (!box) stat.covered = 1.0f - mass;
    const float inverse = 1.0f / mass;
    for (int32_t j = threadIdx.x; j < visible; j += kThreads) {
      const float share = BlockMass(x[j], box, stat) * inverse;
      entropy -= share * logf(share + 1e-9f);
    }
    entropy = BlockSum(entropy, shared);
    stat.entropy = mass > 0 ? entropy : 0.0f;
  }
  if (threadIdx.x == 0) {
    p.stats[(int64_t{p.begin} + blockIdx.y) * p.shape.kv_heads + blockIdx.x] = stat;
  }
}

template <typename T>
void RunBox(const SelectLaunch& p, cudaStream_t stream) {
  const int group = p.shape.group();
  CenterKernel<T><<<dim3(unsigned(p.shape.heads), unsigned(p.count)), kThreads, 0, stream>>>(p);
  if (CanScoreMma(p.shape, p.dtype)) return LaunchBoxScoresMma(p, stream);
  const size_t bytes = size_t(group) * p.shape.head_dim * sizeof(float);
  if (bytes > (48u << 10)) {
    CUDA_CHECK(cudaFuncSetAttribute(&BoxScoreKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(bytes)));
  }
  const dim3 grid(unsigned(CeilDiv<int64_t>(p.stride, kScoreThreads)), unsigned(p.shape.kv_heads),
                  unsigned(p.count));
  BoxScoreKernel<T><<<grid, kScoreThreads, bytes, stream>>>(p);
}

}  // namespace

void LaunchBoxScores(const SelectLaunch& p, cudaStream_t stream) {
  Check(p.shape.head_dim % 8 == 0 && p.shape.head_dim <= kMaxDim && p.shape.group() <= kMaxGroup,
        "box scores: head_dim is a multiple of 8 up to 256, a group has at most 64 heads");
  p.dtype == DType::kF32 ? RunBox<float>(p, stream) : RunBox<bf16>(p, stream);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchProbeItems(const SelectLaunch& p, cudaStream_t stream) {
  const unsigned blocks = unsigned(CeilDiv(p.count * p.shape.kv_heads, kThreads));
  ProbeItemKernel<<<blocks, kThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchRowStats(const SelectLaunch& p, cudaStream_t stream) {
  RowStatKernel<<<dim3(unsigned(p.shape.kv_heads), unsigned(p.count)), kThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
