#include "kernels/cpu/amx_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace entropyserve::cpu {

#if defined(__x86_64__)

#define ES_AMX \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

namespace {

constexpr int32_t kTileRows = 16;      // of a tile register
constexpr int32_t kTileNumbers = 512;  // bf16 in a tile register: 16 rows of 64 bytes
constexpr int32_t kPad = 16;           // floats between rows of scores: spreads them over L1's sets

// Numbers from one row to the next, of scores (f32) and probabilities (bf16).
int32_t ScoreStride(int32_t cols) { return cols + kPad; }
int32_t ProbStride(int32_t cols) { return cols + 2 * kPad; }

// Transposes 16 x 16 doublewords.
ES_AMX inline void Transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // Now quarter q of r[4 i + j] holds column 4 q + j of rows 4 i to 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

ES_AMX void PackKeys(const bf16_t* k, int32_t cols, int32_t d, bf16_t* out) {
  for (int32_t key = 0; key < cols; key += kTileRows) {
    for (int32_t c = 0; c < d; c += 32, out += kTileNumbers) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(k + int64_t{key + i} * d + c);
      Transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, rows[i]);
    }
  }
}

ES_AMX void PackValues(const bf16_t* v, int32_t cols, int32_t d, bf16_t* out) {
  for (int32_t key = 0; key < cols; key += kAmxKeys) {
    for (int32_t c = 0; c < d; c += 16, out += kTileNumbers) {
      for (int i = 0; i < 16; ++i) {
        const bf16_t* row = v + int64_t{key + 2 * i} * d + c;
        const __m512i even =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
        const __m512i odd =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d)));
        _mm512_storeu_si512(out + i * 32, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
}

// scores[32, cols] = q[32, d] . k
ES_AMX void Scores(const AmxTile& t, const bf16_t* q, int32_t cols) {
  const int32_t d = t.head_dim, stride = ScoreStride(t.cols);
  const size_t q_bytes = size_t(d) * sizeof(bf16_t), s_bytes = size_t(stride) * sizeof(float);
  for (int32_t key = 0; key < cols; key += kAmxKeys) {
    const bf16_t* k = t.k + int64_t{key} * d;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int32_t c = 0; c < d; c += 32, k += kTileNumbers) {
      _tile_loadd(4, q + c, q_bytes);
      _tile_loadd(6, k, 64);
      _tile_loadd(7, k + int64_t{kTileRows} * d, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, q + int64_t{kTileRows} * d + c, q_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* s = t.scratch + key;
    _tile_stored(0, s, s_bytes);
    _tile_stored(1, s + kTileRows, s_bytes);
    _tile_stored(2, s + kTileRows * stride, s_bytes);
    _tile_stored(3, s + kTileRows * stride + kTileRows, s_bytes);
  }
}

// out[32, d] += probs[32, cols] . v
ES_AMX void Values(const AmxTile& t, const bf16_t* probs, float* out, int32_t cols) {
  const int32_t d = t.head_dim, stride = ProbStride(t.cols);
  const size_t p_bytes = size_t(stride) * sizeof(bf16_t), o_bytes = size_t(d) * sizeof(float);
  for (int32_t c = 0; c < d; c += 32) {
    float* low = out + c;
    float* high = low + int64_t{kTileRows} * d;
    _tile_loadd(0, low, o_bytes);
    _tile_loadd(1, low + kTileRows, o_bytes);
    _tile_loadd(2, high, o_bytes);
    _tile_loadd(3, high + kTileRows, o_bytes);
    for (int32_t key = 0; key < cols; key += kAmxKeys) {
      const bf16_t* v = t.v + int64_t{key} * d + int64_t{c} * 32;
      _tile_loadd(4, probs + key, p_bytes);
      _tile_loadd(6, v, 64);
      _tile_loadd(7, v + kTileNumbers, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, probs + kTileRows * stride + key, p_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, low, o_bytes);
    _tile_stored(1, low + kTileRows, o_bytes);
    _tile_stored(2, high, o_bytes);
    _tile_stored(3, high + kTileRows, o_bytes);
  }
}

// 2^x, relative error under 3e-6 (a bf16 rounds to 4e-3): a minimax polynomial for 2^f on [0, 1),
// times 2^floor(x).
ES_AMX inline __m512 Exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  __m512 y = _mm512_set1_ps(0.01353417f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05201146f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24144276f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.69300383f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.00000259f));
  return _mm512_scalef_ps(y, x);
}

ES_AMX inline __mmask16 Mask(int32_t visible) {
  return visible >= 16 ? __mmask16(0xffff) : __mmask16((1u << std::max(visible, 0)) - 1u);
}

ES_AMX void SoftmaxRow(const AmxTile& t, int32_t row, int32_t visible, int32_t cols, const float* s,
                       bf16_t* probs) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 top0 = lowest, top1 = lowest;
  int32_t i = 0;
  for (; i + kAmxKeys <= visible; i += kAmxKeys) {
    top0 = _mm512_max_ps(top0, _mm512_loadu_ps(s + i));
    top1 = _mm512_max_ps(top1, _mm512_loadu_ps(s + i + 16));
  }
  if (i < visible) {
    top0 = _mm512_max_ps(top0, _mm512_mask_loadu_ps(lowest, Mask(visible - i), s + i));
    top1 = _mm512_max_ps(top1, _mm512_mask_loadu_ps(lowest, Mask(visible - i - 16), s + i + 16));
  }
  const float old_max = t.max[row];
  const float new_max =
      std::max(old_max, _mm512_reduce_max_ps(_mm512_max_ps(top0, top1)) * t.scale);
  const __m512 scale = _mm512_set1_ps(t.scale), max = _mm512_set1_ps(new_max);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
  for (i = 0; i + kAmxKeys <= visible; i += kAmxKeys) {
    const __m512 p0 = Exp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + i), scale, max));
    const __m512 p1 = Exp2(_mm512_fmsub_ps(_mm512_loadu_ps(s + i + 16), scale, max));
    sum0 = _mm512_add_ps(sum0, p0);
    sum1 = _mm512_add_ps(sum1, p1);
    const __m512bh pair = _mm512_cvtne2ps_pbh(p1, p0);
    std::memcpy(probs + i, &pair, sizeof(pair));
  }
  if (i < visible) {
    const __mmask16 mask0 = Mask(visible - i), mask1 = Mask(visible - i - 16);
    const __m512 x0 = _mm512_maskz_loadu_ps(mask0, s + i),
                 x1 = _mm512_maskz_loadu_ps(mask1, s + i + 16);
    const __m512 p0 = _mm512_maskz_mov_ps(mask0, Exp2(_mm512_fmsub_ps(x0, scale, max)));
    const __m512 p1 = _mm512_maskz_mov_ps(mask1, Exp2(_mm512_fmsub_ps(x1, scale, max)));
    sum0 = _mm512_add_ps(sum0, p0);
    sum1 = _mm512_add_ps(sum1, p1);
    const __m512bh pair = _mm512_cvtne2ps_pbh(p1, p0);
    std::memcpy(probs + i, &pair, sizeof(pair));
    i += kAmxKeys;
  }
  for (; i < cols; i += kAmxKeys) _mm512_storeu_si512(probs + i, _mm512_setzero_si512());
  float shrink = 1;
  if (new_max > old_max) {
    shrink = std::exp2(old_max - new_max);
    float* out = t.out + int64_t{row} * t.head_dim;
    const __m512 factor = _mm512_set1_ps(shrink);
    for (int32_t c = 0; c < t.head_dim; c += 16) {
      _mm512_storeu_ps(out + c, _mm512_mul_ps(_mm512_loadu_ps(out + c), factor));
    }
  }
  t.max[row] = new_max;
  t.sum[row] = t.sum[row] * shrink + _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
