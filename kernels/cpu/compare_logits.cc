// Two predictions against each other, in double throughout: it is for evaluation.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/ops.h"

namespace entropyserve::cpu {
namespace {

// A row of logits as a distribution: logprob(i) = x[i] - log_sum.
struct Prediction {
  const float* x = nullptr;
  int64_t best = 0;  // the lowest id of the largest logit
  double log_sum = 0;
  bool finite = true;

  Prediction(const float* logits, int64_t n) : x(logits) {
    for (int64_t i = 0; i < n; ++i) {
      finite = finite && x[i] <= std::numeric_limits<float>::max();  // false for NaN too
      if (x[i] > x[best]) best = i;
    }
    finite = finite && std::isfinite(x[best]);
    if (!finite) return;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp(double(x[i]) - double(x[best]));
    log_sum = std::log(sum) + double(x[best]);
  }
  double Logprob(int64_t id) const { return double(x[id]) - log_sum; }
};

LogitsComparison CompareRow(const float* logits_a, const float* logits_b, int64_t vocab,
                            int32_t target) {
  Check(target >= 0 && target < vocab, "a token id is outside the vocabulary");
  LogitsComparison result;
  const Prediction a(logits_a, vocab), b(logits_b, vocab);
  result.finite = a.finite && b.finite;
  if (!result.finite) return result;
  double kl = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double log_p = a.Logprob(i), p = std::exp(log_p);
    if (p > 0) kl += p * (log_p - b.Logprob(i));
  }
  result.kl = std::max(0.0, kl);
  result.top1_equal = a.best == b.best;
  result.logprob_a = a.Logprob(target);
  result.logprob_b = b.Logprob(target);
  return result;
}

}  // namespace

void CompareLogits(ThreadPool& pool, const CompareLogitsParams& p) {
  pool.ParallelFor(p.n, [&](int64_t row, int) {
    p.results[row] = CompareRow(p.a + row * p.vocab, p.b + row * p.vocab, p.vocab, p.targets[row]);
  });
}

}  // namespace entropyserve::cpu
