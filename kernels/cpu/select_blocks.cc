// SelectBlocks: runs the parts of each sequence's policy over the segments of a batch
// (ARCHITECTURE.md, "The method").
//
// Segments are worked on in waves, small enough that their scores fit a bounded scratch. A wave has
// three steps: estimates, in parallel over (segment, kv head); budgets, in order, because a rule
// may carry state from segment to segment; lists, in parallel again.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/select.h"
#include "kernels/cpu/select_internal.h"
#include "kernels/cpu/workers.h"

namespace entropyserve::cpu {
namespace {

constexpr int64_t kMaxWaveFloats = int64_t{4} << 20;  // 16 MiB of scores and masses at a time
constexpr float kNone = std::numeric_limits<float>::quiet_NaN();

// One (segment, kv head) of a wave.
struct Item {
  SegmentHead at;
  bool sparse = false;       // its blocks are chosen
  bool estimate = false;     // its estimator runs
  bool probes_done = false;  // which wrote the correction's outputs on the way
  Estimate result;
  float budget = kNone;  // tokens
  int32_t limit = 0;     // blocks
};

class BlockSelection {
 public:
  BlockSelection(Workers& workers, const SelectParams& op, SelectCapture* capture)
      : workers_(workers), op_(op), capture_(capture), scratch_(workers.threads.size()) {}

  void Run() {
    const Batch& batch = *op_.batch;
    if (capture_) {
      const size_t items = size_t(batch.num_segments) * op_.shape.kv_heads;
      capture_->p.assign(items * capture_->columns, 0.0f);
      capture_->score.assign(items * capture_->columns, 0.0f);
      capture_->entropy.assign(items, kNone);
    }
    for (int32_t begin = 0; begin < batch.num_segments;) {
      const int32_t end = WaveEnd(begin);
      RunWave(begin, end);
      begin = end;
    }
  }

 private:
  const BatchSeq& Seq(const BatchSegment& segment) const { return op_.batch->seqs[segment.seq]; }

  static int32_t Visible(const BatchSeq& seq, const BatchSegment& segment) {
    return segment.index * (seq.policy.segment / seq.policy.block);
  }

  // Whether anything is estimated on this layer for the sequence.
  bool Acts(const BatchSeq& seq) const {
    return !seq.policy.full && op_.layer >= seq.policy.first_sparse_layer;
  }

  // A whole-prompt sequence stays in one wave: its budgets depend on all of its segments.
  int32_t WaveEnd(int32_t begin) const {
    const Batch& batch = *op_.batch;
    int64_t floats = 0;
    int32_t end = begin;
    while (end < batch.num_segments) {
      const BatchSegment& segment = batch.segments[end];
      floats += int64_t{2} * Visible(Seq(segment), segment) * op_.shape.kv_heads;
      const bool joined = Seq(segment).policy.whole_prompt && segment.index > 0;
      if (floats > kMaxWaveFloats && end > begin && !joined) break;
      ++end;
    }
    return end;
  }

  void RunWave(int32_t begin, int32_t end) {
    MakeItems(begin, end);
    const int64_t n = int64_t(items_.size());
    // Backwards: later segments see more.
    workers_.pool.ParallelFor(
        n, [&](int64_t i, int thread) { EstimateItem(items_[n - 1 - i], thread); });
    for (int32_t i = begin; i < end;) i = SetBudgets(begin, i);
    workers_.pool.ParallelFor(n, [&](int64_t i, int thread) { WriteList(items_[i], thread); });
    for (const Item& item : items_) Record(item);
  }

