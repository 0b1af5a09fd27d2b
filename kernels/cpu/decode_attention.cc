// Attention of decoding sequences: one query per head over everything cached. A kv head's keys are
// cut into parts of fixed size, one task each, whose results merge in order: the sums depend on the
// sequence's own length only, and a lone sequence still keeps every core busy.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/kv_view.h"

namespace entropyserve::cpu {
namespace {

using simd::F32x16, simd::kLanes;

constexpr int kMaxRun = simd::kRun<bf16_t>;
constexpr int32_t kPartKeys = 512;  // keys of a task
constexpr int kHeads = 4;           // heads of a group that share one pass over the keys
constexpr int kChannels = 64;       // of a value row, summed in one pass

struct Task {
  int32_t decode = 0, kv_head = 0;
  int32_t begin = 0, end = 0;  // keys
  int64_t result = 0;          // index of its part
};

// What one task adds for one head: out = sum of exp2(score - max) * v, not normalised.
struct Part {
  float* out;  // [group, padded_dim]
  float* max;  // [group], units of log2
  float* sum;  // [group]
};

// ---- Scores -------------------------------------------------------------------------------------

// q and the sums over values are laid out in runs (simd.h), zero behind head_dim.

// scores[h, i] = q[h] . key i, for H heads and n keys that lie together.
template <int H, typename T>
ES_INLINE void ScoreHeads(const float* q, int32_t q_stride, const T* keys, int32_t n, int32_t d,
                          float* scores) {
  constexpr int kRunVectors = simd::kRun<T> / kLanes;
  for (int32_t begin = 0; begin < n; begin += kLanes) {
    const int32_t count = std::min(kLanes, n - begin);
    F32x16 dots[H][kLanes];
    for (int32_t i = 0; i < count; ++i) {
      const T* key = keys + int64_t{begin + i} * d;
      F32x16 acc[H];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) acc[h] = F32x16{};
      for (int32_t c = 0; c < d; c += simd::kRun<T>) {
        const simd::Run<T> k =
            c + simd::kRun<T> <= d ? simd::LoadRun(key + c) : simd::LoadRunPart(key + c, d - c);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
          for (int v = 0; v < kRunVectors; ++v) {
            acc[h] += k.v[v] * simd::Load(q + h * q_stride + c + v * kLanes);
          }
        }
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) dots[h][i] = acc[h];
    }
    for (int h = 0; h < H; ++h) {
      for (int32_t i = count; i < kLanes; ++i) dots[h][i] = F32x16{};
      simd::StorePart(scores + h * kPartKeys + begin, simd::SumEach(dots[h]), count);
    }
  }
}

template <typename T>
ES_INLINE void Score(const float* q, int32_t q_stride, int heads, const T* keys, int32_t n,
                     int32_t d, float* scores) {
  switch (heads) {
    case 1:
      return ScoreHeads<1>(q, q_stride, keys, n, d, scores);
    case 2:
      return ScoreHeads<2>(q, q_stride, keys, n, d, scores);
    case 3:
      return ScoreHeads<3>(q, q_stride, keys, n, d, scores);
    default:
      return ScoreHeads<4>(q, q_stride, keys, n, d, scores);
  }
}
ES_SIMD void ScoreF32(const float* q, int32_t q_stride, int heads, const float* keys, int32_t n,
                      int32_t d, float* scores) {
  Score(q, q_stride, heads, keys, n, d, scores);
}
ES_SIMD void ScoreBF16(const float* q, int32_t q_stride, int heads, const bf16_t* keys, int32_t n,
                       int32_t d, float* scores) {
  Score(q, q_stride, heads, keys, n, d, scores);
}

