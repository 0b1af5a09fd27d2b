// The sampler. Order: penalties, bans, temperature, top-k, min-p, top-p (each over what the one
// before left), then one draw. Logprobs are of the raw logits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/ops.h"
#include "kernels/cpu/simd.h"
#include "kernels/noise.h"

namespace entropyserve::cpu {
namespace {

using simd::F32x16, simd::kLanes;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr uint32_t kInSession = 1u << 31;

// Larger value first, then lower id.
struct Candidate {
  int32_t id;
  float value;
  bool operator<(const Candidate& other) const {
    return value != other.value ? value > other.value : id < other.id;
  }
};

// The largest logit; false when one is NaN or +inf.
ES_SIMD bool FindMax(const float* x, int64_t n, float* max) {
  F32x16 top = simd::Set(-kInf);
  // 0 * x is NaN exactly for NaN and infinities; -inf is allowed, so it is replaced first.
  F32x16 poison = {};
  const F32x16 lowest = simd::Set(-std::numeric_limits<float>::max());
  int64_t i = 0;
  for (; i < n; i += kLanes) {
    const F32x16 v = i + kLanes <= n ? simd::Load(x + i) : simd::LoadPart(x + i, int(n - i));
    const F32x16 finite = v == -kInf ? lowest : v;
    poison += finite * 0.0f;
    if (i + kLanes <= n) top = simd::Max(top, v);
  }
  float best = simd::MaxOf(top);
  for (i = n / kLanes * kLanes; i < n; ++i) best = x[i] > best ? x[i] : best;
  *max = best;
  return simd::Sum(poison) == 0.0f;
}

// Sum of exp(x - max), in double over f32 terms.
ES_SIMD double SumExp(const float* x, int64_t n, float max) {
  double total = 0;
  constexpr int64_t kRun = 64 * kLanes;  // terms summed in f32 at a time
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(n, begin + kRun);
    F32x16 sum = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sum += simd::Exp(simd::Load(x + i) - max);
    for (; i < end; ++i) sum[0] += simd::Exp(simd::Set(x[i] - max))[0];
    total += double(simd::Sum(sum));
  }
  return total;
}

// x = exp((x - max) / temperature), 0 where that underflows.
ES_SIMD void ExpAll(float* x, int64_t n, float max, float temperature) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    simd::Store(x + i, simd::Exp((simd::Load(x + i) - max) / temperature));
  }
  if (i < n) {
    const int rest = int(n - i);
    simd::StorePart(x + i, simd::Exp((simd::LoadPart(x + i, rest) - max) / temperature), rest);
  }
}

// The first k of the candidates, sorted.
std::vector<Candidate> Top(const float* x, int64_t n, int64_t k) {
  k = std::min(k, n);
  // A heap of the best k: the worst of them is on top.
  std::vector<Candidate> heap;
  heap.reserve(size_t(k));
  for (int64_t i = 0; i < n; ++i) {
    const Candidate c{int32_t(i), x[i]};
    if (int64_t(heap.size()) < k) {
      heap.push_back(c);
      std::push_heap(heap.begin(), heap.end());
    } else if (k > 0 && c < heap.front()) {
      std::pop_heap(heap.begin(), heap.end());
      heap.back() = c;
      std::push_heap(heap.begin(), heap.end());
    }
  }
  std::sort_heap(heap.begin(), heap.end());
  return heap;
}

class Sampler {
 public:
  Sampler(const SampleRow& row, const float* logits, int64_t vocab)
      : row_(row), raw_(logits), vocab_(vocab) {}

  SampleResult Run() {
    SampleResult result;
    float max = 0;
    if (!FindMax(raw_, vocab_, &max) || max == -kInf) {
      result.finite = 0;
      result.token = row_.forced >= 0 ? row_.forced : 0;
      return result;
    }
    const double log_sum = std::log(SumExp(raw_, vocab_, max)) + double(max);
    result.token = row_.forced >= 0 ? row_.forced : Choose();
    Check(result.token >= 0 && result.token < vocab_, "a token id is outside the vocabulary");
    result.logprob = float(double(raw_[result.token]) - log_sum);
    if (row_.logprobs > 0) {
      const std::vector<Candidate> top =
          Top(raw_, vocab_, std::min(row_.logprobs, kMaxTopLogprobs));
      result.num_top = int32_t(top.size());
      for (size_t i = 0; i < top.size(); ++i) {
        result.top_ids[i] = top[i].id;
        result.top_logprobs[i] = float(double(top[i].value) - log_sum);
      }
    }
    return result;
  }