// Not on the stack: GCC 12's intrinsic tells the optimiser of the first 8 bytes only.
constinit const TileConfig kConfig;

ES_AMX void LoadConfig() { _tile_loadconfig(&kConfig); }
ES_AMX void Release() { _tile_release(); }

}  // namespace

bool AmxSupports(const CpuFeatures& features, DType dtype, int32_t head_dim) {
  return features.amx_bf16 && dtype == DType::kBF16 && head_dim % 32 == 0;
}

int64_t AmxScratch(int32_t keys) {
  return int64_t{kAmxRows} * ScoreStride(keys) + int64_t{kAmxRows} * ProbStride(keys) / 2;
}

void AmxPack(const bf16_t* k, const bf16_t* v, int32_t cols, int32_t head_dim, bf16_t* packed_k,
             bf16_t* packed_v) {
  PackKeys(k, cols, head_dim, packed_k);
  PackValues(v, cols, head_dim, packed_v);
}

void AmxBegin() { LoadConfig(); }
void AmxEnd() { Release(); }

void RunAmxTile(const AmxTile& t) {
  auto* probs = reinterpret_cast<bf16_t*>(t.scratch + int64_t{kAmxRows} * ScoreStride(t.cols));
  for (int32_t begin = 0; begin < t.rows; begin += kAmxRows) {
    const int32_t rows = std::min(kAmxRows, t.rows - begin);
    const auto visible = [&](int32_t row) {
      return std::clamp(t.first_visible + row / t.group, 0, t.keys);
    };
    // Keys that none of these rows sees are left out.
    const int32_t most = visible(begin + rows - 1);
    if (most == 0) continue;
    const int32_t cols = CeilDiv(most, kAmxKeys) * kAmxKeys;
    Scores(t, t.q + int64_t{begin} * t.head_dim, cols);
    for (int32_t r = 0; r < kAmxRows; ++r) {
      bf16_t* out = probs + r * ProbStride(t.cols);
      const int32_t seen = r < rows ? visible(begin + r) : 0;
      if (seen == 0) {
        std::memset(out, 0, size_t(cols) * sizeof(bf16_t));
      } else {
        SoftmaxRow(t, begin + r, seen, cols, t.scratch + r * ScoreStride(t.cols), out);
      }
    }
    Values(t, probs, t.out + int64_t{begin} * t.head_dim, cols);
  }
}

#else

bool AmxSupports(const CpuFeatures&, DType, int32_t) { return false; }
int64_t AmxScratch(int32_t) { return 0; }
void AmxPack(const bf16_t*, const bf16_t*, int32_t, int32_t, bf16_t*, bf16_t*) {
  Check(false, "no AMX here");
}
void AmxBegin() { Check(false, "no AMX here"); }
void AmxEnd() {}
void RunAmxTile(const AmxTile&) { Check(false, "no AMX here"); }

#endif

}  // namespace entropyserve::cpu
