// Attention of a step's prefill segments: dense, or over the blocks that SelectBlocks chose.
// Blocked over tiles of keys with an online softmax. The tiles, and so the order of every sum,
// follow from the segment and its own lists alone.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/amx_tile.h"
#include "kernels/cpu/key_reader.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/softmax_tile.h"
#include "kernels/kv_view.h"

namespace entropyserve::cpu {
namespace {

// Keys of a tile. Scores of kMaxTileRows x kTileKeys (f32 and bf16) stay in a core's L2.
constexpr int32_t kTileKeys = 256;
constexpr int32_t kMaxTileRows = 384;  // (query, head of the group) pairs
constexpr int32_t kMaxTileQueries = 128;
// oneDNN compiles a product per shape: sides are padded to these so that few shapes occur.
constexpr int32_t kPadRows = kAmxRows;
constexpr int32_t kPadKeys = 64;

int32_t RoundUp(int32_t n, int32_t to) { return CeilDiv(n, to) * to; }

// Queries that are handled together: a power of two, so that it divides every segment, and a
// multiple of kPadRows, so that only a segment's last rows are padded.
int32_t TileQueries(const AttentionShape& shape) {
  int32_t queries = kMaxTileQueries;
  while (queries > kPadRows && queries * shape.group() > kMaxTileRows) queries /= 2;
  return queries;
}

int32_t CorrectionStride(const PrefillParams& policy, int32_t count) {
  return count >= 0 ? policy.correction : 0;
}

// Some queries of one segment with one kv head's keys.
struct Task {
  int32_t segment = 0, kv_head = 0;
  int32_t begin = 0, end = 0;  // queries, offsets in the segment
  int64_t cost = 0;            // keys to read times queries
};

// The pieces of one thread's scratch.
struct Buffers {
  std::byte *q, *k, *v;         // [rows, d], [kTileKeys, d] of the pool's type
  bf16_t *packed_k, *packed_v;  // k and v as AMX wants them
  float* scores;                // [tile rows, kTileKeys]; or AMX's scratch
  bf16_t* probs;                // [tile rows, kTileKeys]
  float *out, *max, *sum;       // [rows, d], [rows], [rows]
  float* delta;                 // [group, d]

  Buffers(Carver& carver, const AttentionShape& shape, DType dtype, bool amx, int32_t queries) {
    const size_t d = size_t(shape.head_dim), item = SizeOf(dtype);
    const size_t tile_rows = size_t(RoundUp(TileQueries(shape) * shape.group(), kPadRows));
    const size_t rows = size_t(RoundUp(queries * shape.group(), kPadRows)) + kPadRows;
    q = carver.Take<std::byte>(rows * d * item);
    k = carver.Take<std::byte>(kTileKeys * d * item);
    v = carver.Take<std::byte>(kTileKeys * d * item);
    scores = carver.Take<float>(amx ? size_t(AmxScratch(kTileKeys)) : tile_rows * kTileKeys);
    probs = carver.Take<bf16_t>(!amx && dtype == DType::kBF16 ? tile_rows * kTileKeys : 0);
    packed_k = carver.Take<bf16_t>(amx ? kTileKeys * d : 0);
    packed_v = carver.Take<bf16_t>(amx ? kTileKeys * d : 0);
    out = carver.Take<float>(rows * d);
    max = carver.Take<float>(rows);
    sum = carver.Take<float>(rows);
    delta = carver.Take<float>(size_t(shape.group()) * d);
  }
};

class TaskRunner {
 public:
  TaskRunner(const PrefillAttentionParams& p, const Task& task, bool amx,
             Workers::PerThread& thread)
      : p_(p),
        task_(task),
        segment_(p.batch->segments[task.segment]),
        seq_(p.batch->seqs[segment_.seq]),
        view_(ViewHead(seq_, p.shape.kv_heads, p.layer, task.kv_head)),
        count_(p.lists.counts[int64_t{task.segment} * p.shape.kv_heads + task.kv_head]),
        keys_(view_, count_ >= 0 ? Blocks() : nullptr, std::max(count_, 0), seq_.policy.block,
              segment_.index * seq_.policy.segment),
        d_(p.shape.head_dim),
        group_(p.shape.group()),
        item_(SizeOf(p.pool.dtype)),
        amx_(amx),
        matmul_(thread.matmul),
        buffers_(MakeBuffers(thread)) {}

  void Run() {
    if (amx_) AmxBegin();
    LoadQueries();
    // The last query's keys; keys are read once for all queries of the task.
    const int32_t total = keys_.prior() + task_.end;
    for (int32_t begin = 0; begin < total; begin += kTileKeys) {
      const int32_t keys = std::min(kTileKeys, total - begin);
      Gather(keys);
      const int32_t step = TileQueries(p_.shape);
      for (int32_t query = task_.begin; query < task_.end; query += step) {
        RunTile(begin, keys, query, std::min(step, task_.end - query));
      }
    }
    Finish();
    if (amx_) AmxEnd();
  }

