// The same random step on two backends: what tests that hold CUDA against the CPU run on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/kv_view.h"
#include "tests/arena.h"

namespace entropyserve {

// Fresh inputs in every run; a failing run prints its seed, which then can be put here.
inline uint32_t TestSeed() {
  static const uint32_t seed = std::random_device{}();
  return seed;
}

inline std::vector<float> RandomFloats(std::mt19937& rng, int64_t n, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = normal(rng);
  return x;
}

// |a - b| / |b| over elements that `b` has; infinite where a NaN does not meet a NaN.
inline double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) {
      if (a[i] == b[i]) continue;
      return std::numeric_limits<double>::infinity();
    }
    difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    norm += double(b[i]) * b[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

struct SeqSpec {
  std::vector<int32_t> past = {};  // [kv_heads] or one for all
  int32_t before = 0;         // turn tokens cached before the step
  int32_t rows = 1;
  int32_t turn_total = 0;  // 0: decoding
  PrefillParams policy = {};
  bool bounds = false;
  int32_t window = 0;  // 0: no queries are kept
};

// A step of some sequences: the cache and the queries, as host data.
struct World {
  World(AttentionShape shape, DType dtype, std::vector<SeqSpec> specs, uint32_t seed);

  AttentionShape shape;
  DType dtype;
  int32_t layer;
  std::vector<SeqSpec> specs;
  int32_t rows = 0, pages = 0;
  std::vector<float> k, v;         // [pages, kPageTokens, head_dim]; NaN where nothing is cached
  std::vector<int32_t> positions;  // [pages, kPageTokens]
  std::vector<float> q, qkv;       // [rows, heads, d], [rows, heads + 2 kv_heads, d]
  struct Tables {
    std::vector<int32_t> pages, bounds, window;  // [layers, kv_heads, *]
    std::vector<HeadLength> lengths;             // [layers, kv_heads]
  };
  std::vector<Tables> tables;  // per sequence

  int32_t Past(size_t seq, int32_t kv) const {
    const std::vector<int32_t>& past = specs[seq].past;
    return past.empty() ? 0 : past[past.size() == 1 ? 0 : size_t(kv)];
  }
};

// A World in one backend's memory.
class Side {
 public:
  Side(Backend& backend, const World& world);

  Arena arena;
  const World& world;
  KvPool pool;
  Batch batch;
  void* q = nullptr;
  void* out = nullptr;         // [rows, heads, d] poisoned
  float* probe_out = nullptr;  // the same, f32
  BlockLists lists;
  std::vector<BatchSeq> seqs;
  std::vector<BatchSegment> segments;
  std::vector<int32_t> decodes;

  std::vector<float> Out() { return arena.GetFloats(out, OutElements(), world.dtype); }
  std::vector<float> ProbeOut() { return arena.Get(probe_out, size_t(OutElements())); }
  std::vector<int32_t> Counts() {
    return arena.Get(lists.counts, segments.size() * size_t(world.shape.kv_heads));
  }
  std::vector<int32_t> Blocks() {
    return arena.Get(lists.blocks, segments.size() * size_t(world.shape.kv_heads * lists.capacity));
  }
  SeqCounters Counters(size_t seq) { return arena.Get(seqs[seq].counters, 1)[0]; }
  std::vector<HeadState> States(size_t seq) {
    return arena.Get(seqs[seq].states, size_t(world.shape.layers * world.shape.kv_heads));
  }

  void SelectBlocks();
  void PrefillAttention();
  void DecodeAttention();

 private:
  int64_t OutElements() const {
    return int64_t{world.rows} * world.shape.heads * world.shape.head_dim;
  }
};

// Backends of the whole program, made at first use.
Backend& Cpu();
Backend& Cuda();          // every operator's best kernel
Backend& PortableCuda();  // portable kernels only

}  // namespace entropyserve
