// How many blocks a segment may read, and which: budget rules, lists, counters, traces.
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/topk.cuh"

namespace entropyserve::cuda {
namespace {

constexpr float kFixedPoint = 1099511627776.0f;  // 2^40: sums of masses stay exact in 64 bits

// Low for a NaN, so that no input makes an index out of it.
__device__ __forceinline__ float Clamp(float x, float low, float high) {
  return x > low ? (x < high ? x : high) : low;
}

// b[s] = clamp(b[s-1] + alpha * base * (D[s] - delta), base, 3 * base)
__device__ float NextBudget(const PrefillParams& policy, int32_t s, float entropy,
                            float last_entropy, float last_budget) {
  const float base = float(policy.base);
  if (s == 0) return base;
  const float change =
      s == 1 ? policy.delta
             : Clamp((entropy - last_entropy) / (last_entropy + 1e-9f), 0.0f, 1.0f + policy.delta);
  return Clamp(last_budget + policy.alpha * base * (change - policy.delta), base, 3.0f * base);
}

__device__ float BudgetTokens(const PrefillParams& policy, int32_t s, float entropy,
                              const HeadState& last, bool not_rigid) {
  if (policy.budget == BudgetRule::kFixed) return float(policy.base);
  if (policy.budget == BudgetRule::kCoverage) {
    return policy.coverage >= 1.0f ? INFINITY : float(policy.coverage_max);
  }
  if (!not_rigid) return float(policy.base);
  return NextBudget(policy, s, entropy, last.entropy, last.budget);
}

// One thread per kv head goes through the slice's segments in order. A ragged last segment reads by
// the budget of the segment before and leaves the state alone.
__global__ void BudgetKernel(SelectLaunch p) {
  const int32_t kv_head = threadIdx.x + blockIdx.x * blockDim.x;
  if (kv_head >= p.shape.kv_heads) return;
  for (int32_t i = p.begin; i < p.begin + p.count; ++i) {
    const BatchSegment segment = p.segments[i];
    const BatchSeq& seq = p.seqs[segment.seq];
    if (!Acts(seq, p.layer)) continue;
    const PrefillParams& policy = seq.policy;
    RowStat& stat = p.stats[int64_t{i} * p.shape.kv_heads + kv_head];
    HeadState& state = seq.states[int64_t{p.layer} * p.shape.kv_heads + kv_head];
    if (segment.rows == policy.segment) {
      const float entropy = stat.entropy;
      if (IsEstimated(seq, segment, p.layer) && entropy >= policy.e_t) state.not_rigid = 1;
      state.budget = BudgetTokens(policy, segment.index, entropy, state, state.not_rigid != 0);
      state.entropy = entropy;
      state.segments = segment.index + 1;
    }
    stat.budget = state.budget;
    stat.limit =
        int32_t(fminf(state.budget / float(policy.block), float(VisibleBlocks(seq, segment))));
  }
}

// The released code's rule over a whole prompt of n tokens (preset entropy_paper): the same count
// for all heads, the largest of theirs. One block of threads, a thread per kv head.
__global__ void WholePromptKernel(SelectLaunch p) {
  const int32_t kv_heads = p.shape.kv_heads;
  const BatchSeq& seq = p.seqs[p.segments[p.begin].seq];
  const PrefillParams& policy = seq.policy;
  const int32_t per_segment = policy.segment / policy.block, segments = p.count;
  const int64_t blocks = int64_t{segments - 1} * per_segment;
  // The released code's own bound; it leaves room for the last, ragged segment.
  const int64_t bound = blocks - (seq.turn_total % policy.segment) / policy.block - 1;
  RowStat* const stats = p.stats + int64_t{p.begin} * kv_heads;
  for (int32_t kv = threadIdx.x; kv < kv_heads; kv += blockDim.x) {
    // Segment 0 sees no block; in the released code its p is uniform over all of them.
    const float share = 1.0f / float(max(blocks, int64_t{1}));
    float last_entropy = blocks > 0 ? -logf(share + 1e-9f) : 0.0f, last_budget = 0;
    stats[kv].entropy = last_entropy;
    bool rigid = true;
    for (int32_t s = 1; s < segments; ++s)
      rigid &= !(stats[s * kv_heads + kv].entropy >= policy.e_t);
    for (int32_t s = 0; s < segments; ++s) {
      RowStat& stat = stats[s * kv_heads + kv];
      stat.budget = rigid || s == 0
                        ? float(policy.base)
                        : NextBudget(policy, s, stat.entropy, last_entropy, last_budget);
      const int64_t count =
          min(min(int64_t(stat.budget / float(policy.block)), int64_t{s} * per_segment), bound);
      stat.limit = s > 0 ? int32_t(max(count, int64_t{0})) : 0;
      last_entropy = stat.entropy;
      last_budget = stat.budget;
    }
    HeadState& state = seq.states[int64_t{p.layer} * kv_heads + kv];
    state.not_rigid |= !rigid;
    state.entropy = last_entropy;
    state.budget = last_budget;
    state.segments = segments;
  }
  __syncthreads();
  for (int32_t s = threadIdx.x; s < segments; s += blockDim.x) {
    int32_t most = 0;
    for (int32_t kv = 0; kv < kv_heads; ++kv) most = max(most, stats[s * kv_heads + kv].limit);
    for (int32_t kv = 0; kv < kv_heads; ++kv) stats[s * kv_heads + kv].limit = most;
  }
}

// (query head, query, key) pairs of probes at `stride`.
__device__ unsigned long long ProbePairs(const BatchSeq& seq, const BatchSegment& segment,
                                         int32_t past, int32_t stride, int32_t group) {
  const unsigned long long probes = (segment.rows + stride - 1) / stride;
  const unsigned long long first =
      (unsigned long long)past + segment.index * (unsigned long long)seq.policy.segment + 1;
  return group * (probes * first + stride * (probes * (probes - 1) / 2));
}

// One row of scores, as keys for the choice.
struct RankedBlocks {
  const float* scores;
  int32_t forced_from;  // blocks from here on, and block 0, are forced; INT32_MAX: none

