// Exact attention of a few queries, with the mass that falls into each bin of keys: what the probes
// of a segment and the window's queries need. Online softmax over tiles of keys; a bin's mass is
// kept relative to its tile's maximum until the row's final maximum and sum are known.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/select_internal.h"
#include "kernels/cpu/simd.h"

namespace entropyserve::cpu {
namespace {

constexpr int32_t kTileTokens = 512;  // keys of one product: where oneDNN reaches its best f32 rate
constexpr int32_t kPadTokens = 128;   // products are rounded up to this, so that few are compiled
constexpr int32_t kMaxRows = 64;      // queries of one product
constexpr int64_t kMaxBinMass = int64_t{4} << 20;  // floats: 16 MiB of bin masses at a time

// Turns one row's scores x [n], n a multiple of kPadTokens, into e^(scale * (x - max)). *max is the
// row's maximum so far, and is raised. Returns the row's sum over the tile.
ES_SIMD float Exponentials(float* x, int32_t n, float scale, float* max) {
  simd::F32x16 highest = simd::Set(*max);
  for (int32_t i = 0; i < n; i += simd::kLanes) {
    highest = simd::Max(simd::Load(x + i), highest);
  }
  *max = simd::MaxOf(highest);
  const simd::F32x16 shift = simd::Set(*max), factor = simd::Set(scale * simd::kLog2E);
  simd::F32x16 sum = simd::Set(0);
  for (int32_t i = 0; i < n; i += simd::kLanes) {
    const simd::F32x16 e = simd::Exp2((simd::Load(x + i) - shift) * factor);
    simd::Store(x + i, e);
    sum += e;
  }
  return simd::Sum(sum);
}

// sums[j] = sum of x[j * size, (j + 1) * size)
ES_SIMD void SumBins(const float* x, int32_t bins, int32_t size, float* sums) {
  if (size == 8) {  // the default block
    for (int32_t j = 0; j < bins; ++j, x += 8) {
      sums[j] = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    }
    return;
  }
  for (int32_t j = 0; j < bins; ++j, x += size) {
    float sum = 0;
    for (int32_t i = 0; i < size; ++i) sum += x[i];
    sums[j] = sum;
  }
}

ES_SIMD void Widen(const bf16_t* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + simd::kLanes <= n; i += simd::kLanes) simd::Store(dst + i, simd::Load(src + i));
  for (; i < n; ++i) dst[i] = FromBF16(src[i]);
}

// A run of consecutive tokens, either all inside the bins or all outside.
struct Tile {
  int32_t begin = 0, end = 0;
  int32_t first_bin = -1;  // -1: outside
};

// Tokens [0, limit) in tiles that end at the edges of the bins and hold whole bins.
std::vector<Tile> MakeTiles(const ExactQueries& in, int32_t limit) {
  std::vector<Tile> tiles;
  const int32_t bin_end = in.bin_begin + in.bins * in.bin_size;
  const int32_t binned_step = std::max(1, kTileTokens / in.bin_size) * in.bin_size;
  for (int32_t begin = 0; begin < limit;) {
    Tile tile{begin, std::min(limit, begin + kTileTokens), -1};
    if (begin < in.bin_begin) {
      tile.end = std::min(tile.end, in.bin_begin);
    } else if (begin < bin_end) {
      tile.end = std::min({limit, bin_end, begin + binned_step});
      tile.first_bin = (begin - in.bin_begin) / in.bin_size;
    }
    tiles.push_back(tile);
    begin = tile.end;
  }
  return tiles;
}

// Some of the queries, few enough that their bin masses fit the scratch.
struct RowChunk {
  const ExactQueries& in;
  AttendScratch& scratch;
  int32_t first = 0, rows = 0;
  bool want_mass = false, want_out = false;

