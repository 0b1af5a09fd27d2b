#include "engine/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace entropyserve {
namespace {

// Llama 3.1: long wavelengths are divided by `factor`, short ones stay, with a ramp in between.
double Llama3(const RopeConfig& rope, double inv_freq) {
  const double wavelength = 2 * std::numbers::pi / inv_freq,
               original = double(rope.original_context);
  if (wavelength < original / rope.high_freq_factor) return inv_freq;
  if (wavelength > original / rope.low_freq_factor) return inv_freq / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq;
}

// YaRN (arXiv 2309.00071), section 3.2: the channel at which `rotations` fit into the original
// context.
double YarnChannel(const RopeConfig& rope, double rotations, int head_dim, double original) {
  return head_dim * std::log(original / (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(rope.theta));
}

void Yarn(const RopeConfig& rope, int head_dim, int64_t context, RopeTable* table) {
  const double original = double(rope.original_context > 0 ? rope.original_context : context);
  double low = YarnChannel(rope, rope.beta_fast, head_dim, original);
  double high = YarnChannel(rope, rope.beta_slow, head_dim, original);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, double(head_dim - 1));
  if (low == high) high += 0.001;  // no division by zero; the value is transformers' too
  for (int i = 0; i < head_dim / 2; ++i) {
    const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
    const double extrapolated = table->inv_freq[i];
    table->inv_freq[i] = float(extrapolated / rope.factor * ramp + extrapolated * (1 - ramp));
  }
  const double rule = rope.factor <= 1 ? 1.0 : 0.1 * std::log(rope.factor) + 1.0;
  table->scale = float(rope.attention_factor > 0 ? rope.attention_factor : rule);
}

}  // namespace

RopeTable MakeRopeTable(const RopeConfig& rope, int head_dim, int64_t context) {
  RopeTable table;
  table.inv_freq.resize(head_dim / 2);
  for (int i = 0; i < head_dim / 2; ++i) {
    const double inv_freq = std::pow(rope.theta, -2.0 * i / head_dim);
    double scaled = inv_freq;
    if (rope.scaling == RopeScaling::kLinear) scaled = inv_freq / rope.factor;
    if (rope.scaling == RopeScaling::kLlama3) scaled = Llama3(rope, inv_freq);
    if (!rope.freq_factors.empty()) scaled /= double(rope.freq_factors[i]);
    table.inv_freq[i] = float(scaled);
  }
  if (rope.scaling == RopeScaling::kYarn) Yarn(rope, head_dim, context, &table);
  return table;
}

}  // namespace entropyserve