 private:
  const int32_t* Blocks() const {
    return p_.lists.blocks +
           (int64_t{task_.segment} * p_.shape.kv_heads + task_.kv_head) * p_.lists.capacity;
  }

  Buffers MakeBuffers(Workers::PerThread& thread) const {
    Carver count(nullptr);
    Buffers(count, p_.shape, p_.pool.dtype, amx_, task_.end - task_.begin);
    Carver carver(thread.scratch.Get(count.used()));
    return Buffers(carver, p_.shape, p_.pool.dtype, amx_, task_.end - task_.begin);
  }

  // Row (query, head of the group) of the stacked queries; a query's heads lie together.
  int64_t QueryAt(int32_t query) const {
    return (int64_t{segment_.row_begin + query} * p_.shape.heads + task_.kv_head * group_) * d_;
  }

  void LoadQueries() {
    const int32_t rows = (task_.end - task_.begin) * group_;
    const size_t bytes = size_t(group_ * d_) * item_;
    for (int32_t i = task_.begin; i < task_.end; ++i) {
      std::memcpy(buffers_.q + size_t(i - task_.begin) * bytes,
                  static_cast<const std::byte*>(p_.q) + size_t(QueryAt(i)) * item_, bytes);
    }
    std::memset(buffers_.q + size_t(rows * d_) * item_, 0, size_t(kPadRows * d_) * item_);
    const int32_t padded = rows + kPadRows;
    std::fill_n(buffers_.max, padded, -std::numeric_limits<float>::infinity());
    std::fill_n(buffers_.sum, padded, 0.0f);
    std::fill_n(buffers_.out, int64_t{padded} * d_, 0.0f);
  }

  void Gather(int32_t keys) {
    const size_t row_bytes = size_t(d_) * item_;
    for (int32_t done = 0; done < keys;) {
      const KeyReader::Span span = keys_.Next(keys - done);
      const size_t from = size_t(span.row) * row_bytes, to = size_t(done) * row_bytes;
      const size_t bytes = size_t(span.count) * row_bytes;
      std::memcpy(buffers_.k + to, static_cast<const std::byte*>(p_.pool.k) + from, bytes);
      std::memcpy(buffers_.v + to, static_cast<const std::byte*>(p_.pool.v) + from, bytes);
      done += span.count;
    }
    // Padding has probability 0, which must meet finite values.
    const size_t pad = size_t(RoundUp(keys, kPadKeys) - keys) * row_bytes;
    std::memset(buffers_.k + size_t(keys) * row_bytes, 0, pad);
    std::memset(buffers_.v + size_t(keys) * row_bytes, 0, pad);
    if (amx_) {
      AmxPack(reinterpret_cast<const bf16_t*>(buffers_.k),
              reinterpret_cast<const bf16_t*>(buffers_.v), RoundUp(keys, kAmxKeys), d_,
              buffers_.packed_k, buffers_.packed_v);
    }
  }

  // Keys [key, key + keys) of the list, in the buffers, with queries [query, query + queries).
  void RunTile(int32_t key, int32_t keys, int32_t query, int32_t queries) {
    const int32_t first_visible = keys_.prior() + query + 1 - key;
    if (first_visible + queries - 1 <= 0) return;  // none of these queries is that far
    if (amx_) {
      RunAmx(keys, query, queries, std::min(first_visible, keys));
    } else {
      RunPortable(keys, query, queries, std::min(first_visible, keys));
    }
  }

  void RunAmx(int32_t keys, int32_t query, int32_t queries, int32_t first_visible) {
    const int64_t row = int64_t{query - task_.begin} * group_;
    AmxTile tile;
    tile.q = reinterpret_cast<const bf16_t*>(buffers_.q) + row * d_;
    tile.k = buffers_.packed_k, tile.v = buffers_.packed_v, tile.scratch = buffers_.scores;
    tile.max = buffers_.max + row, tile.sum = buffers_.sum + row;
    tile.out = buffers_.out + row * d_;
    tile.rows = queries * group_, tile.keys = keys, tile.cols = RoundUp(keys, kAmxKeys);
    tile.head_dim = d_, tile.group = group_, tile.first_visible = first_visible;
    tile.scale = Scale();
    RunAmxTile(tile);
  }