 private:
  int32_t Choose() {
    Adjust();
    const int32_t best =
        int32_t(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
    if (row_.temperature <= 0 || logits_[size_t(best)] == -kInf) return best;
    return Draw(logits_[size_t(best)]);
  }

  void Adjust() {
    logits_.assign(raw_, raw_ + vocab_);
    if (row_.history && (row_.repetition != 1 || row_.presence != 0 || row_.frequency != 0)) {
      for (int64_t i = 0; i < vocab_; ++i) {
        if (row_.history[i] != 0)
          logits_[size_t(i)] = Penalize(logits_[size_t(i)], row_.history[i]);
      }
    }
    for (int32_t i = 0; i < row_.num_banned; ++i) logits_[size_t(row_.banned[i])] = -kInf;
  }

  float Penalize(float x, uint32_t history) const {
    x = x > 0 ? x / row_.repetition : x * row_.repetition;
    x = std::min(x, std::numeric_limits<float>::max());  // a tiny penalty must not make it infinite
    const uint32_t count = history & ~kInSession;
    if (count > 0) x -= row_.presence + row_.frequency * float(count);
    return x;
  }

  // Relative probabilities (the best has 1) of what top-k and min-p leave, and the draw.
  int32_t Draw(float max) {
    candidates_.clear();
    if (row_.top_k > 0 && row_.top_k < vocab_) {
      TakeTopK(max);
    } else {
      ExpAll(logits_.data(), vocab_, max, row_.temperature);
      for (int64_t i = 0; i < vocab_; ++i) {
        const float p = logits_[size_t(i)];
        if (p > 0) candidates_.push_back({int32_t(i), p});
      }
    }
    if (row_.min_p > 0) {
      std::erase_if(candidates_, [&](const Candidate& c) { return c.value < row_.min_p; });
    }
    if (row_.top_p < 1) CutToTopP();
    return Pick();
  }

  void TakeTopK(float max) {
    for (int64_t i = 0; i < vocab_; ++i) {
      if (logits_[size_t(i)] > -kInf) candidates_.push_back({int32_t(i), logits_[size_t(i)]});
    }
    const size_t k = size_t(row_.top_k);
    if (k < candidates_.size()) {
      std::nth_element(candidates_.begin(), candidates_.begin() + ptrdiff_t(k), candidates_.end());
      candidates_.resize(k);
      SortById();
    }
    for (Candidate& c : candidates_) c.value = std::exp((c.value - max) / row_.temperature);
  }

  void SortById() {
    std::sort(candidates_.begin(), candidates_.end(),
              [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  }

  // The shortest list by probability whose mass reaches top_p of the whole; at least one.
  void CutToTopP() {
    const double total = Mass();
    size_t sorted = 0, kept = 0;
    double mass = 0;
    while (kept < candidates_.size() && (kept == 0 || mass < double(row_.top_p) * total)) {
      if (kept == sorted) {  // sort four times as many: usually a few are enough
        const size_t next = std::min(candidates_.size(), std::max<size_t>(64, 4 * sorted));
        std::partial_sort(candidates_.begin() + ptrdiff_t(sorted),
                          candidates_.begin() + ptrdiff_t(next), candidates_.end());
        sorted = next;
      }
      mass += double(candidates_[kept++].value);
    }
    candidates_.resize(kept);
    SortById();
  }

  double Mass() const {
    return std::accumulate(candidates_.begin(), candidates_.end(), 0.0,
                           [](double sum, const Candidate& c) { return sum + double(c.value); });
  }

  // By inversion, in the order of ids, which candidates_ always has.
  int32_t Pick() const {
    const double target = double(SampleNoise(row_.seed, row_.position)) * Mass();
    double mass = 0;
    int32_t last = -1;
    for (const Candidate& c : candidates_) {
      mass += double(c.value);
      if (c.value > 0) last = c.id;
      if (mass > target) return c.id;
    }
    return last;  // rounding only
  }

  const SampleRow& row_;
  const float* raw_;
  const int64_t vocab_;
  std::vector<float> logits_;
  std::vector<Candidate> candidates_;
};

}  // namespace

void Sample(ThreadPool& pool, const SampleParams& p) {
  pool.ParallelFor(p.n, [&](int64_t i, int) {
    const SampleRow& row = p.rows[i];
    p.results[i] = Sampler(row, p.logits + int64_t{row.logits_row} * p.vocab, p.vocab).Run();
  });
}

}  // namespace entropyserve::cpu
