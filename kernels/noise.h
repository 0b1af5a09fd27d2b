// The sampler's randomness: a counter, so that a token depends on its request's seed and its
// position only, never on the batch, the backend or what was sampled before. Plain C++, included by
// .cu files.
#pragma once

#include <cstdint>

namespace entropyserve {

// SplitMix64's finalizer (Steele, Lea, Flood 2014).
constexpr uint64_t Mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform on [0, 1), 24 bits, exact in f32.
constexpr float SampleNoise(uint64_t seed, int64_t position) {
  const uint64_t golden = 0x9e3779b97f4a7c15u;
  const uint64_t bits = Mix64(Mix64(seed + golden) + golden * (uint64_t(position) + 1));
  return float(bits >> 40) * 0x1p-24f;
}

}  // namespace entropyserve
