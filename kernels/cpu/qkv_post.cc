// Per-head q/k norm, RoPE and everything that a step writes to the cache (ARCHITECTURE.md, "KV
// cache").
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/kv_view.h"

namespace entropyserve::cpu {
namespace {

using simd::kLanes;

// Largest head_dim, a multiple of kLanes: bounds the buffers on the stack.
constexpr int kMaxHeadDim = 512;

// Rows of one sequence whose turn tokens lie in one page: no block of keys and no page is shared
// between two tasks.
struct Task {
  int32_t seq = 0;
  int32_t begin = 0, end = 0;  // tokens of this step, counted from the sequence's first row
};

std::vector<Task> MakeTasks(const Batch& batch, const AttentionShape& shape, int32_t layer) {
  std::vector<Task> tasks;
  for (int32_t s = 0; s < batch.num_seqs; ++s) {
    const BatchSeq& seq = batch.seqs[s];
    // A prefill's heads all hold the same number of turn tokens. Decoding heads may differ, one row
    // each.
    const int32_t turn = ViewHead(seq, shape.kv_heads, layer, 0).turn;
    for (int32_t begin = 0; begin < seq.rows;) {
      const int32_t end =
          std::min(seq.rows, (turn + begin) / kPageTokens * kPageTokens + kPageTokens - turn);
      tasks.push_back({s, begin, end});
      begin = end;
    }
  }
  return tasks;
}

// A head as floats lies in a buffer of kMaxHeadDim: a last, partial vector may be written whole.

ES_SIMD void WidenHead(const bf16_t* x, int32_t n, float* out) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) simd::Store(out + i, simd::Load(x + i));
  if (i < n) simd::Store(out + i, simd::LoadPart(x + i, n - i));
}
ES_SIMD void NarrowHead(const float* x, int32_t n, bf16_t* out) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) simd::Store(out + i, simd::Load(x + i));
  if (i < n) simd::StorePart(out + i, simd::Load(x + i), n - i);
}

void LoadHead(const void* src, DType dtype, int64_t offset, int32_t n, float* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, static_cast<const float*>(src) + offset, size_t(n) * sizeof(float));
  } else {
    WidenHead(static_cast<const bf16_t*>(src) + offset, n, out);
  }
}

void StoreHead(void* dst, DType dtype, int64_t offset, int32_t n, const float* x) {
  if (dtype == DType::kF32) {
    std::memcpy(static_cast<float*>(dst) + offset, x, size_t(n) * sizeof(float));
  } else {
    NarrowHead(x, n, static_cast<bf16_t*>(dst) + offset);
  }
}

void CopyHead(void* dst, int64_t to, const void* src, int64_t from, DType dtype, int32_t n) {
  const size_t bytes = size_t(n) * SizeOf(dtype);
  std::memcpy(static_cast<std::byte*>(dst) + size_t(to) * SizeOf(dtype),
              static_cast<const std::byte*>(src) + size_t(from) * SizeOf(dtype), bytes);
}

void NormHead(float* x, const float* weight, int32_t n, float eps) {
  float squares = 0;
  for (int32_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / float(n) + eps);
  for (int32_t i = 0; i < n; ++i) x[i] = x[i] * scale * weight[i];
}

