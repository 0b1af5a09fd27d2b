// The bench's random numbers: the same on every machine and library, one independent sequence per
// (seed, what for, index), so that adding a draw in one place changes nothing elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace entropyserve {

enum class RandomStream : uint64_t {
  kArrivals = 1,
  kLengths,
  kThink,
  kBehaviour,
  kPrompt,
  kSampling,
};

// SplitMix64 (Steele, Lea and Flood 2014), whose finalizer also mixes the key.
class Random {
 public:
  Random(uint64_t seed, RandomStream stream, uint64_t index)
      : state_(Mix(Mix(Mix(seed) + static_cast<uint64_t>(stream)) + index)) {}

  uint64_t Bits() { return Mix(state_ += kStep); }
  // [0, 1)
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  // [0, n); n >= 1. By multiplication: the bias is under n / 2^64.
  uint64_t Below(uint64_t n) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(Bits()) * n) >> 64);
  }
  // Mean 1.
  double Exponential() { return -std::log1p(-Uniform()); }
  // Mean 0, deviation 1 (Box and Muller 1958).
  double Normal() {
    const double radius = std::sqrt(2 * Exponential());
    return radius * std::cos(2 * std::numbers::pi * Uniform());
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  static uint64_t Mix(uint64_t x) {
    x += kStep;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  uint64_t state_;
};

}  // namespace entropyserve