  void MakeItems(int32_t begin, int32_t end) {
    items_.clear();
    int64_t floats = 0;
    for (int32_t i = begin; i < end; ++i) {
      const BatchSegment& segment = op_.batch->segments[i];
      const BatchSeq& seq = Seq(segment);
      for (int32_t kv = 0; kv < op_.shape.kv_heads; ++kv) {
        Item item;
        item.at = {&op_,     &seq,
                   &segment, ViewHead(seq, op_.shape.kv_heads, op_.layer, kv),
                   kv,       Visible(seq, segment)};
        item.sparse = !IsDense(seq, segment, op_.layer);
        const bool remembered = seq.policy.whole_prompt || (Part(seq.policy.budget).every_segment &&
                                                            segment.rows == seq.policy.segment);
        item.estimate = Acts(seq) && item.at.visible > 0 && (item.sparse || remembered);
        if (item.estimate) floats += item.at.visible;
        items_.push_back(item);
      }
    }
    scores_.resize(floats);
    masses_.resize(floats);
    size_t offset = 0;
    for (Item& item : items_) {
      if (!item.estimate) continue;
      item.result.score = {scores_.data() + offset, size_t(item.at.visible)};
      item.result.p = {masses_.data() + offset, size_t(item.at.visible)};
      offset += item.at.visible;
    }
  }

  void EstimateItem(Item& item, int thread) {
    const PrefillParams& policy = item.at.seq->policy;
    if (item.estimate) {
      Part(policy.estimator)
          .run(item.at, workers_.threads[thread].matmul, scratch_[thread], &item.result,
               &item.probes_done);
    }
    if (item.sparse && policy.correction > 0 && !item.probes_done) {
      RunProbes(item.at, policy.correction, /*write_out=*/true, workers_.threads[thread].matmul,
                scratch_[thread], nullptr);
    }
  }

  // Budgets of segment i's heads, or of the whole sequence; returns the next segment.
  int32_t SetBudgets(int32_t begin, int32_t i) {
    const BatchSegment& segment = op_.batch->segments[i];
    const BatchSeq& seq = Seq(segment);
    const int32_t kv_heads = op_.shape.kv_heads;
    Item* items = items_.data() + int64_t{i - begin} * kv_heads;
    if (!Acts(seq)) return i + 1;
    if (seq.policy.whole_prompt) {
      return i + SetWholePromptBudgets(seq, items);
    }
    for (int32_t kv = 0; kv < kv_heads; ++kv) Advance(items[kv]);
    return i + 1;
  }

  HeadState& State(const Item& item) const {
    return item.at.seq->states[int64_t{op_.layer} * op_.shape.kv_heads + item.at.kv_head];
  }

  // A ragged last segment reads by the budget of the segment before and leaves the state alone.
  void Advance(Item& item) {
    const PrefillParams& policy = item.at.seq->policy;
    const int32_t s = item.at.segment->index;
    HeadState& state = State(item);
    if (item.at.segment->rows == policy.segment) {
      const float entropy = item.result.entropy;
      if (item.estimate && entropy >= policy.e_t) state.not_rigid = 1;
      state.budget = Part(policy.budget).tokens(policy, s, entropy, state, state.not_rigid != 0);
      state.entropy = entropy;
      state.segments = s + 1;
    }
    item.budget = state.budget;
    item.limit = int32_t(std::min(state.budget / float(policy.block), float(item.at.visible)));
  }

  int32_t SetWholePromptBudgets(const BatchSeq& seq, Item* items) {
    const PrefillParams& policy = seq.policy;
    const int32_t kv_heads = op_.shape.kv_heads;
    const int32_t segments = CeilDiv(seq.turn_total, policy.segment);
    Check(seq.rows == seq.turn_total, "a whole-prompt policy runs in one chunk");
    std::vector<float> entropy(int64_t{kv_heads} * segments);
    std::vector<float> budgets(entropy.size());
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      for (int32_t s = 0; s < segments; ++s) {
        Item& item = items[int64_t{s} * kv_heads + kv];
        if (s == 0) SetUniform(policy, segments, item);
        entropy[int64_t{kv} * segments + s] = item.result.entropy;
      }
    }
    const std::vector<int32_t> counts =
        WholePromptBlocks(policy, seq.turn_total, kv_heads, entropy, budgets);
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      HeadState& state = State(items[kv]);
      for (int32_t s = 0; s < segments; ++s) {
        Item& item = items[int64_t{s} * kv_heads + kv];
        item.budget = budgets[int64_t{kv} * segments + s];
        item.limit = counts[s];
        if (s > 0 && item.result.entropy >= policy.e_t) state.not_rigid = 1;
      }
      state.entropy = items[int64_t{segments - 1} * kv_heads + kv].result.entropy;
      state.budget = budgets[int64_t{kv + 1} * segments - 1];
      state.segments = segments;
    }
    return segments;
  }

