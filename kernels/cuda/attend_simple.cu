// Attention by one warp per query: the reference on the device, and the path of f32 models and
// unusual head sizes.
#include "kernels/check.h"
#include "kernels/cuda/attend_simple.cuh"
#include "kernels/cuda/cuda_check.h"

namespace entropyserve::cuda {
namespace {

constexpr int kWarps = 4;

// Grid: (rows of the longest segment / kWarps, heads, segments).
template <typename T>
__global__ void __launch_bounds__(kWarps * 32) AttendSimpleKernel(AttendParams p) {
  __shared__ float shared[kWarps][kMaxDim];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = p.shape.head_dim;
  const int32_t head = blockIdx.y, kv_head = head / (p.shape.heads / p.shape.kv_heads);
  const BatchSegment segment = p.segments[blockIdx.z];
  const BatchSeq& seq = p.seqs[segment.seq];
  int32_t offset = blockIdx.x * kWarps + warp;
  if (p.probes) {
    if (seq.policy.correction == 0 || IsDense(seq, segment, p.layer)) return;
    offset *= seq.policy.correction;
  }
  if (offset >= segment.rows) return;
  const int64_t list_row = int64_t{blockIdx.z} * p.shape.kv_heads + kv_head;
  const int32_t count = p.probes ? -1 : p.lists.counts[list_row];
  const KeyList list = ListKeys(seq, segment, p.shape, p.layer, kv_head, count,
                                p.lists.blocks + list_row * p.lists.capacity);
  const int64_t element = ((int64_t{segment.row_begin} + offset) * p.shape.heads + head) * dim;
  float* const q = shared[warp];
  for (int c = lane; c < dim; c += 32) q[c] = ToFloat(static_cast<const T*>(p.q)[element + c]);
  __syncwarp();
  WarpOutput result;
  AttendKeys(list, 0, 1, list.own_begin() + offset + 1, static_cast<const T*>(p.pool_k),
             static_cast<const T*>(p.pool_v), q, dim, &result);
#pragma unroll
  for (int i = 0; i < kMaxDim / 32; ++i) {
    const int c = i * 32 + lane;
    if (c >= dim) continue;
    const float o = result.o[i] / result.sum;
    if (p.probes) {
      static_cast<float*>(p.out)[element + c] = o;
    } else {
      static_cast<T*>(p.out)[element + c] = FromFloat<T>(o);
    }
  }
}

// o[i] += o*[m] - o[m], in place: a thread owns one channel of the rows after one probe.
// Grid: (probes of the longest segment at stride 1, heads, segments).
template <typename T>
__global__ void CorrectKernel(AttendParams p) {
  const BatchSegment segment = p.segments[blockIdx.z];
  const PrefillParams& policy = p.seqs[segment.seq].policy;
  const int32_t head = blockIdx.y, kv_head = head / (p.shape.heads / p.shape.kv_heads);
  const int32_t stride = policy.correction;
  const int64_t probe = int64_t{blockIdx.x} * stride;
  if (stride == 0 || probe >= segment.rows ||
      p.lists.counts[int64_t{blockIdx.z} * p.shape.kv_heads + kv_head] < 0) {
    return;
  }
  const int dim = p.shape.head_dim, c = threadIdx.x;
  const auto element = [&](int64_t offset) {
    return ((segment.row_begin + offset) * p.shape.heads + head) * dim + c;
  };
  T* const out = static_cast<T*>(p.out);
  const float difference = p.probe_out[element(probe)] - ToFloat(out[element(probe)]);
  const int64_t end = min(probe + stride, int64_t{segment.rows});
  for (int64_t i = probe; i < end; ++i) {
    out[element(i)] = FromFloat<T>(ToFloat(out[element(i)]) + difference);
  }
}

// A thread per (segment, kv head).
__global__ void CountPairsKernel(AttendParams p) {
  const int32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.num_segments * p.shape.kv_heads) return;
  const BatchSegment segment = p.segments[index / p.shape.kv_heads];
  const BatchSeq& seq = p.seqs[segment.seq];
  if (!seq.counters) return;
  const KeyList list = ListKeys(seq, segment, p.shape, p.layer, index % p.shape.kv_heads,
                                p.lists.counts[index], nullptr);
  const unsigned long long rows = segment.rows, group = p.shape.heads / p.shape.kv_heads;
  atomicAdd(reinterpret_cast<unsigned long long*>(&seq.counters->pairs),
            (rows * list.own_begin() + rows * (rows + 1) / 2) * group);
}

template <typename T>
void Run(const AttendParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(CeilDiv(p.max_rows, kWarps)), unsigned(p.shape.heads),
                  unsigned(p.num_segments));
  AttendSimpleKernel<T><<<grid, kWarps * 32, 0, stream>>>(p);
  if (p.probe_out && !p.probes) {
    const dim3 probes(unsigned(p.max_rows), unsigned(p.shape.heads), unsigned(p.num_segments));
    CorrectKernel<T><<<probes, unsigned(p.shape.head_dim), 0, stream>>>(p);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void LaunchAttendSimple(const AttendParams& p, cudaStream_t stream) {
  if (p.num_segments == 0) return;
  Check(p.shape.head_dim % 8 == 0 && p.shape.head_dim <= kMaxDim,
        "attention: head_dim must be a multiple of 8 up to 256");
  p.dtype == DType::kF32 ? Run<float>(p, stream) : Run<bf16>(p, stream);
}

void LaunchCountPairs(const AttendParams& p, cudaStream_t stream) {
  if (p.num_segments == 0) return;
  const unsigned blocks = unsigned(CeilDiv(p.num_segments * p.shape.kv_heads, 128));
  CountPairsKernel<<<blocks, 128, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
