#include "kernels/cpu/softmax_tile.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/simd.h"

namespace entropyserve::cpu {
namespace {

using simd::F32x16, simd::kLanes;

template <typename P>
ES_INLINE void SoftmaxRow(float* s, P* probs, int32_t visible, const SoftmaxTile& t, int32_t row) {
  // Up to a whole vector, what is not visible scores -inf.
  const int32_t cols = (visible + kLanes - 1) / kLanes * kLanes;
  for (int32_t i = visible; i < cols; ++i) s[i] = -std::numeric_limits<float>::infinity();
  F32x16 top = simd::Load(s);
  for (int32_t i = kLanes; i < cols; i += kLanes) top = simd::Max(top, simd::Load(s + i));
  const float old_max = t.max[row], new_max = std::max(old_max, simd::MaxOf(top) * t.scale);
  F32x16 sum = {};
  for (int32_t i = 0; i < cols; i += kLanes) {
    const F32x16 p = simd::Exp2(simd::Load(s + i) * t.scale - new_max);
    sum += p;
    simd::Store(probs + i, p);
  }
  for (int32_t i = cols; i < t.cols; i += kLanes) simd::Store(probs + i, F32x16{});
  float shrink = 1;
  if (new_max > old_max) {
    shrink = simd::Exp2(simd::Set(old_max - new_max))[0];
    float* out = t.out + int64_t{row} * t.head_dim;
    int32_t i = 0;
    for (; i + kLanes <= t.head_dim; i += kLanes)
      simd::Store(out + i, simd::Load(out + i) * shrink);
    for (; i < t.head_dim; ++i) out[i] *= shrink;
  }
  t.max[row] = new_max;
  t.sum[row] = t.sum[row] * shrink + simd::Sum(sum);
}

template <typename P>
ES_INLINE void SoftmaxRows(const SoftmaxTile& t, P* probs) {
  for (int32_t row = 0; row < t.rows; ++row) {
    const int32_t visible = std::clamp(t.first_visible + row / t.group, 0, t.keys);
    P* out = probs + int64_t{row} * t.cols;
    if (visible == 0) {
      for (int32_t i = 0; i < t.cols; i += kLanes) simd::Store(out + i, F32x16{});
      continue;
    }
    SoftmaxRow(t.scores + int64_t{row} * t.cols, out, visible, t, row);
  }
}

ES_SIMD void SoftmaxF32(const SoftmaxTile& t) { SoftmaxRows(t, t.scores); }
ES_SIMD void SoftmaxBF16(const SoftmaxTile& t) { SoftmaxRows(t, t.probs); }

}  // namespace

void RunSoftmaxTile(const SoftmaxTile& tile) {
  if (tile.probs) {
    SoftmaxBF16(tile);
  } else {
    SoftmaxF32(tile);
  }
}

}  // namespace entropyserve::cpu
