// Twins of SelectBlocks' parts: plain loops in double precision over plain arrays.
#pragma once

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "tests/select_testing.h"

namespace entropyserve {

struct NaiveEstimate {
  std::vector<double> score, p;  // [visible]
  double covered = 0, entropy = 0;
};

inline double Dot(const float* a, const float* b, int32_t n) {
  double sum = 0;
  for (int32_t c = 0; c < n; ++c) sum += double(a[c]) * b[c];
  return sum;
}

inline double NaiveEntropy(const std::vector<double>& p) {
  double sum = 0, entropy = 0;
  for (double x : p) sum += x;
  for (double x : p) entropy -= x / sum * std::log(x / sum + 1e-9);
  return p.empty() ? 0 : entropy;
}

inline NaiveEstimate NaiveBox(const LayerInputs& in, const PrefillParams& policy, int32_t s,
                              int32_t kv) {
  const int32_t d = in.shape.head_dim, group = in.shape.group();
  const int32_t visible = s * policy.segment / policy.block;
  const int32_t begin = s * policy.segment, end = std::min(in.turn, begin + policy.segment);
  NaiveEstimate e;
  e.score.assign(visible, 0);
  for (int32_t h = kv * group; h < (kv + 1) * group; ++h) {
    std::vector<double> center(d);
    for (int32_t c = 0; c < d; ++c) {
      double high = -1e30, low = 1e30;
      for (int32_t t = begin; t < end; ++t) {
        high = std::max<double>(high, in.Query(t, h)[c]);
        low = std::min<double>(low, in.Query(t, h)[c]);
      }
      center[c] = (high + low) / 2;
    }
    for (int32_t j = 0; j < visible; ++j) {
      double with_max = 0, with_min = 0;
      for (int32_t c = 0; c < d; ++c) {
        double high = -1e30, low = 1e30;
        for (int32_t t = j * policy.block; t < (j + 1) * policy.block; ++t) {
          high = std::max<double>(high, in.Key(kv, in.past[kv] + t)[c]);
          low = std::min<double>(low, in.Key(kv, in.past[kv] + t)[c]);
        }
        with_max += center[c] * high;
        with_min += center[c] * low;
      }
      e.score[j] += std::max(with_max, with_min) * policy.temperature / group;
    }
  }
  double highest = -1e30, sum = 0;
  for (double x : e.score) highest = std::max(highest, x);
  for (double x : e.score) sum += std::exp(x - highest);
  for (double x : e.score) e.p.push_back(std::exp(x - highest) / sum);
  e.entropy = NaiveEntropy(e.p);
  return e;
}

// Attention of one query over tokens [0, limit) of both runs: weights.
inline std::vector<double> NaiveWeights(const LayerInputs& in, int32_t kv, const float* q,
                                        int32_t limit) {
  std::vector<double> w(limit);
  double highest = -1e30, sum = 0;
  for (int32_t t = 0; t < limit; ++t) {
    w[t] = Dot(q, in.Key(kv, t), in.shape.head_dim) / std::sqrt(double(in.shape.head_dim));
    highest = std::max(highest, w[t]);
  }
  for (double& x : w) sum += x = std::exp(x - highest);
  for (double& x : w) x /= sum;
  return w;
}

inline NaiveEstimate NaiveProbe(const LayerInputs& in, const PrefillParams& policy, int32_t s,
                                int32_t kv) {
  const int32_t group = in.shape.group(), visible = s * policy.segment / policy.block;
  const int32_t begin = s * policy.segment, end = std::min(in.turn, begin + policy.segment);
  const int32_t past = in.past[kv];
  NaiveEstimate e;
  e.p.assign(visible, 0);
  int rows = 0;
  for (int32_t t = begin; t < end; t += policy.probe_stride) {
    for (int32_t h = kv * group; h < (kv + 1) * group; ++h, ++rows) {
      const auto w = NaiveWeights(in, kv, in.Query(t, h), past + t + 1);
      for (int32_t key = 0; key <= past + t; ++key) {
        const bool binned = key >= past && key < past + begin;
        (binned ? e.p[(key - past) / policy.block] : e.covered) += w[key];
      }
    }
  }
  for (double& x : e.p) x /= rows;
  e.covered /= rows;
  e.score = e.p;
  e.entropy = NaiveEntropy(e.p);
  return e;
}

inline NaiveEstimate Naive(const LayerInputs& in, const PrefillParams& policy, int32_t s,
                           int32_t kv) {
  return policy.estimator == Estimator::kBox ? NaiveBox(in, policy, s, kv)
                                             : NaiveProbe(in, policy, s, kv);
}

inline std::set<int32_t> NaiveForced(const PrefillParams& policy, int32_t s) {
  std::set<int32_t> forced;
  if (!policy.forced || s == 0) return forced;
  forced.insert(0);
  for (int32_t t = (s - 1) * policy.segment; t < s * policy.segment; t += policy.block) {
    forced.insert(t / policy.block);
  }
  return forced;
}

// The rule in double, from the entropies that were found.
struct NaiveState {
  double entropy = 0, budget = 0;
  bool rigid = true;
};
inline void NaiveAdvance(const PrefillParams& policy, int32_t s, double entropy,
                         NaiveState* state) {
  const double base = policy.base, last = state->entropy;
  state->entropy = entropy;
  if (s == 0) {
    state->budget = base;
    return;
  }
  if (entropy >= policy.e_t) state->rigid = false;
  const double change =
      s == 1 ? policy.delta : std::clamp((entropy - last) / (last + 1e-9), 0.0, 1.0 + policy.delta);
  state->budget =
      std::clamp(state->budget + policy.alpha * base * (change - policy.delta), base, 3 * base);
  if (state->rigid) state->budget = base;
}

}  // namespace entropyserve
