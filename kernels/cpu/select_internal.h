// What the files of SelectBlocks and SelectTokens share, and a way for tests to look inside.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cpu/matmul.h"
#include "kernels/kv_view.h"

namespace entropyserve::cpu {

struct Workers;

// ---- Exact attention of a few queries
// ------------------------------------------------------------

// Queries of one kv head's group against that head's cache. Tokens are counted over both runs, past
// run first. A range of keys may be cut into bins of equal size, whose attention mass is wanted.
struct ExactQueries {
  HeadView head;
  const KvPool* pool = nullptr;
  int32_t rows = 0;
  const void* q = nullptr;          // [rows, head_dim] of the pool's type
  const int32_t* limits = nullptr;  // [rows] a row sees tokens [0, limit); ascending, each >= 1
  int32_t bin_begin = 0;            // first token of bin 0
  int32_t bins = 0;
  int32_t bin_size = 1;  // tokens
};

struct ExactResult {
  float* mass = nullptr;  // [bins] attention mass, mean over the rows; null: not wanted
  float covered = 0;      // mass outside the bins, mean over the rows; with `mass` only
  float* out = nullptr;   // [rows, head_dim] attention output; null: not wanted
};

struct AttendScratch {
  std::vector<std::byte> keys;  // of the pool's type
  std::vector<float> values, scores, out, bin_mass, tile_max, row_max, row_sum, row_covered;
};

// Sums, softmax, values and outputs in fp32 (products of bf16 numbers are exact there). Memory:
// about 16 MiB of scratch, or one row's bins where that is more.
void AttendExactly(const ExactQueries& in, Matmul& matmul, AttendScratch& scratch,
                   ExactResult* result);

// Calls copy(row, n) for each of the page rows [row, row + n) that hold tokens [begin, end) of one
// head, in order.
template <typename Copy>
void ForRows(const HeadView& head, int32_t begin, int32_t end, Copy&& copy) {
  while (begin < end) {
    const bool in_past = begin < head.past;
    const int32_t in_run = in_past ? begin : begin - head.past;
    const int32_t run_end = in_past ? std::min(head.past, end) : end;
    const int32_t n = std::min(run_end - begin, kPageTokens - in_run % kPageTokens);
    copy(head.Row(begin), n);
    begin += n;
  }
}

// Copies n vectors, in consecutive rows of one half of the pool (or of any array of its type), as
// floats.
void LoadVectors(const KvPool& pool, const void* half, int64_t row, int64_t n, float* dst);
// The same as they are. Returns the end of what was written.
std::byte* CopyVectors(const KvPool& pool, const void* half, int64_t row, int64_t n,
                       std::byte* dst);

// ---- Estimators: what a segment would look at
// ----------------------------------------------------

// One segment and one kv head of a SelectBlocks call.
struct SegmentHead {
  const SelectParams* op = nullptr;
  const BatchSeq* seq = nullptr;
  const BatchSegment* segment = nullptr;
  HeadView head;
  int32_t kv_head = 0;
  int32_t visible = 0;  // blocks of strictly earlier segments

  int32_t begin() const { return segment->index * seq->policy.segment; }  // turn token
};

struct Estimate {
  std::span<float> score;  // [visible] ranks the blocks
  std::span<float> p;      // [visible] attention mass; box: sums to 1; probe: with `covered` to 1
  float covered = 0;       // mass that is read in any case: own segment, past run
  float entropy = 0;       // nats, of p / sum(p)
};

struct SelectScratch {
  AttendScratch attend;
  std::vector<std::byte> queries;  // of the pool's type
  std::vector<float> center, bounds_max, bounds_min, dot_max, dot_min, out;
  std::vector<int32_t> limits, order;
};

struct EstimatorPart {
  // Fills *estimate. `probes_done` tells that the correction's outputs were written on the way.
  void (*run)(const SegmentHead& item, Matmul& matmul, SelectScratch& scratch, Estimate* estimate,
              bool* probes_done);
  // Adds what run() costs one kv head's group.
  void (*count)(const SegmentHead& item, int32_t group, SeqCounters* counters);
};

const EstimatorPart& Part(Estimator estimator);

// Exact attention of the queries at offsets 0, stride, 2*stride... of the segment. Writes the
// probes' rows of op->probe_out when write_out; fills *estimate (mass per visible block) unless it
// is null.
void RunProbes(const SegmentHead& item, int32_t stride, bool write_out, Matmul& matmul,
               SelectScratch& scratch, Estimate* estimate);
// (query head, query, key) pairs of RunProbes.
uint64_t ProbePairs(const SegmentHead& item, int32_t stride, int32_t group);

// -sum p*log(p + 1e-9) of p scaled to sum 1; 0 where it has no mass.
float Entropy(std::span<const float> p);

// ---- Budget rules: how many blocks a segment may read
// --------------------------------------------

struct BudgetPart {
  // Whether the rule has a memory, so that dense segments are estimated too.
  bool every_segment;
  // Tokens that segment s may read at most. `last` is the state after segment s - 1; not_rigid is
  // already up to date with `entropy`, segment s's.
  float (*tokens)(const PrefillParams& policy, int32_t s, float entropy, const HeadState& last,
                  bool not_rigid);
  // Null, or shortens a list ranked best first: how many of its blocks are enough.
  int32_t (*enough)(const PrefillParams& policy, const Estimate& estimate,
                    std::span<const int32_t> ranked);
};

const BudgetPart& Part(BudgetRule rule);

// Whether block j is read by every sparse segment s under the policy's forced part.
bool IsForced(const PrefillParams& policy, int32_t s, int32_t j);

// Segment s's blocks, ascending: forced ones first, then by score, ties to the earlier block, at
// most `limit`. The result lies in `order`; forced scores are overwritten.
std::span<const int32_t> ChooseBlocks(const PrefillParams& policy, int32_t s,
                                      const Estimate& estimate, int32_t limit,
                                      std::vector<int32_t>& order);

// The released code's rule over a whole prompt of n tokens: blocks of each segment, the same for
// all heads. entropy: [kv_heads, segments]; budgets: the same, tokens, written.
std::vector<int32_t> WholePromptBlocks(const PrefillParams& policy, int64_t n, int32_t kv_heads,
                                       std::span<const float> entropy, std::span<float> budgets);

// ---- For tests
// ------------------------------------------------------------------------------------

// Filled by SelectBlocks for the segments of its batch.
struct SelectCapture {
  int32_t columns = 0;         // of p and score
  std::vector<float> p;        // [segments, kv_heads, columns]; 0 where nothing was estimated
  std::vector<float> score;    // the same: what ranks the blocks
  std::vector<float> entropy;  // [segments, kv_heads]; NaN where nothing was estimated
};

void SelectBlocks(Workers& workers, const SelectParams& p, SelectCapture* capture);

}  // namespace entropyserve::cpu
