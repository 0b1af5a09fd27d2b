// Estimators: what a segment would look at (ARCHITECTURE.md, "The method"; box: arXiv 2606.09508).
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/select_internal.h"

namespace entropyserve::cpu {
namespace {

constexpr int32_t kTileBlocks = 512;  // bounds of one product
constexpr int32_t kPadBlocks = 128;   // products are rounded up to this, so that few are compiled

// Where the query vectors of one token begin, the kv head's group of them.
int64_t QueryRow(const SegmentHead& item, int32_t row) {
  const AttentionShape& shape = item.op->shape;
  return int64_t{row} * shape.heads + item.kv_head * shape.group();
}

// Per query head of the group and channel, (max + min) / 2 over the segment's queries.
// center: [group, head_dim]
void QueryCenter(const SegmentHead& item, SelectScratch& s, float* center) {
  const int64_t n = int64_t{item.op->shape.group()} * item.op->shape.head_dim;
  s.bounds_max.resize(n);
  s.bounds_min.resize(n);
  s.dot_max.resize(n);
  float *high = s.bounds_max.data(), *low = s.bounds_min.data(), *q = s.dot_max.data();
  const auto load = [&](int32_t row, float* dst) {
    LoadVectors(item.op->pool, item.op->q, QueryRow(item, row), item.op->shape.group(), dst);
  };
  load(item.segment->row_begin, high);
  std::copy_n(high, n, low);
  for (int32_t i = 1; i < item.segment->rows; ++i) {
    load(item.segment->row_begin + i, q);
    for (int64_t c = 0; c < n; ++c) {
      high[c] = q[c] > high[c] ? q[c] : high[c];
      low[c] = q[c] < low[c] ? q[c] : low[c];
    }
  }
  for (int64_t c = 0; c < n; ++c) center[c] = (high[c] + low[c]) * 0.5f;
}

// Bounds of blocks [begin, end): the max half of their pages, or the min half. dst: [end - begin,
// head_dim]
void GatherBounds(const SegmentHead& item, const void* half, int32_t begin, int32_t end,
                  float* dst) {
  const KvPool& pool = item.op->pool;
  while (begin < end) {
    const int32_t n = std::min(end - begin, kPageTokens - begin % kPageTokens);
    LoadVectors(pool, half, item.head.BoundsRow(begin), n, dst);
    dst += int64_t{n} * pool.head_dim;
    begin += n;
  }
}

// dot [group, padded] = center * bounds^T, over one half of the bounds pages.
void BoundProducts(const SegmentHead& item, const float* center, const void* half, int32_t begin,
                   int32_t end, int32_t padded, Matmul& matmul, std::vector<float>& bounds,
                   std::vector<float>& dot) {
  const int64_t d = item.op->shape.head_dim, group = item.op->shape.group();
  bounds.resize(padded * d);
  dot.resize(padded * group);
  GatherBounds(item, half, begin, end, bounds.data());
  std::fill(bounds.begin() + (end - begin) * d, bounds.end(), 0.0f);
  matmul.Run(
      {.m = group, .n = padded, .k = d, .lda = d, .ldb = d, .ldc = padded, .b_transposed = true},
      center, bounds.data(), dot.data());
}

// p = softmax(score). In double where sums are long: the order of fp32 sums would show.
void Softmax(std::span<const float> score, std::span<float> p) {
  float highest = -std::numeric_limits<float>::infinity();
  for (float x : score) highest = x > highest ? x : highest;
  double sum = 0;
  for (size_t j = 0; j < score.size(); ++j) {
    p[j] = std::exp(score[j] - highest);
    sum += p[j];
  }
  const float inverse = float(1.0 / sum);
  for (float& x : p) x *= inverse;
}

// a[j] = mean over the group's heads of max(qc . kmax[j], qc . kmin[j]), times the temperature.
void RunBox(const SegmentHead& item, Matmul& matmul, SelectScratch& s, Estimate* estimate,
            bool* probes_done) {
  *probes_done = false;
  Check(item.head.bounds != nullptr, "the box estimator needs block bounds");
  const int32_t group = item.op->shape.group();
  s.center.resize(int64_t{group} * item.op->shape.head_dim);
  QueryCenter(item, s, s.center.data());
  const float factor = item.seq->policy.temperature / float(group);
  for (int32_t begin = 0; begin < item.visible; begin += kTileBlocks) {
    const int32_t end = std::min(item.visible, begin + kTileBlocks);
    const int32_t padded = CeilDiv(end - begin, kPadBlocks) * kPadBlocks;
    const KvPool& pool = item.op->pool;
    BoundProducts(item, s.center.data(), pool.k, begin, end, padded, matmul, s.bounds_max,
                  s.dot_max);
    BoundProducts(item, s.center.data(), pool.v, begin, end, padded, matmul, s.bounds_min,
                  s.dot_min);
    for (int32_t j = begin; j < end; ++j) {
      float sum = 0;
      for (int32_t h = 0; h < group; ++h) {
        const int64_t at = int64_t{h} * padded + (j - begin);
        sum += std::max(s.dot_max[at], s.dot_min[at]);
      }
      estimate->score[j] = sum * factor;
    }
  }
  Softmax(estimate->score, estimate->p);
  estimate->covered = 0;
  estimate->entropy = Entropy(estimate->p);
}

void CountBox(const SegmentHead& item, int32_t group, SeqCounters* counters) {
  counters->box_blocks += uint64_t(group) * uint64_t(item.visible);
}

void RunProbeEstimator(const SegmentHead& item, Matmul& matmul, SelectScratch& s,
                       Estimate* estimate, bool* probes_done) {
  const PrefillParams& policy = item.seq->policy;
  *probes_done = policy.correction == policy.probe_stride;
  const bool sparse = !IsDense(*item.seq, *item.segment, item.op->layer);
  RunProbes(item, policy.probe_stride, *probes_done && sparse, matmul, s, estimate);
}

void CountProbeEstimator(const SegmentHead& item, int32_t group, SeqCounters* counters) {
  counters->pairs += ProbePairs(item, item.seq->policy.probe_stride, group);
}

// Indexed by Estimator.
constexpr EstimatorPart kEstimators[] = {
    {RunBox, CountBox},
    {RunProbeEstimator, CountProbeEstimator},
};

}  // namespace

const EstimatorPart& Part(Estimator estimator) { return kEstimators[int(estimator)]; }

void RunProbes(const SegmentHead& item, int32_t stride, bool write_out, Matmul& matmul,
               SelectScratch& s, Estimate* estimate) {
  const SelectParams& op = *item.op;
  const int32_t group = op.shape.group(), d = op.shape.head_dim;
  const int32_t probes = CeilDiv(item.segment->rows, stride), rows = probes * group;
  s.queries.resize(size_t(rows) * d * SizeOf(op.pool.dtype));
  s.limits.resize(rows);
  std::byte* end = s.queries.data();
  for (int32_t i = 0; i < probes; ++i) {
    end = CopyVectors(op.pool, op.q, QueryRow(item, item.segment->row_begin + i * stride), group,
                      end);
    const int32_t limit = item.head.past + item.begin() + i * stride + 1;
    std::fill_n(s.limits.begin() + i * group, group, limit);
  }
  s.out.resize(write_out ? int64_t{rows} * d : 0);

  const ExactQueries queries{.head = item.head,
                             .pool = &op.pool,
                             .rows = rows,
                             .q = s.queries.data(),
                             .limits = s.limits.data(),
                             .bin_begin = item.head.past,
                             .bins = item.visible,
                             .bin_size = item.seq->policy.block};
  ExactResult result{.mass = estimate ? estimate->p.data() : nullptr,
                     .out = write_out ? s.out.data() : nullptr};
  AttendExactly(queries, matmul, s.attend, &result);
  if (estimate) {
    std::copy(estimate->p.begin(), estimate->p.end(), estimate->score.begin());
    estimate->covered = result.covered;
    estimate->entropy = Entropy(estimate->p);
  }
  if (!write_out) return;
  for (int32_t i = 0; i < probes; ++i) {
    std::copy_n(s.out.data() + int64_t{i} * group * d, int64_t{group} * d,
                op.probe_out + QueryRow(item, item.segment->row_begin + i * stride) * d);
  }
}

uint64_t ProbePairs(const SegmentHead& item, int32_t stride, int32_t group) {
  const uint64_t probes = CeilDiv(item.segment->rows, stride);
  const uint64_t first = uint64_t(item.head.past) + uint64_t(item.begin()) + 1;
  return uint64_t(group) * (probes * first + uint64_t(stride) * (probes * (probes - 1) / 2));
}

float Entropy(std::span<const float> p) {
  double sum = 0, entropy = 0;
  for (float x : p) sum += x;
  if (!(sum > 0)) return 0;
  const float inverse = float(1.0 / sum);
  for (float x : p) {
    const float share = x * inverse;
    entropy -= share * std::log(share + 1e-9f);
  }
  return float(entropy);
}

}  // namespace entropyserve::cpu