  __device__ __forceinline__ bool forced(int64_t j) const {
    return j >= forced_from || (j == 0 && forced_from != INT32_MAX);
  }
  __device__ __forceinline__ uint32_t operator()(int64_t j) const {
    return OrderedKey(forced(j) ? INFINITY : scores[j]);
  }
};

// How many blocks, at most `limit`, reach the coverage. All threads of the block.
__device__ int32_t EnoughCoverage(const PrefillParams& policy, const RankedBlocks& ranked,
                                  int32_t visible, int32_t limit, int32_t forced,
                                  const RowStat& stat, TopKShared& shared) {
  if (policy.coverage >= 1.0f || limit == 0) return limit;
  int32_t count = int32_t(
      min(int64_t{limit}, (int64_t{policy.coverage_min} + policy.block - 1) / policy.block));
  if (policy.coverage > stat.covered) {
    const bool box = policy.estimator == Estimator::kBox;
    const auto mass = [&](int64_t j) {
      return (unsigned long long)(BlockMass(ranked.scores[j], box, stat) * kFixedPoint);
    };
    const auto target = (unsigned long long)((policy.coverage - stat.covered) * kFixedPoint);
    const Threshold enough = FindMassThreshold(ranked, mass, visible, max(target, 1ull), shared);
    count = max(count, enough.above + enough.ties);
  }
  return min(limit, max(count, forced));
}

__device__ void Record(const SelectLaunch& p, const BatchSeq& seq, const BatchSegment& segment,
                       int32_t kv_head, const RowStat& stat, int32_t count) {
  const PrefillParams& policy = seq.policy;
  const int32_t group = p.shape.heads / p.shape.kv_heads;
  const int64_t head = int64_t{p.layer} * p.shape.kv_heads + kv_head;
  const bool estimated = IsEstimated(seq, segment, p.layer);
  if (seq.counters) {
    const int32_t past = seq.lengths[head].past;
    unsigned long long pairs = 0, boxes = 0;
    if (estimated && policy.estimator == Estimator::kBox) {
      boxes = (unsigned long long)group * VisibleBlocks(seq, segment);
    } else if (estimated) {
      pairs = ProbePairs(seq, segment, past, policy.probe_stride, group);
    }
    const bool shared = estimated && policy.estimator == Estimator::kProbe &&
                        policy.probe_stride == policy.correction;
    if (count >= 0 && policy.correction > 0 && !shared) {
      pairs += ProbePairs(seq, segment, past, policy.correction, group);
    }
    if (pairs) atomicAdd(reinterpret_cast<unsigned long long*>(&seq.counters->pairs), pairs);
    if (boxes) atomicAdd(reinterpret_cast<unsigned long long*>(&seq.counters->box_blocks), boxes);
  }
  if (segment.index >= seq.trace_segments) return;
  const int64_t at = head * seq.trace_segments + segment.index;
  // A rule that stops early has no budget but what it took.
  const bool cut = policy.budget == BudgetRule::kCoverage;
  const float taken = count < 0 ? NAN : float(count) * float(policy.block);
  if (seq.trace_entropy) seq.trace_entropy[at] = estimated ? stat.entropy : NAN;
  if (seq.trace_budget) seq.trace_budget[at] = cut ? taken : stat.budget;
  if (seq.trace_selected) seq.trace_selected[at] = count;
}

// Grid: (kv_heads, count).
__global__ void __launch_bounds__(kTopKThreads) ChooseKernel(SelectLaunch p) {
  __shared__ TopKShared shared;
  const BatchSegment segment = p.segments[p.begin + blockIdx.y];
  const BatchSeq& seq = p.seqs[segment.seq];
  const int32_t kv_head = blockIdx.x;
  const int64_t at = (int64_t{p.begin} + blockIdx.y) * p.shape.kv_heads + kv_head;
  const RowStat stat = p.stats[at];
  int32_t count = -1;
  if (!IsDense(seq, segment, p.layer)) {
    const PrefillParams& policy = seq.policy;
    const int32_t visible = VisibleBlocks(seq, segment),
                  per_segment = policy.segment / policy.block;
    const int32_t limit = min(min(stat.limit, visible), p.lists.capacity);
    RankedBlocks ranked;
    ranked.scores = p.scores + (int64_t{blockIdx.y} * p.shape.kv_heads + kv_head) * p.stride;
    ranked.forced_from = policy.forced ? (segment.index - 1) * per_segment : INT32_MAX;
    count = limit;
    if (policy.budget == BudgetRule::kCoverage && limit > 0) {
      const int32_t forced = policy.forced ? per_segment + (segment.index > 1 ? 1 : 0) : 0;
      count = EnoughCoverage(policy, ranked, visible, limit, forced, stat, shared);
    }
    int32_t* const out = p.lists.blocks + at * p.lists.capacity;
    if (count == visible) {
      for (int32_t j = threadIdx.x; j < count; j += kTopKThreads) out[j] = j;
    } else if (count > 0) {
      const Threshold best = FindThreshold(ranked, visible, count, shared);
      ForChosen(ranked, visible, best, shared,
                [&](int32_t position, int32_t j, uint32_t) { out[position] = j; });
    }
  }
  if (threadIdx.x == 0) {
    p.lists.counts[at] = count;
    Record(p, seq, segment, kv_head, stat, count);
  }
}

}  // namespace

void LaunchBudgets(const SelectLaunch& p, cudaStream_t stream) {
  BudgetKernel<<<unsigned(CeilDiv(p.shape.kv_heads, 32)), 32, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchWholePromptBudgets(const SelectLaunch& p, cudaStream_t stream) {
  WholePromptKernel<<<1, 128, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchChoose(const SelectLaunch& p, cudaStream_t stream) {
  ChooseKernel<<<dim3(unsigned(p.shape.kv_heads), unsigned(p.count)), kTopKThreads, 0, stream>>>(p);
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
