#include "kernels/cuda/sm90/prefill_attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/sm90/prefill_attention.cuh"
#include "kernels/cuda/sm90/tensor_map.h"
#include "kernels/cuda/sm90/work.cuh"
#include "kernels/kv_view.h"

namespace entropyserve::sm90 {

extern template cudaError_t LaunchAttentionKernel<64, false>(const AttentionKernelParams&, int,
                                                             cudaStream_t);
extern template cudaError_t LaunchAttentionKernel<64, true>(const AttentionKernelParams&, int,
                                                            cudaStream_t);
extern template cudaError_t LaunchAttentionKernel<128, false>(const AttentionKernelParams&, int,
                                                              cudaStream_t);
extern template cudaError_t LaunchAttentionKernel<128, true>(const AttentionKernelParams&, int,
                                                             cudaStream_t);

__global__ void __launch_bounds__(1024, 1) BuildWorkKernel(const BuildWorkParams p) {
  __shared__ int32_t
      next[kLengthBuckets];  // tiles per bucket, then the next free place of a bucket
  for (int b = threadIdx.x; b < kLengthBuckets; b += blockDim.x) next[b] = 0;
  if (threadIdx.x == 0) *p.work.claimed = 0;
  __syncthreads();
  const int32_t items = p.num_segments * p.shape.kv_heads;
  auto tiles_of = [&](const WorkItem& item) {
    return (item.rows + kTileRows - 1) / kTileRows * p.work.group;
  };
  for (int32_t i = threadIdx.x; i < items; i += blockDim.x) {
    const WorkItem item = MakeWorkItem(p, i);
    p.work.items[i] = item;
    atomicAdd(&next[LengthBucket(item.key_tiles)], tiles_of(item));
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // exclusive sums, 32 buckets at a time
    int32_t before = 0;
    for (int b = threadIdx.x; b < kLengthBuckets; b += 32) {
      const int32_t own = next[b];
      int32_t sum = own;
      for (int d = 1; d < 32; d *= 2) {
        const int32_t lower = __shfl_up_sync(0xffffffff, sum, d);
        if (threadIdx.x >= d) sum += lower;
      }
      next[b] = before + sum - own;
      before += __shfl_sync(0xffffffff, sum, 31);
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < items; i += blockDim.x) {
    const WorkItem item = p.work.items[i];
    const int32_t count = tiles_of(item);
    const int32_t first = atomicAdd(&next[LengthBucket(item.key_tiles)], count);
    for (int32_t sub = 0; sub < count; ++sub) p.work.tiles[first + sub] = {i, sub};
  }
}

namespace {

constexpr size_t kAlign = 256;
// Tiles of probes have at most so many parts, none shorter than kMinPartSteps but the last; strides
// below kMinPartStride make tiles enough without.
constexpr int32_t kMaxParts = 8;
constexpr int32_t kMinPartSteps = 128;  // 16384 keys
constexpr int32_t kMinPartStride = 32;

size_t AlignUp(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Delta Attention's correction with strides that a tile cannot handle alone: out += difference of
// the last probe. One CTA per segment row tile and head.
__global__ void CorrectRowsKernel(const BatchSeq* seqs, const BatchSegment* segments,
                                  BlockLists lists, const float* differences, uint16_t* out,
                                  int32_t heads, int32_t kv_heads, int32_t head_dim) {
  const BatchSegment segment = segments[blockIdx.x];
  const int32_t head = blockIdx.y;
  const int32_t stride = seqs[segment.seq].policy.correction;
  const int32_t kv_head = head / (heads / kv_heads);
  if (stride <= 0 || (stride >= kMinTileStride && stride <= kTileRows)) return;
  if (lists.counts[int64_t{blockIdx.x} * kv_heads + kv_head] < 0) return;
  for (int32_t i = threadIdx.x; i < segment.rows * head_dim; i += blockDim.x) {
    const int32_t row = i / head_dim, column = i % head_dim;
    const int64_t probe = segment.row_begin + row / stride * stride;
    uint16_t& x = out[((int64_t{segment.row_begin} + row) * heads + head) * head_dim + column];
    const float corrected = __uint_as_float(uint32_t{x} << 16) +
                            differences[(probe * heads + head) * head_dim + column];
    x = uint16_t(PackBF16(corrected, 0));
  }
}

bool EncodePool(const KvPool& pool, AttentionKernelParams* k) {
  auto encode = [&](CUtensorMap* map, const void* half, int32_t box_groups) {
    return EncodePages(map, half, pool.head_dim, pool.pages, box_groups);
  };
  return encode(&k->k_page, pool.k, kGroupsPerPage) && encode(&k->v_page, pool.v, kGroupsPerPage) &&
         encode(&k->k_group, pool.k, 1) && encode(&k->v_group, pool.v, 1);
}

bool EncodeQueries(const PrefillAttentionParams& p, AttentionKernelParams* k) {
  const uint64_t row = uint64_t(p.shape.head_dim) * 2, heads = p.shape.heads;
  const uint32_t spans = p.shape.head_dim / 64;
  return EncodeMap(&k->q, p.q, {{64, uint64_t(p.batch->rows), spans, heads}},
                   {{row * heads, 128, row}}, {{64, kTileRows, spans, 1}});
}

bool EncodeProbes(const SelectParams& p, const ProbeRun& run, AttentionKernelParams* k) {
  const uint64_t row = uint64_t(p.shape.head_dim) * 2, heads = p.shape.heads;
  const uint64_t spans = p.shape.head_dim / 64, group = p.shape.group();
  const uint64_t probes = CeilDiv(run.tokens, run.stride);
  return EncodeMap(&k->q, static_cast<const uint8_t*>(p.q) + run.row_begin * heads * row,
                   {{64, group, probes, spans, uint64_t(p.shape.kv_heads)}},
                   {{row, run.stride * heads * row, 128, group * row}},
                   {{64, uint32_t(group), uint32_t(run.per_tile), 1, 1}});
}

// What both operators share. `claimed` lies at the start of the scratch.
cudaError_t Prepare(const KvPool& pool, const AttentionShape& shape, void* scratch,
                    AttentionKernelParams* k, int* processors) {
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
      e != cudaSuccess)
    return e;
  if (!EncodePool(pool, k)) return cudaErrorInvalidValue;
  k->work.claimed = static_cast<int32_t*>(scratch);
  k->work.group = shape.group();
  k->heads = shape.heads;
  k->scale_log2 = float(M_LOG2E / std::sqrt(double(shape.head_dim)));
  return cudaSuccess;
}

// Whether some sequence's stride needs CorrectRowsKernel.
bool HasOtherStrides(const Batch& batch) {
  for (int32_t i = 0; i < batch.num_segments; ++i) {
    const int32_t stride = batch.seqs[batch.segments[i].seq].policy.correction;
    if (stride > 0 && (stride < kMinTileStride || stride > kTileRows)) return true;
  }
  return false;
}

size_t PartBytes(const AttentionShape& shape, int64_t tiles, int64_t parts) {
  return size_t(tiles * shape.kv_heads * parts * kTileRows) * (shape.head_dim + 1) * sizeof(float);
}

// How the keys of a sequence's tiles are split. Depends on the length that the sequence has at the
// end of its turn and on nothing else of the step, so that chunks do not change a result.
void SplitKeys(const BatchSeq& seq, ProbeRun* run) {
  const int64_t length = int64_t{seq.position} + seq.turn_total - seq.appended;
  // No token is cached that has no position; past and turn may each end in part of a step.
  const int32_t steps = int32_t(CeilDiv<int64_t>(length, kTileKeys)) + 1;
  run->part_steps =
      run->stride < kMinPartStride ? steps : std::max(kMinPartSteps, CeilDiv(steps, kMaxParts));
  run->parts = CeilDiv(steps, run->part_steps);
}

}  // namespace

size_t PrefillAttentionScratchBytes(const AttentionShape& shape, int64_t rows, int64_t segments) {
  const int64_t tiles = (rows / kTileRows + segments) * shape.heads;
  return kAlign + AlignUp(segments * shape.kv_heads * sizeof(WorkItem)) +
         AlignUp(tiles * sizeof(WorkTile));
}

size_t ProbeAttentionScratchBytes(const AttentionShape& shape, int64_t rows) {
  const int64_t per_tile = kTileRows / shape.group();
  const int64_t tiles = CeilDiv(CeilDiv<int64_t>(rows, kMinPartStride), per_tile);
  return kAlign + PartBytes(shape, tiles, kMaxParts);
}

cudaError_t LaunchPrefillAttention(const PrefillAttentionParams& p, void* scratch,
                                   size_t scratch_bytes, cudaStream_t stream) {
  const Batch& batch = *p.batch;
  if (batch.num_segments == 0) return cudaSuccess;
  if (!SupportsPrefillAttention(90, p.pool.dtype, p.shape) ||
      scratch_bytes < PrefillAttentionScratchBytes(p.shape, batch.rows, batch.num_segments))
    return cudaErrorInvalidValue;
  AttentionKernelParams k = {};
  int processors = 0;
  if (cudaError_t e = Prepare(p.pool, p.shape, scratch, &k, &processors); e != cudaSuccess)
    return e;
  if (!EncodeQueries(p, &k)) return cudaErrorInvalidValue;
  k.out = static_cast<uint16_t*>(p.out);
  k.probe_out = const_cast<float*>(p.probe_out);
  uint8_t* const items = static_cast<uint8_t*>(scratch) + kAlign;
  k.work.items = reinterpret_cast<WorkItem*>(items);
  k.work.tiles = reinterpret_cast<WorkTile*>(
      items + AlignUp(int64_t{batch.num_segments} * p.shape.kv_heads * sizeof(WorkItem)));
  for (int32_t i = 0; i < batch.num_segments; ++i)
    k.work.total += CeilDiv(batch.segments[i].rows, kTileRows) * p.shape.heads;

  const BuildWorkParams build = {.work = k.work,
                                 .seqs = batch.device_seqs,
                                 .segments = batch.device_segments,
                                 .num_segments = batch.num_segments,
                                 .layer = p.layer,
                                 .shape = p.shape,
                                 .lists = p.lists,
                                 .has_probes = p.probe_out != nullptr};
  BuildWorkKernel<<<1, 1024, 0, stream>>>(build);
  if (cudaError_t e = cudaGetLastError(); e != cudaSuccess) return e;
  const int ctas = std::min(processors, k.work.total);
  const cudaError_t e = p.shape.head_dim == 128 ? LaunchAttentionKernel<128, false>(k, ctas, stream)
                                                : LaunchAttentionKernel<64, false>(k, ctas, stream);
  if (e != cudaSuccess || p.probe_out == nullptr || p.lists.counts == nullptr ||
      !HasOtherStrides(batch))
    return e;
  CorrectRowsKernel<<<dim3(batch.num_segments, p.shape.heads), 256, 0, stream>>>(
      batch.device_seqs, batch.device_segments, p.lists, p.probe_out, k.out, p.shape.heads,
      p.shape.kv_heads, p.shape.head_dim);
  return cudaGetLastError();
}

cudaError_t LaunchProbeAttention(const SelectParams& p, void* scratch, size_t scratch_bytes,
                                 cudaStream_t stream) {
  const Batch& batch = *p.batch;
  if (!SupportsPrefillAttention(90, p.pool.dtype, p.shape) || scratch_bytes < kAlign)
    return cudaErrorInvalidValue;
  AttentionKernelParams k = {};
  int processors = 0;
  if (cudaError_t e = Prepare(p.pool, p.shape, scratch, &k, &processors); e != cudaSuccess)
    return e;
  k.probe_out = p.probe_out;
  for (int32_t i = 0; i < batch.num_segments;) {
    const int32_t index = batch.segments[i].seq;
    const BatchSeq& seq = batch.seqs[index];
    ProbeRun run = {.seq = batch.device_seqs + index,
                    .layer = p.layer,
                    .kv_heads = p.shape.kv_heads,
                    .stride = seq.policy.correction,
                    .per_tile = kTileRows / p.shape.group()};
    // The sequence's sparse segments are neighbours: dense ones come first and last.
    for (; i < batch.num_segments && batch.segments[i].seq == index; ++i) {
      const BatchSegment& segment = batch.segments[i];
      if (run.stride <= 0 || IsDense(seq, segment, p.layer)) continue;
      if (run.tokens == 0) run.row_begin = segment.row_begin;
      run.tokens = segment.row_begin + segment.rows - run.row_begin;
    }
    if (run.tokens == 0) continue;
    run.tiles = CeilDiv(CeilDiv(run.tokens, run.stride), run.per_tile);
    SplitKeys(seq, &run);
    if (run.parts > 1) {
      if (scratch_bytes < kAlign + PartBytes(p.shape, run.tiles, run.parts))
        return cudaErrorInvalidValue;
      run.part_out = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + kAlign);
      run.part_sums = run.part_out +
                      int64_t{run.tiles} * run.kv_heads * run.parts * kTileRows * p.shape.head_dim;
    }
    k.run = run;
    k.work.total = run.tiles * run.kv_heads * run.parts;
    if (!EncodeProbes(p, run, &k)) return cudaErrorInvalidValue;
    if (cudaError_t e = cudaMemsetAsync(k.work.claimed, 0, sizeof(int32_t), stream);
        e != cudaSuccess)
      return e;
    const int ctas = std::min(processors, k.work.total);
    const cudaError_t e = p.shape.head_dim == 128
                              ? LaunchAttentionKernel<128, true>(k, ctas, stream)
                              : LaunchAttentionKernel<64, true>(k, ctas, stream);
    if (e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace entropyserve::sm90
