// SelectTokens: which cached tokens survive compression (ARCHITECTURE.md, "The method"). The scores
// are SnapKV's (arXiv 2404.14469) per kv head; the shared budget is Ada-KV's (arXiv 2407.11550).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/check.h"
#include "kernels/cpu/select.h"
#include "kernels/cpu/select_internal.h"
#include "kernels/cpu/workers.h"

namespace entropyserve::cpu {
namespace {

// One kv head's cache: `earlier` tokens compete, the window after them stays.
struct HeadScores {
  HeadView head;
  int32_t length = 0;        // tokens, both runs
  int32_t earlier = 0;       // length - W, at least 0
  std::vector<float> score;  // [earlier] pooled; +inf: a sink
  int32_t window() const { return length - earlier; }
};

// The mean over `kernel` positions, some of them perhaps beyond the ends, of those in [begin, end).
float Mean(const float* begin, const float* end, int32_t kernel) {
  return std::accumulate(begin, end, 0.0f) / float(kernel);
}
float Maximum(const float* begin, const float* end, int32_t) {
  return std::accumulate(begin, end, 0.0f, [](float a, float b) { return std::max(a, b); });
}

// A token's score from the masses of its neighbours: a token shares in what lies up to pool_after
// before it and up to pool_before after it.
void Pool(const KvParams& kv, const std::vector<float>& mass, std::vector<float>* score) {
  const int32_t n = int32_t(mass.size()), kernel = kv.pool_before + 1 + kv.pool_after;
  const auto combine = kv.pooling == Pooling::kMax ? Maximum : Mean;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t first = std::max(0, i - kv.pool_after),
                  last = std::min(n - 1, i + kv.pool_before);
    const float x = combine(mass.data() + first, mass.data() + last + 1, kernel);
    (*score)[i] = x == x ? x : 0;  // a NaN would break the order
  }
}

// The window's queries that count, oldest first: queries [window_queries * group, head_dim], and
// what each may see.
void LoadWindow(const SelectTokensParams& p, const HeadScores& h, SelectScratch& s) {
  const int32_t group = p.shape.group(), n = p.window_queries;
  s.queries.resize(size_t(n) * group * p.shape.head_dim * SizeOf(p.pool.dtype));
  std::byte* end = s.queries.data();
  s.limits.resize(n * group);
  const int32_t next = p.seq->position;
  for (int32_t i = 0; i < n; ++i) {
    const int32_t slot = (next - n + i) % p.seq->window;
    for (int32_t g = 0; g < group; ++g) {
      const WindowSlot at = WindowRow(h.head.window_pages, slot * group + g);
      end = CopyVectors(p.pool, at.k_half ? p.pool.k : p.pool.v, at.row, 1, end);
      s.limits[i * group + g] = h.length - n + i + 1;
    }
  }
}

// Attention mass of the window's queries on every earlier token, mean over queries and the group's
// heads, pooled over neighbours among the earlier tokens.
void Score(const SelectTokensParams& p, Matmul& matmul, HeadScores* h) {
  SelectScratch s;
  std::vector<float> mass(h->earlier, 0.0f);
  h->score.assign(h->earlier, 0.0f);
  if (p.window_queries > 0) {
    LoadWindow(p, *h, s);
    const ExactQueries queries{.head = h->head,
                               .pool = &p.pool,
                               .rows = p.window_queries * p.shape.group(),
                               .q = s.queries.data(),
                               .limits = s.limits.data(),
                               .bin_begin = 0,
                               .bins = h->earlier};
    ExactResult result{.mass = mass.data()};
    AttendExactly(queries, matmul, s.attend, &result);
  }
  Pool(p.kv, mass, &h->score);
  const int32_t sinks = p.kv.keep_sinks ? std::min(kSinkTokens, h->earlier) : 0;
  std::fill_n(h->score.begin(), sinks, std::numeric_limits<float>::infinity());
}

// A candidate among the tokens of all heads. Best first: score, then the earlier token, then the
// lower head.
struct Candidate {
  float score;
  int32_t token, kv;
  bool operator<(const Candidate& other) const {
    if (score != other.score) return score > other.score;
    return token != other.token ? token < other.token : kv < other.kv;
  }
};

// How many of its best earlier tokens each head keeps: counts [kv_heads].

// The same for every head.
void OwnBudgets(const SelectTokensParams& p, const std::vector<HeadScores>& heads,
                std::vector<int32_t>* counts) {
  for (size_t kv = 0; kv < heads.size(); ++kv) {
    (*counts)[kv] = std::clamp(p.budget - heads[kv].window(), 0, heads[kv].earlier);
  }
}

// Windows, sinks and every head's floor first; the rest of the layer's budget goes to the highest
// scores of all heads.
void SharedBudget(const SelectTokensParams& p, const std::vector<HeadScores>& heads,
                  std::vector<int32_t>* counts) {
  const int32_t floor_tokens = int32_t(p.kv.adakv_floor * float(p.budget));
  int64_t left = int64_t{p.budget} * int64_t(heads.size());
  std::vector<Candidate> rest;
  for (size_t kv = 0; kv < heads.size(); ++kv) {
    const HeadScores& h = heads[kv];
    const int32_t sinks = p.kv.keep_sinks ? std::min(kSinkTokens, h.earlier) : 0;
    const int32_t floor = std::clamp(floor_tokens - h.window(), sinks, h.earlier);
    (*counts)[kv] = floor;
    left -= h.window() + floor;
    std::vector<Candidate> own(h.earlier);
    for (int32_t i = 0; i < h.earlier; ++i) own[i] = {h.score[i], i, int32_t(kv)};
    std::nth_element(own.begin(), own.begin() + floor, own.end());
    rest.insert(rest.end(), own.begin() + floor, own.end());
  }
  const int64_t take = std::clamp<int64_t>(left, 0, int64_t(rest.size()));
  std::nth_element(rest.begin(), rest.begin() + take, rest.end());
  for (int64_t i = 0; i < take; ++i) ++(*counts)[rest[i].kv];
}

void Everything(const SelectTokensParams&, const std::vector<HeadScores>& heads,
                std::vector<int32_t>* counts) {
  for (size_t kv = 0; kv < heads.size(); ++kv) (*counts)[kv] = heads[kv].earlier;
}

// Indexed by KvRule.
constexpr void (*kAllocations[])(const SelectTokensParams&, const std::vector<HeadScores>&,
                                 std::vector<int32_t>*) = {
    Everything,    // full
    OwnBudgets,    // latent
    OwnBudgets,    // snapkv
    SharedBudget,  // adakv
};

// The head's `count` best earlier tokens and its window, ascending.
void WriteTokens(const HeadScores& h, int32_t count, int32_t* out) {
  std::vector<int32_t> order(h.earlier);
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
    return h.score[a] != h.score[b] ? h.score[a] > h.score[b] : a < b;
  });
  std::sort(order.begin(), order.begin() + count);
  std::copy_n(order.begin(), count, out);
  std::iota(out + count, out + count + h.window(), h.earlier);
}

}  // namespace

