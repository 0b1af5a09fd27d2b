// Random numbers of the evaluation's own: the same seed gives the same bytes on every platform,
// which std::mt19937's distributions do not promise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace entropyserve {

// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t state) : state_(state) {}

  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // In [0, n), n >= 1. The modulus' bias is below n / 2^64.
  uint64_t Below(uint64_t n) { return Next() % n; }
  // In [low, high].
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Below(static_cast<uint64_t>(high - low) + 1));
  }

 private:
  uint64_t state_;
};

// FNV-1a.
inline uint64_t HashBytes(std::string_view bytes, uint64_t hash = 0xcbf29ce484222325) {
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

// A generator of its own for every purpose of every prompt: what one of them draws moves no other.
inline SplitMix64 Stream(uint64_t seed, std::string_view purpose, uint64_t index) {
  SplitMix64 mix(seed ^ HashBytes(purpose));
  return SplitMix64(mix.Next() ^ SplitMix64(index).Next());
}

template <typename T>
void Shuffle(SplitMix64* random, std::vector<T>* values) {
  for (size_t i = values->size(); i > 1; --i) {
    std::swap((*values)[i - 1], (*values)[random->Below(i)]);
  }
}

// `count` different numbers of [0, n), in the order drawn; count <= n.
inline std::vector<int64_t> Sample(SplitMix64* random, int64_t n, int64_t count) {
  std::vector<int64_t> all(static_cast<size_t>(n));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  for (int64_t i = 0; i < count; ++i) {
    std::swap(all[static_cast<size_t>(i)], all[static_cast<size_t>(random->Between(i, n - 1))]);
  }
  all.resize(static_cast<size_t>(count));
  return all;
}

}  // namespace entropyserve