  void RunPortable(int32_t keys, int32_t query, int32_t queries, int32_t first_visible) {
    const int64_t row = int64_t{query - task_.begin} * group_;
    const int32_t rows = queries * group_, padded_rows = RoundUp(rows, kPadRows);
    const int32_t cols = RoundUp(keys, kPadKeys);
    const bool bf16 = p_.pool.dtype == DType::kBF16;
    MatmulShape scores;
    scores.m = padded_rows, scores.n = cols, scores.k = d_;
    scores.lda = scores.ldb = d_, scores.ldc = cols;
    scores.in = p_.pool.dtype;
    scores.b_transposed = true;
    matmul_.Run(scores, buffers_.q + size_t(row * d_) * item_, buffers_.k, buffers_.scores);

    SoftmaxTile tile;
    tile.scores = buffers_.scores, tile.probs = bf16 ? buffers_.probs : nullptr;
    tile.max = buffers_.max + row, tile.sum = buffers_.sum + row;
    tile.out = buffers_.out + row * d_;
    tile.rows = rows, tile.cols = cols, tile.keys = keys;
    tile.head_dim = d_, tile.group = group_, tile.first_visible = first_visible;
    tile.scale = Scale();
    RunSoftmaxTile(tile);

    MatmulShape values;
    values.m = padded_rows, values.n = d_, values.k = cols;
    values.lda = cols, values.ldb = values.ldc = d_;
    values.in = p_.pool.dtype;
    values.accumulate = true;
    matmul_.Run(values, bf16 ? static_cast<void*>(buffers_.probs) : buffers_.scores, buffers_.v,
                buffers_.out + row * d_);
  }

  // Of scores, in units of log2.
  float Scale() const { return 1.44269504f / std::sqrt(float(d_)); }

  void Finish() {
    const int32_t stride = CorrectionStride(seq_.policy, count_);
    const int32_t n = group_ * d_;
    for (int32_t i = task_.begin; i < task_.end; ++i) {
      const int64_t row = int64_t{i - task_.begin} * group_;
      float* out = buffers_.out + row * d_;
      for (int32_t h = 0; h < group_; ++h) {
        const float norm = 1.0f / buffers_.sum[row + h];
        for (int32_t c = 0; c < d_; ++c) out[h * d_ + c] *= norm;
      }
      if (stride > 0) {
        if (i % stride == 0) {
          const float* exact = p_.probe_out + QueryAt(i);
          for (int32_t c = 0; c < n; ++c) buffers_.delta[c] = exact[c] - out[c];
        }
        for (int32_t c = 0; c < n; ++c) out[c] += buffers_.delta[c];
      }
      StoreRow(out, QueryAt(i), n);
    }
  }

  void StoreRow(const float* x, int64_t at, int32_t n) {
    if (p_.pool.dtype == DType::kF32) {
      std::memcpy(static_cast<float*>(p_.out) + at, x, size_t(n) * sizeof(float));
    } else {
      bf16_t* out = static_cast<bf16_t*>(p_.out) + at;
      for (int32_t c = 0; c < n; ++c) out[c] = ToBF16(x[c]);
    }
  }

  const PrefillAttentionParams& p_;
  const Task& task_;
  const BatchSegment& segment_;
  const BatchSeq& seq_;
  const HeadView view_;
  const int32_t count_;
  KeyReader keys_;
  const int32_t d_, group_;
  const size_t item_;
  const bool amx_;
  Matmul& matmul_;
  const Buffers buffers_;
};

// Adds a segment's work to its sequence's counters and its tasks to the list.
void AddSegment(const PrefillAttentionParams& p, int32_t index, std::vector<Task>& tasks) {
  const BatchSegment& segment = p.batch->segments[index];
  const BatchSeq& seq = p.batch->seqs[segment.seq];
  const int64_t rows = segment.rows;
  for (int32_t kv = 0; kv < p.shape.kv_heads; ++kv) {
    const int32_t count = p.lists.counts[int64_t{index} * p.shape.kv_heads + kv];
    const HeadView view = ViewHead(seq, p.shape.kv_heads, p.layer, kv);
    const int64_t prior = view.past + (count >= 0 ? int64_t{count} * seq.policy.block
                                                  : int64_t{segment.index} * seq.policy.segment);
    if (seq.counters) {
      seq.counters->pairs +=
          uint64_t(rows * prior + rows * (rows + 1) / 2) * uint64_t(p.shape.group());
    }
    // A probe and the queries that it corrects belong to one task.
    const int32_t step = std::max(TileQueries(p.shape), CorrectionStride(seq.policy, count));
    for (int32_t begin = 0; begin < segment.rows; begin += step) {
      const int32_t end = std::min(segment.rows, begin + step);
      tasks.push_back({index, kv, begin, end, (prior + end) * (end - begin)});
    }
  }
}

}  // namespace

void PrefillAttention(Workers& workers, const PrefillAttentionParams& p) {
  std::vector<Task> tasks;
  for (int32_t i = 0; i < p.batch->num_segments; ++i) AddSegment(p, i, tasks);
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const bool amx = AmxSupports(workers.features, p.pool.dtype, p.shape.head_dim);
  workers.pool.ParallelFor(int64_t(tasks.size()), [&](int64_t i, int thread) {
    TaskRunner(p, tasks[size_t(i)], amx, workers.threads[size_t(thread)]).Run();
  });
}

size_t PrefillAttentionScratch(const AttentionShape& shape) {
  constexpr int32_t kMaxStride = 1024;  // the largest segment
  Carver count(nullptr);
  Buffers(count, shape, DType::kF32, false, kMaxStride);
  return count.used();
}

}  // namespace entropyserve::cpu