void SelectTokens(Workers& workers, const SelectTokensParams& p) {
  const int32_t kv_heads = p.shape.kv_heads;
  Check(p.window_queries <= p.kv.window && p.window_queries <= p.seq->window,
        "no more window queries than the ring holds");
  std::vector<HeadScores> heads(kv_heads);
  workers.pool.ParallelFor(kv_heads, [&](int64_t kv, int thread) {
    HeadScores& h = heads[kv];
    h.head = ViewHead(*p.seq, kv_heads, p.layer, int32_t(kv));
    h.length = h.head.past + h.head.turn;
    h.earlier = std::max(0, h.length - p.kv.window);
    if (p.kv.rule == KvRule::kFull) {
      h.score.assign(h.earlier, 0.0f);
    } else if (h.earlier > 0) {
      Score(p, workers.threads[thread].matmul, &h);
    }
  });
  std::vector<int32_t> counts(kv_heads, 0);
  kAllocations[int(p.kv.rule)](p, heads, &counts);
  workers.pool.ParallelFor(kv_heads, [&](int64_t kv, int) {
    const HeadScores& h = heads[kv];
    p.counts[kv] = counts[kv] + h.window();
    Check(p.counts[kv] <= p.capacity, "a token list has room for its budget");
    WriteTokens(h, counts[kv], p.indices + kv * p.capacity);
  });
}

void Compact(ThreadPool& pool, const CompactParams& p) {
  const size_t vector_bytes = p.shape.head_dim * SizeOf(p.pool.dtype);
  const auto copy = [&](void* half, int64_t to, int64_t from) {
    auto* bytes = static_cast<std::byte*>(half);
    std::memcpy(bytes + to * vector_bytes, bytes + from * vector_bytes, vector_bytes);
  };
  // One item per (kv head, new page).
  pool.ParallelFor(int64_t{p.shape.kv_heads} * p.max_new_pages, [&](int64_t item, int) {
    const int32_t kv = int32_t(item / p.max_new_pages), page = int32_t(item % p.max_new_pages);
    const HeadView head = ViewHead(*p.seq, p.shape.kv_heads, p.layer, kv);
    const int32_t begin = page * kPageTokens, end = std::min(begin + kPageTokens, p.counts[kv]);
    const int32_t* indices = p.indices ? p.indices + int64_t{kv} * p.capacity : nullptr;
    for (int32_t i = begin; i < end; ++i) {
      const int64_t from = head.Row(indices ? indices[i] : i);
      const int64_t to = PageRow(p.new_pages[item], i - begin);
      copy(p.pool.k, to, from);
      copy(p.pool.v, to, from);
      p.pool.positions[to] = p.pool.positions[from];
    }
  });
}

}  // namespace entropyserve::cpu