  // In the released code segment 0, which sees no block, has a uniform p over all of them.
  void SetUniform(const PrefillParams& policy, int32_t segments, Item& item) {
    const int64_t blocks = int64_t{segments - 1} * (policy.segment / policy.block);
    const std::vector<float> uniform(blocks, 1.0f / float(std::max<int64_t>(blocks, 1)));
    item.result.entropy = Entropy(uniform);
    if (capture_) Capture(item, uniform);
  }

  void WriteList(Item& item, int thread) {
    const BatchSegment& segment = *item.at.segment;
    const int64_t at =
        (&segment - op_.batch->segments) * int64_t{op_.shape.kv_heads} + item.at.kv_head;
    op_.lists.counts[at] = -1;
    if (capture_ && item.estimate) Capture(item, item.result.p);
    if (!item.sparse) return;
    const PrefillParams& policy = item.at.seq->policy;
    const std::span<const int32_t> blocks =
        ChooseBlocks(policy, segment.index, item.result, item.limit, scratch_[thread].order);
    Check(blocks.size() <= size_t(op_.lists.capacity), "a block list has room for its budget");
    std::copy(blocks.begin(), blocks.end(), op_.lists.blocks + at * op_.lists.capacity);
    op_.lists.counts[at] = int32_t(blocks.size());
  }

  void Capture(const Item& item, std::span<const float> p) const {
    const int64_t at =
        (item.at.segment - op_.batch->segments) * int64_t{op_.shape.kv_heads} + item.at.kv_head;
    const size_t n = std::min(p.size(), size_t(capture_->columns));
    std::copy_n(p.begin(), n, capture_->p.begin() + at * capture_->columns);
    std::copy_n(item.result.score.begin(), std::min(n, item.result.score.size()),
                capture_->score.begin() + at * capture_->columns);
    capture_->entropy[at] = item.result.entropy;
  }

  // Counters and trace of one item. On the calling thread: the kv heads share their sequence's.
  void Record(const Item& item) const {
    const BatchSeq& seq = *item.at.seq;
    const PrefillParams& policy = seq.policy;
    const int32_t group = op_.shape.group();
    if (seq.counters) {
      if (item.estimate) Part(policy.estimator).count(item.at, group, seq.counters);
      if (item.sparse && policy.correction > 0 && !item.probes_done) {
        seq.counters->pairs += ProbePairs(item.at, policy.correction, group);
      }
    }
    const int32_t s = item.at.segment->index;
    if (s >= seq.trace_segments) return;
    const int64_t head = int64_t{op_.layer} * op_.shape.kv_heads + item.at.kv_head;
    const int64_t at = head * seq.trace_segments + s;
    const int64_t list =
        (item.at.segment - op_.batch->segments) * int64_t{op_.shape.kv_heads} + item.at.kv_head;
    const int32_t count = op_.lists.counts[list];
    // A rule that stops early has no budget but what it took.
    const bool cut = Part(policy.budget).enough != nullptr;
    const float taken = count < 0 ? kNone : float(count) * float(policy.block);
    if (seq.trace_entropy) seq.trace_entropy[at] = item.estimate ? item.result.entropy : kNone;
    if (seq.trace_budget) seq.trace_budget[at] = cut ? taken : item.budget;
    if (seq.trace_selected) seq.trace_selected[at] = count;
  }

  Workers& workers_;
  const SelectParams& op_;
  SelectCapture* capture_;
  std::vector<SelectScratch> scratch_;  // one per thread
  std::vector<Item> items_;             // of the wave, kv heads of a segment together
  std::vector<float> scores_, masses_;  // of the wave
};

}  // namespace

void SelectBlocks(Workers& workers, const SelectParams& p, SelectCapture* capture) {
  BlockSelection(workers, p, capture).Run();
}

void SelectBlocks(Workers& workers, const SelectParams& p) { SelectBlocks(workers, p, nullptr); }

}  // namespace entropyserve::cpu