// Replaces n scores by exp2(score * scale - max); returns max and sum.
ES_SIMD void Softmax(float* scores, int32_t n, float scale, float* max, float* sum) {
  const int32_t padded = CeilDiv<int32_t>(n, kLanes) * kLanes;
  for (int32_t i = n; i < padded; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  F32x16 top = simd::Load(scores);
  for (int32_t i = kLanes; i < padded; i += kLanes) top = simd::Max(top, simd::Load(scores + i));
  *max = simd::MaxOf(top) * scale;
  F32x16 total = {};
  for (int32_t i = 0; i < padded; i += kLanes) {
    const F32x16 p = simd::Exp2(simd::Load(scores + i) * scale - *max);
    simd::Store(scores + i, p);
    total += p;
  }
  *sum = simd::Sum(total);
}

// ---- Values -------------------------------------------------------------------------------------

// out[h, R runs] += sum over n keys of probs[h, i] * values[i]; the last run holds `last` numbers.
template <int H, int R, typename T>
ES_INLINE void AddValues(const float* probs, const T* values, int32_t n, int32_t d, int32_t last,
                         float* out, int32_t out_stride) {
  constexpr int kRunVectors = simd::kRun<T> / kLanes, V = R * kRunVectors;
  F32x16 acc[H * V];
#pragma GCC unroll 16
  for (int i = 0; i < H * V; ++i) acc[i] = simd::Load(out + i / V * out_stride + i % V * kLanes);
  for (int32_t i = 0; i < n; ++i) {
    const T* row = values + int64_t{i} * d;
    F32x16 p[H];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) p[h] = simd::Set(probs[h * kPartKeys + i]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const simd::Run<T> run = R > 1 || last == simd::kRun<T>
                                   ? simd::LoadRun(row + r * simd::kRun<T>)
                                   : simd::LoadRunPart(row, last);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
#pragma GCC unroll 2
        for (int v = 0; v < kRunVectors; ++v) acc[h * V + r * kRunVectors + v] += p[h] * run.v[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < H * V; ++i) simd::Store(out + i / V * out_stride + i % V * kLanes, acc[i]);
}

template <int H, typename T>
ES_INLINE void AddHeads(const float* probs, const T* values, int32_t n, int32_t d, float* out,
                        int32_t out_stride) {
  constexpr int kRuns = kChannels / simd::kRun<T>;
  int32_t c = 0;
  for (; c + kChannels <= d; c += kChannels) {
    AddValues<H, kRuns>(probs, values + c, n, d, simd::kRun<T>, out + c, out_stride);
  }
  for (; c < d; c += simd::kRun<T>) {
    AddValues<H, 1>(probs, values + c, n, d, std::min(simd::kRun<T>, d - c), out + c, out_stride);
  }
}

template <typename T>
ES_INLINE void Add(const float* probs, int heads, const T* values, int32_t n, int32_t d, float* out,
                   int32_t out_stride) {
  switch (heads) {
    case 1:
      return AddHeads<1>(probs, values, n, d, out, out_stride);
    case 2:
      return AddHeads<2>(probs, values, n, d, out, out_stride);
    case 3:
      return AddHeads<3>(probs, values, n, d, out, out_stride);
    default:
      return AddHeads<4>(probs, values, n, d, out, out_stride);
  }
}
ES_SIMD void AddF32(const float* probs, int heads, const float* values, int32_t n, int32_t d,
                    float* out, int32_t out_stride) {
  Add(probs, heads, values, n, d, out, out_stride);
}
ES_SIMD void AddBF16(const float* probs, int heads, const bf16_t* values, int32_t n, int32_t d,
                     float* out, int32_t out_stride) {
  Add(probs, heads, values, n, d, out, out_stride);
}

// ---- Tasks --------------------------------------------------------------------------------------

class Decoder {
 public:
  explicit Decoder(const DecodeAttentionParams& p)
      : p_(p),
        d_(p.shape.head_dim),
        group_(p.shape.group()),
        padded_(CeilDiv(d_, kMaxRun) * kMaxRun) {
    for (int32_t i = 0; i < p.batch->num_decodes; ++i) {
      for (int32_t kv = 0; kv < p.shape.kv_heads; ++kv) {
        const int32_t keys = Keys(i, kv);
        for (int32_t begin = 0; begin < keys; begin += kPartKeys) {
          tasks_.push_back(
              {i, kv, begin, std::min(keys, begin + kPartKeys), int64_t(tasks_.size())});
        }
      }
    }
  }

  void Run(Workers& workers) {
    const size_t part_floats = size_t(group_) * size_t(padded_ + 2);
    parts_ = static_cast<float*>(workers.shared.Get(tasks_.size() * part_floats * sizeof(float)));
    workers.pool.ParallelFor(int64_t(tasks_.size()), [&](int64_t i, int thread) {
      RunTask(tasks_[size_t(i)], workers.threads[size_t(thread)].scratch);
    });
    for (size_t first = 0; first < tasks_.size();) {
      size_t last = first + 1;
      while (last < tasks_.size() && tasks_[last].begin != 0) ++last;
      Merge(first, last);
      first = last;
    }
  }

 private:
  const BatchSeq& Seq(int32_t decode) const { return p_.batch->seqs[p_.batch->decodes[decode]]; }
  HeadView View(int32_t decode, int32_t kv_head) const {
    return ViewHead(Seq(decode), p_.shape.kv_heads, p_.layer, kv_head);
  }
  // This step's own token is in the cache already.
  int32_t Keys(int32_t decode, int32_t kv_head) const {
    const HeadView view = View(decode, kv_head);
    return view.past + view.turn + Seq(decode).rows;
  }
  int64_t RowAt(const Task& task, int32_t head) const {
    return (int64_t{Seq(task.decode).row_begin} * p_.shape.heads + task.kv_head * group_ + head) *
           d_;
  }
  Part PartOf(int64_t index) const {
    float* base = parts_ + index * group_ * (padded_ + 2);
    return {base, base + group_ * padded_, base + group_ * (padded_ + 1)};
  }

  void RunTask(const Task& task, Scratch& scratch) {
    Carver count(nullptr);
    count.Take<float>(size_t(group_) * size_t(padded_));
    count.Take<float>(kHeads * kPartKeys);
    Carver carver(scratch.Get(count.used()));
    float* q = carver.Take<float>(size_t(group_) * size_t(padded_));
    float* scores = carver.Take<float>(kHeads * kPartKeys);
    std::fill_n(q, group_ * padded_, 0.0f);
    for (int32_t h = 0; h < group_; ++h) {
      for (int32_t c = 0; c < d_; ++c) q[h * padded_ + Slot(c)] = Query(RowAt(task, h) + c);
    }
    const Part part = PartOf(task.result);
    std::fill_n(part.out, group_ * padded_, 0.0f);
    const float scale = simd::kLog2E / std::sqrt(float(d_));
    for (int32_t h = 0; h < group_; h += kHeads) {
      const int heads = std::min(kHeads, group_ - h);
      ForSpans(task, [&](int32_t at, int64_t row, int32_t n) {
        if (p_.pool.dtype == DType::kF32) {
          ScoreF32(q + h * padded_, padded_, heads, static_cast<const float*>(p_.pool.k) + row * d_,
                   n, d_, scores + at);
        } else {
          ScoreBF16(q + h * padded_, padded_, heads,
                    static_cast<const bf16_t*>(p_.pool.k) + row * d_, n, d_, scores + at);
        }
      });
      for (int i = 0; i < heads; ++i) {
        Softmax(scores + i * kPartKeys, task.end - task.begin, scale, part.max + h + i,
                part.sum + h + i);
      }
      ForSpans(task, [&](int32_t at, int64_t row, int32_t n) {
        float* out = part.out + h * padded_;
        if (p_.pool.dtype == DType::kF32) {
          AddF32(scores + at, heads, static_cast<const float*>(p_.pool.v) + row * d_, n, d_, out,
                 padded_);
        } else {
          AddBF16(scores + at, heads, static_cast<const bf16_t*>(p_.pool.v) + row * d_, n, d_, out,
                  padded_);
        }
      });
    }
  }

  // fn(offset in the task, pool row, count) for runs of keys that lie together.
  template <typename Fn>
  void ForSpans(const Task& task, Fn&& fn) const {
    const HeadView view = View(task.decode, task.kv_head);
    for (int32_t i = task.begin; i < task.end;) {
      const int32_t in_run = i < view.past ? i : i - view.past;
      const int32_t run_end = i < view.past ? view.past : task.end;
      const int32_t n = std::min({task.end - i, run_end - i, kPageTokens - in_run % kPageTokens});
      fn(i - task.begin, view.Row(i), n);
      i += n;
    }
  }

  // Where channel c lies in q and in the sums over values.
  int64_t Slot(int32_t c) const {
    return p_.pool.dtype == DType::kF32 ? simd::RunSlot<float>(c) : simd::RunSlot<bf16_t>(c);
  }
  float Query(int64_t at) const {
    return p_.pool.dtype == DType::kF32 ? static_cast<const float*>(p_.q)[at]
                                        : FromBF16(static_cast<const bf16_t*>(p_.q)[at]);
  }

  // Adds up the parts [first, last) of one (sequence, kv head).
  void Merge(size_t first, size_t last) {
    for (int32_t h = 0; h < group_; ++h) {
      float max = -std::numeric_limits<float>::infinity(), sum = 0;
      for (size_t i = first; i < last; ++i) max = std::max(max, PartOf(tasks_[i].result).max[h]);
      const Part total = PartOf(tasks_[first].result);
      float* out = total.out + h * padded_;
      for (size_t i = first; i < last; ++i) {
        const Part part = PartOf(tasks_[i].result);
        const float weight = std::exp2(part.max[h] - max);
        sum += part.sum[h] * weight;
        const float* x = part.out + h * padded_;
        for (int32_t c = 0; c < padded_; ++c) {
          out[c] = i == first ? x[c] * weight : out[c] + x[c] * weight;
        }
      }
      const int64_t at = RowAt(tasks_[first], h);
      for (int32_t c = 0; c < d_; ++c) {
        if (p_.pool.dtype == DType::kF32) {
          static_cast<float*>(p_.out)[at + c] = out[Slot(c)] / sum;
        } else {
          static_cast<bf16_t*>(p_.out)[at + c] = ToBF16(out[Slot(c)] / sum);
        }
      }
    }
  }

  const DecodeAttentionParams& p_;
  const int32_t d_, group_, padded_;
  std::vector<Task> tasks_;  // a head's parts lie together, in order
  float* parts_ = nullptr;
};

}  // namespace

void DecodeAttention(Workers& workers, const DecodeAttentionParams& p) { Decoder(p).Run(workers); }

size_t DecodeAttentionScratch(const Backend::Limits& limits) {
  // One sequence of the whole context: more together are bounded by the pool, and grow it at need.
  const int64_t parts = CeilDiv<int64_t>(limits.max_context, kPartKeys) + limits.max_seqs;
  const int64_t floats = int64_t{limits.shape.heads} * (limits.shape.head_dim + kMaxRun + 2);
  return size_t(parts * floats) * sizeof(float);
}

}  // namespace entropyserve::cpu