ES_SIMD void Rotate(float* x, const float* cos, const float* sin, int32_t n) {
  const int32_t half = n / 2;
  int32_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const simd::F32x16 a = simd::Load(x + i), b = simd::Load(x + i + half);
    const simd::F32x16 c = simd::Load(cos + i), s = simd::Load(sin + i);
    simd::Store(x + i, a * c - b * s);
    simd::Store(x + i + half, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// Widens the bounds row by one key, or starts it with the block's first key. Keys are rounded to
// the pool's type before this, so the bounds are exact.
template <typename T>
ES_INLINE void WidenBounds(T* max, T* min, const float* key, int32_t n, bool first) {
  int32_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const simd::F32x16 k = simd::Load(key + i);
    simd::Store(max + i, first ? k : simd::Max(k, simd::Load(max + i)));
    simd::Store(min + i, first ? k : simd::Min(k, simd::Load(min + i)));
  }
  if (i < n) {
    const int part = n - i;
    const simd::F32x16 k = simd::LoadPart(key + i, part);
    simd::StorePart(max + i, first ? k : simd::Max(k, simd::LoadPart(max + i, part)), part);
    simd::StorePart(min + i, first ? k : simd::Min(k, simd::LoadPart(min + i, part)), part);
  }
}
ES_SIMD void WidenBoundsF32(float* max, float* min, const float* key, int32_t n, bool first) {
  WidenBounds(max, min, key, n, first);
}
ES_SIMD void WidenBoundsBF16(bf16_t* max, bf16_t* min, const float* key, int32_t n, bool first) {
  WidenBounds(max, min, key, n, first);
}

void WriteBounds(const KvPool& pool, const HeadView& view, int32_t block, bool first,
                 const float* key) {
  const int64_t at = view.BoundsRow(block) * pool.head_dim;
  if (pool.dtype == DType::kF32) {
    WidenBoundsF32(static_cast<float*>(pool.k) + at, static_cast<float*>(pool.v) + at, key,
                   pool.head_dim, first);
  } else {
    WidenBoundsBF16(static_cast<bf16_t*>(pool.k) + at, static_cast<bf16_t*>(pool.v) + at, key,
                    pool.head_dim, first);
  }
}

class RowWriter {
 public:
  RowWriter(const QkvParams& p, const BatchSeq& seq) : p_(p), seq_(seq), d_(p.shape.head_dim) {}

  // Token t of this step.
  void Write(int32_t t) {
    const int64_t row = seq_.row_begin + t;
    const int32_t position = seq_.position + t;
    FindAngles(position);
    const int64_t heads = p_.shape.heads, kv_heads = p_.shape.kv_heads;
    const int64_t in = row * (heads + 2 * kv_heads) * d_;
    float x[kMaxHeadDim];
    for (int64_t h = 0; h < heads; ++h) {
      LoadHead(p_.qkv, p_.dtype, in + h * d_, d_, x);
      if (p_.q_norm) NormHead(x, p_.q_norm, d_, p_.norm_eps);
      Rotate(x, cos_, sin_, d_);
      StoreHead(p_.q, p_.dtype, (row * heads + h) * d_, d_, x);
    }
    for (int32_t kv = 0; kv < int32_t(kv_heads); ++kv) {
      LoadHead(p_.qkv, p_.dtype, in + (heads + kv) * d_, d_, x);
      if (p_.k_norm) NormHead(x, p_.k_norm, d_, p_.norm_eps);
      Rotate(x, cos_, sin_, d_);
      WriteCache(kv, t, position, x, in + (heads + kv_heads + kv) * d_);
    }
    if (seq_.window_pages && t >= seq_.rows - seq_.window) WriteWindow(row, position);
  }

 private:
  // As transformers does: the angle is an f32 product.
  void FindAngles(int32_t position) {
    for (int32_t i = 0; i < d_ / 2; ++i) {
      const float angle = float(position) * p_.inv_freq[i];
      cos_[i] = std::cos(angle) * p_.rope_scale;
      sin_[i] = std::sin(angle) * p_.rope_scale;
    }
  }

  void WriteCache(int32_t kv, int32_t t, int32_t position, float* key, int64_t value_at) {
    const HeadView view = ViewHead(seq_, p_.shape.kv_heads, p_.layer, kv);
    const int32_t token = view.turn + t;
    const int64_t at = view.TurnRow(token);
    StoreHead(p_.pool.k, p_.dtype, at * d_, d_, key);
    CopyHead(p_.pool.v, at * d_, p_.qkv, value_at, p_.dtype, d_);
    p_.pool.positions[at] = position;
    const int32_t block_tokens = seq_.policy.block;
    if (!view.bounds || block_tokens <= 0) return;
    if (p_.dtype == DType::kBF16) LoadHead(p_.pool.k, p_.dtype, at * d_, d_, key);
    WriteBounds(p_.pool, view, token / block_tokens, token % block_tokens == 0, key);
  }

  void WriteWindow(int64_t row, int32_t position) {
    const int32_t group = p_.shape.group();
    for (int32_t h = 0; h < p_.shape.heads; ++h) {
      const HeadView view = ViewHead(seq_, p_.shape.kv_heads, p_.layer, h / group);
      const WindowSlot slot =
          WindowRow(view.window_pages, position % seq_.window * group + h % group);
      CopyHead(slot.k_half ? p_.pool.k : p_.pool.v, slot.row * d_, p_.q,
               (row * p_.shape.heads + h) * d_, p_.dtype, d_);
    }
  }

  const QkvParams& p_;
  const BatchSeq& seq_;
  const int32_t d_;
  float cos_[kMaxHeadDim / 2], sin_[kMaxHeadDim / 2];
};

}  // namespace

void QkvPost(ThreadPool& pool, const QkvParams& p) {
  Check(p.shape.head_dim <= kMaxHeadDim && p.shape.head_dim % 2 == 0,
        "head_dim is even, at most 512");
  Check(p.dtype == p.pool.dtype, "q, k, v and the cache have one type");
  const std::vector<Task> tasks = MakeTasks(*p.batch, p.shape, p.layer);
  pool.ParallelFor(int64_t(tasks.size()), [&](int64_t i, int) {
    const Task& task = tasks[size_t(i)];
    RowWriter writer(p, p.batch->seqs[task.seq]);
    for (int32_t t = task.begin; t < task.end; ++t) writer.Write(t);
  });
}

}  // namespace entropyserve::cpu