  int32_t head_dim() const { return in.pool->head_dim; }
  float scale() const { return 1.0f / std::sqrt(float(head_dim())); }
  float* bin_mass(int32_t row) const { return scratch.bin_mass.data() + int64_t{row} * in.bins; }
};

// Turns scores [rows, padded] of a tile into exponentials and updates the rows' running softmax.
void SoftmaxTile(const RowChunk& chunk, const Tile& tile, int32_t t, int32_t padded) {
  AttendScratch& s = chunk.scratch;
  const int32_t size = tile.end - tile.begin, d = chunk.head_dim();
  for (int32_t r = 0; r < chunk.rows; ++r) {
    float* x = s.scores.data() + int64_t{r} * padded;
    const int32_t valid = std::clamp(chunk.in.limits[chunk.first + r] - tile.begin, 0, size);
    std::fill(x + valid, x + padded, -std::numeric_limits<float>::infinity());
    const float old_max = s.row_max[r];
    float new_max = old_max;
    const float sum = Exponentials(x, padded, chunk.scale(), &new_max);
    const float factor = std::exp(chunk.scale() * (old_max - new_max));
    s.row_max[r] = new_max;
    s.row_sum[r] = s.row_sum[r] * factor + sum;
    s.row_covered[r] = s.row_covered[r] * factor + (tile.first_bin < 0 ? sum : 0.0f);
    if (chunk.want_mass && tile.first_bin >= 0) {
      SumBins(x, size / chunk.in.bin_size, chunk.in.bin_size, chunk.bin_mass(r) + tile.first_bin);
      s.tile_max[int64_t{t} * chunk.rows + r] = new_max;
    }
    if (chunk.want_out && factor != 1.0f) {
      float* out = s.out.data() + int64_t{r} * d;
      for (int32_t c = 0; c < d; ++c) out[c] *= factor;
    }
  }
}

void AttendTile(const RowChunk& chunk, const Tile& tile, int32_t t, Matmul& matmul) {
  AttendScratch& s = chunk.scratch;
  const ExactQueries& in = chunk.in;
  const int64_t d = chunk.head_dim();
  const int32_t size = tile.end - tile.begin;
  const int32_t padded = CeilDiv(size, kPadTokens) * kPadTokens;

  const size_t vector_bytes = d * SizeOf(in.pool->dtype);
  std::byte* keys = s.keys.data();
  ForRows(in.head, tile.begin, tile.end,
          [&](int64_t row, int32_t n) { keys = CopyVectors(*in.pool, in.pool->k, row, n, keys); });
  std::memset(keys, 0, (padded - size) * vector_bytes);
  MatmulShape product{.m = chunk.rows, .n = padded, .k = d};
  product.lda = product.ldb = d, product.ldc = padded;
  product.in = in.pool->dtype;
  product.b_transposed = true;
  matmul.Run(product, static_cast<const std::byte*>(in.q) + chunk.first * vector_bytes,
             s.keys.data(), s.scores.data());
  SoftmaxTile(chunk, tile, t, padded);
  if (!chunk.want_out) return;

  float* values = s.values.data();
  ForRows(in.head, tile.begin, tile.end, [&](int64_t row, int32_t n) {
    LoadVectors(*in.pool, in.pool->v, row, n, values);
    values += n * d;
  });
  std::fill(values, values + (padded - size) * d, 0.0f);
  MatmulShape sum{.m = chunk.rows, .n = d, .k = padded};
  sum.lda = padded, sum.ldb = sum.ldc = d;
  sum.accumulate = true;
  matmul.Run(sum, s.scores.data(), s.values.data(), s.out.data());
}

// Adds the chunk's share of the means, and writes its outputs.
void Finish(const RowChunk& chunk, const std::vector<Tile>& tiles, ExactResult* result) {
  AttendScratch& s = chunk.scratch;
  const int64_t d = chunk.head_dim();
  for (int32_t r = 0; r < chunk.rows; ++r) {
    const float inverse = 1.0f / s.row_sum[r];
    if (chunk.want_out) {
      float* out = result->out + (chunk.first + r) * d;
      for (int64_t c = 0; c < d; ++c) out[c] = s.out[r * d + c] * inverse;
    }
    if (!chunk.want_mass) continue;
    const float share = inverse / float(chunk.in.rows);
    result->covered += s.row_covered[r] * share;
    for (size_t t = 0; t < tiles.size(); ++t) {
      const Tile& tile = tiles[t];
      if (tile.first_bin < 0) continue;
      const float below = s.tile_max[t * chunk.rows + r] - s.row_max[r];
      const float factor = std::exp(chunk.scale() * below) * share;
      const int32_t bins = (tile.end - tile.begin) / chunk.in.bin_size;
      const float* raw = chunk.bin_mass(r) + tile.first_bin;
      float* mass = result->mass + tile.first_bin;
      for (int32_t j = 0; j < bins; ++j) mass[j] += raw[j] * factor;
    }
  }
}

}  // namespace

void LoadVectors(const KvPool& pool, const void* half, int64_t row, int64_t n, float* dst) {
  const int64_t count = n * pool.head_dim, offset = row * pool.head_dim;
  if (pool.dtype == DType::kF32) {
    std::memcpy(dst, static_cast<const float*>(half) + offset, count * sizeof(float));
    return;
  }
  Widen(static_cast<const bf16_t*>(half) + offset, count, dst);
}

std::byte* CopyVectors(const KvPool& pool, const void* half, int64_t row, int64_t n,
                       std::byte* dst) {
  const size_t vector_bytes = pool.head_dim * SizeOf(pool.dtype);
  std::memcpy(dst, static_cast<const std::byte*>(half) + row * vector_bytes, n * vector_bytes);
  return dst + n * vector_bytes;
}

void AttendExactly(const ExactQueries& in, Matmul& matmul, AttendScratch& s, ExactResult* result) {
  const int64_t d = in.pool->head_dim;
  const int32_t tile_tokens = std::max(kTileTokens, CeilDiv(in.bin_size, kPadTokens) * kPadTokens);
  const bool want_mass = result->mass != nullptr;
  int32_t chunk_rows = kMaxRows;
  if (want_mass) {
    chunk_rows = int32_t(std::clamp<int64_t>(kMaxBinMass / std::max(in.bins, 1), 1, kMaxRows));
    std::fill_n(result->mass, in.bins, 0.0f);
    result->covered = 0;
    s.bin_mass.resize(int64_t{chunk_rows} * in.bins);
  }
  s.keys.resize(tile_tokens * d * SizeOf(in.pool->dtype));
  s.values.resize(tile_tokens * d);
  s.scores.resize(int64_t{chunk_rows} * tile_tokens);
  for (int32_t first = 0; first < in.rows; first += chunk_rows) {
    const int32_t rows = std::min(chunk_rows, in.rows - first);
    const RowChunk chunk{in, s, first, rows, want_mass, result->out != nullptr};
    Check(in.limits[first] >= 1, "every exact query sees a key");
    s.row_max.assign(rows, -std::numeric_limits<float>::infinity());
    s.row_sum.assign(rows, 0.0f);
    s.row_covered.assign(rows, 0.0f);
    s.out.assign(chunk.want_out ? rows * d : 0, 0.0f);
    const std::vector<Tile> tiles = MakeTiles(in, in.limits[first + rows - 1]);
    if (want_mass) s.tile_max.resize(tiles.size() * rows);
    for (size_t t = 0; t < tiles.size(); ++t) AttendTile(chunk, tiles[t], int32_t(t), matmul);
    Finish(chunk, tiles, result);
  }
}

}  // namespace entropyserve::cpu
