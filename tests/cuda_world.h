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
#include "kernels/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/kv_view.h"

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

// Floats as they lie in memory.
inline std::vector<std::byte> Pack(const std::vector<float>& x, DType dtype) {
  std::vector<std::byte> bytes(x.size() * SizeOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(bytes.data(), x.data(), bytes.size());
  } else {
    for (size_t i = 0; i < x.size(); ++i) {
      const bf16_t b = ToBF16(x[i]);
      std::memcpy(bytes.data() + 2 * i, &b, 2);
    }
  }
  return bytes;
}
inline std::vector<float> Unpack(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> x(bytes.size() / SizeOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(x.data(), bytes.data(), bytes.size());
  } else {
    for (size_t i = 0; i < x.size(); ++i) {
      bf16_t b;
      std::memcpy(&b, bytes.data() + 2 * i, 2);
      x[i] = FromBF16(b);
    }
  }
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

// Memory of one backend, freed with it.
class Arena {
 public:
  explicit Arena(Backend& backend) : backend(backend) {}
  ~Arena() {
    for (void* p : taken_) backend.Free(p);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* Bytes(size_t n) {
    void* p = backend.Alloc(std::max<size_t>(n, 1));
    Check(p != nullptr, "the test fits into memory");
    taken_.push_back(p);
    return p;
  }
  template <typename T>
  T* Put(const std::vector<T>& x) {
    T* p = static_cast<T*>(Bytes(x.size() * sizeof(T)));
    if (!x.empty()) backend.CopyIn(p, x.data(), x.size() * sizeof(T));
    return p;
  }
  void* PutFloats(const std::vector<float>& x, DType dtype) { return Put(Pack(x, dtype)); }
  // Poisoned: an element that nothing wrote reads as a NaN.
  void* Poisoned(int64_t n, DType dtype) {
    return PutFloats(std::vector<float>(size_t(n), std::nanf("")), dtype);
  }
  template <typename T>
  std::vector<T> Get(const T* p, size_t n) {
    std::vector<T> x(n);
    if (n > 0) backend.CopyOut(x.data(), p, n * sizeof(T));
    return x;
  }
  std::vector<float> GetFloats(const void* p, int64_t n, DType dtype) {
    return Unpack(Get(static_cast<const std::byte*>(p), size_t(n) * SizeOf(dtype)), dtype);
  }

  Backend& backend;

 private:
  std::vector<void*> taken_;
};

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
