// policy_check [--backend=cpu|cuda|cpu-outside] FILE...: compares entropy_paper and the compression
// with what the released code of EntropyInfer (arXiv 2606.09508) returned. Each file is a
// .safetensors with the inputs q, k, v, the settings in its metadata, and the outputs. Everything
// runs in f32 through the real operators of the backend, on a paged cache with shuffled pages. One
// line per file; exit status 1 when a file does not agree.
//
// The CPU's selection also shows p and the rank of every block; another backend's (and the CPU's as
// cpu-outside, as if it were another) shows entropies and the chosen blocks, compared as sets.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/base/status_macros.h"
#include "engine/make_backend.h"
#include "engine/weights/safetensors.h"
#include "kernels/cpu/select_internal.h"
#include "kernels/cpu/workers.h"
#include "tests/paged_mirror.h"
#include "tests/select_testing.h"

namespace entropyserve {
namespace {

constexpr float kTolerance = 1e-4f;         // absolute, of p and out
constexpr float kEntropyTolerance = 1e-3f;  // absolute, nats: sums of up to thousands of p
// Two blocks or tokens whose scores differ by less, relative, are told apart by rounding alone.
constexpr double kTie = 1e-4;

// One file: settings, inputs, and what the released code made of them.
struct Reference {
  LayerInputs in;
  PrefillParams policy;
  KvParams kv;
  std::vector<float> p, entropy, out, compressed_k, compressed_v;
  std::vector<int64_t> segment_blocks, order;
  int32_t segments = 0, blocks = 0;  // M, N
  int32_t order_columns = 0;

  float P(int32_t kv_head, int32_t s, int64_t block) const {
    return p[(int64_t{kv_head} * segments + s) * blocks + block];
  }
  // The best blocks of a segment, best first.
  std::vector<int32_t> Ranked(int32_t kv_head, int32_t s) const {
    const auto row = order.begin() + (int64_t{kv_head} * segments + s) * order_columns;
    return std::vector<int32_t>(row, row + segment_blocks[s]);
  }
};

template <typename T>
absl::Status ReadSetting(const SafetensorsFile& file, const std::string& name, T* value) {
  const auto it = file.metadata().find(name);
  if (it == file.metadata().end()) {
    return absl::InvalidArgumentError(absl::StrCat("metadata has no \"", name, "\""));
  }
  bool ok;
  if constexpr (std::is_same_v<T, float>) {
    ok = absl::SimpleAtof(it->second, value);
  } else {
    ok = absl::SimpleAtoi(it->second, value) && *value >= 0;
  }
  if (ok) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("metadata \"", name, "\": not a number: ", it->second));
}

absl::Status ReadSettings(const SafetensorsFile& file, Reference* r) {
  AttentionShape& shape = r->in.shape;
  shape.layers = 1;
  RETURN_IF_ERROR(ReadSetting(file, "heads", &shape.heads));
  RETURN_IF_ERROR(ReadSetting(file, "kv_heads", &shape.kv_heads));
  RETURN_IF_ERROR(ReadSetting(file, "head_dim", &shape.head_dim));
  RETURN_IF_ERROR(ReadSetting(file, "tokens", &r->in.turn));
  PrefillParams& p = r->policy;
  p = {.whole_prompt = true, .forced = false, .correction = 0, .first_sparse_layer = 0};
  RETURN_IF_ERROR(ReadSetting(file, "segment_size", &p.segment));
  RETURN_IF_ERROR(ReadSetting(file, "block_size", &p.block));
  RETURN_IF_ERROR(ReadSetting(file, "threshold_len", &p.dense_prefix));
  RETURN_IF_ERROR(ReadSetting(file, "base_budget", &p.base));
  RETURN_IF_ERROR(ReadSetting(file, "e_t", &p.e_t));
  RETURN_IF_ERROR(ReadSetting(file, "delta_t", &p.delta));
  RETURN_IF_ERROR(ReadSetting(file, "alpha", &p.alpha));
  r->kv.keep_sinks = false;  // the released code has none
  RETURN_IF_ERROR(ReadSetting(file, "kv_budget", &r->kv.budget));
  RETURN_IF_ERROR(ReadSetting(file, "window_size", &r->kv.window));
  int32_t kernel = 0;
  RETURN_IF_ERROR(ReadSetting(file, "pooling_kernel", &kernel));
  r->kv.pool_before = r->kv.pool_after = kernel / 2;
  const auto pooling = file.metadata().find("pooling");
  const std::string name = pooling == file.metadata().end() ? "none" : pooling->second;
  if (name != "avgpool" && name != "maxpool") {
    return absl::InvalidArgumentError(
        absl::StrCat("metadata \"pooling\": neither avgpool nor maxpool: ", name));
  }
  r->kv.pooling = name == "avgpool" ? Pooling::kAverage : Pooling::kMax;
  if (shape.kv_heads < 1 || shape.heads % shape.kv_heads != 0 || shape.head_dim < 1 ||
      r->in.turn < 1 || p.block < 1 || p.segment % p.block != 0 || p.segment < p.block ||
      r->kv.window < 1 || r->kv.budget < r->kv.window || kernel < 1 || kernel % 2 == 0) {
    return absl::InvalidArgumentError("the metadata's sizes contradict each other");
  }
  return absl::OkStatus();
}

absl::Status ReadFloats(const SafetensorsFile& file, const std::string& name,
                        const std::vector<int64_t>& shape, std::vector<float>* out) {
  ASSIGN_OR_RETURN(const SafetensorsEntry* entry, file.Find(name));
  if (entry->shape != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor \"", name, "\" does not have the shape that the metadata implies"));
  }
  ASSIGN_OR_RETURN(*out, file.ReadFloats(name));
  return absl::OkStatus();
}

// [tokens, kv_heads, head_dim] to [kv_heads][tokens, head_dim].
std::vector<std::vector<float>> ByHead(const std::vector<float>& x, const LayerInputs& in) {
  const int64_t d = in.shape.head_dim, kv_heads = in.shape.kv_heads;
  std::vector<std::vector<float>> heads(kv_heads);
  for (int64_t row = 0; row < int64_t(x.size()) / d; ++row) {
    heads[row % kv_heads].insert(heads[row % kv_heads].end(), x.begin() + row * d,
                                 x.begin() + (row + 1) * d);
  }
  return heads;
}

absl::StatusOr<Reference> Read(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
  Reference r;
  RETURN_IF_ERROR(ReadSettings(*file, &r));
  const AttentionShape& s = r.in.shape;
  const int64_t n = r.in.turn, kept = std::min(r.in.turn, r.kv.budget);
  r.segments = CeilDiv(r.in.turn, r.policy.segment);
  r.blocks = (r.segments - 1) * (r.policy.segment / r.policy.block);
  r.in.past.assign(s.kv_heads, 0);
  std::vector<float> k, v;
  RETURN_IF_ERROR(ReadFloats(*file, "q", {n, s.heads, s.head_dim}, &r.in.q));
  RETURN_IF_ERROR(ReadFloats(*file, "k", {n, s.kv_heads, s.head_dim}, &k));
  RETURN_IF_ERROR(ReadFloats(*file, "v", {n, s.kv_heads, s.head_dim}, &v));
  r.in.k = ByHead(k, r.in);
  r.in.v = ByHead(v, r.in);
  RETURN_IF_ERROR(ReadFloats(*file, "out", {n, s.heads, s.head_dim}, &r.out));
  RETURN_IF_ERROR(ReadFloats(*file, "p", {s.kv_heads, r.segments, r.blocks}, &r.p));
  RETURN_IF_ERROR(ReadFloats(*file, "entropy", {s.kv_heads, r.segments}, &r.entropy));
  const std::vector<int64_t> rows = {kept, s.kv_heads, s.head_dim};
  RETURN_IF_ERROR(ReadFloats(*file, "compressed_k_gqa", rows, &r.compressed_k));
  RETURN_IF_ERROR(ReadFloats(*file, "compressed_v_gqa", rows, &r.compressed_v));
  ASSIGN_OR_RETURN(r.segment_blocks, file->ReadInts("segment_blocks"));
  ASSIGN_OR_RETURN(r.order, file->ReadInts("order"));
  const int64_t lists = int64_t{s.kv_heads} * r.segments;
  r.order_columns = int32_t(int64_t(r.order.size()) / lists);
  bool ok = int64_t(r.segment_blocks.size()) == r.segments &&
            int64_t(r.order.size()) == lists * r.order_columns;
  for (int64_t c : r.segment_blocks) ok = ok && c >= 0 && c <= r.order_columns;
  for (int64_t block : r.order) ok = ok && block >= 0 && block < std::max(r.blocks, 1);
  if (!ok) return absl::InvalidArgumentError("segment_blocks and order do not fit together");
  return r;
}

// What a comparison found; one line of output.
struct Findings {
  float p = 0, entropy = 0, out = 0;  // largest absolute error
  int budgets = 0;                    // segments with another number of blocks
  int blocks = 0, block_ties = 0;     // ranks with another block, and of those the ties
  int tokens = 0, token_ties = 0;     // kept tokens that differ, and of those the ties
  int not_causal = 0;  // lists of the reference that hold blocks of a segment's own future

  bool ok() const {
    return p <= kTolerance && out <= kTolerance && entropy <= kEntropyTolerance && budgets == 0 &&
           blocks == block_ties && tokens == token_ties;
  }
};

void Widen(float* largest, float a, float b) {
  const float error = std::fabs(a - b);
  if (!(error <= *largest)) *largest = error;  // a NaN stays
}

bool Tie(double a, double b) {
  return std::fabs(a - b) <= kTie * std::max(std::fabs(a), std::fabs(b));
}

// The ranks of one segment and head: another block there is a tie when the reference gave both the
// same p.
void CompareOrder(const Reference& r, const float* score, int32_t kv_head, int32_t s, Findings* f) {
  const std::vector<int32_t> theirs = r.Ranked(kv_head, s);
  const int32_t visible = s * (r.policy.segment / r.policy.block);
  std::vector<int32_t> ours(visible);
  std::iota(ours.begin(), ours.end(), 0);
  std::stable_sort(ours.begin(), ours.end(),
                   [&](int32_t a, int32_t b) { return score[a] > score[b]; });
  for (size_t rank = 0; rank < theirs.size() && rank < ours.size(); ++rank) {
    if (ours[rank] == theirs[rank]) continue;
    ++f->blocks;
    f->block_ties += Tie(r.P(kv_head, s, ours[rank]), r.P(kv_head, s, theirs[rank]));
  }
}

// The lists of one segment and head: a block that only one side chose is a tie when the reference
// gave it the same p as one that only the other side chose.
void CompareList(const Reference& r, const std::vector<int32_t>& ours,
                 const std::vector<int32_t>& theirs, int32_t kv_head, int32_t s, Findings* f) {
  std::vector<int32_t> only_ours, only_theirs;
  std::set_difference(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                      std::back_inserter(only_ours));
  std::set_difference(theirs.begin(), theirs.end(), ours.begin(), ours.end(),
                      std::back_inserter(only_theirs));
  f->blocks += int(only_ours.size());
  if (only_ours.size() != only_theirs.size()) return;  // `budgets` tells
  for (size_t i = 0; i < only_ours.size(); ++i) {
    f->block_ties += Tie(r.P(kv_head, s, only_ours[i]), r.P(kv_head, s, only_theirs[i]));
  }
}

// p and ranks, which only the CPU's selection shows.
void CompareCapture(const Reference& r, const cpu::SelectCapture& capture, Findings* f) {
  const int32_t kv_heads = r.in.shape.kv_heads;
  for (int32_t s = 0; s < r.segments; ++s) {
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      const int64_t at = (int64_t{s} * kv_heads + kv) * r.blocks;
      for (int32_t j = 0; j < r.blocks; ++j) Widen(&f->p, capture.p[at + j], r.P(kv, s, j));
      if (s > 0) CompareOrder(r, capture.score.data() + at, kv, s, f);
    }
  }
}

using SegmentHeads = std::set<std::pair<int32_t, int32_t>>;  // (segment, kv head)

// Lists and entropies. Where ties let the reference take other blocks, its own list replaces ours,
// so that the attention after it reads the same keys. Returns which have no such list.
SegmentHeads CompareSelection(const Reference& r, bool captured, PagedLayer& paged, Findings* f) {
  const int32_t kv_heads = r.in.shape.kv_heads;
  const auto chosen = paged.Chosen();
  const std::vector<float>& entropy = paged.trace_entropy;  // [kv_heads, segments]
  SegmentHeads not_causal;
  for (int32_t s = 0; s < r.segments; ++s) {
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      const int64_t at = int64_t{kv} * r.segments + s;
      if (r.blocks > 0) Widen(&f->entropy, entropy[at], r.entropy[at]);
      const ChosenBlocks& ours = chosen[s][kv];
      if (ours.dense) continue;
      f->budgets += int64_t(ours.blocks.size()) != r.segment_blocks[s];
      std::vector<int32_t> theirs = r.Ranked(kv, s);
      std::sort(theirs.begin(), theirs.end());
      if (!theirs.empty() && theirs.back() >= s * (r.policy.segment / r.policy.block)) {
        not_causal.insert({s, kv});
      } else if (theirs != ours.blocks) {
        if (!captured) CompareList(r, ours.blocks, theirs, kv, s, f);
        paged.Replace(s, kv, theirs);
      }
    }
  }
  // Dense segments have no list, but a budget.
  std::vector<float> budgets(entropy.size());
  const auto counts = cpu::WholePromptBlocks(r.policy, r.in.turn, kv_heads, entropy, budgets);
  for (int32_t s = 0; s < r.segments; ++s) f->budgets += counts[s] != r.segment_blocks[s];
  f->not_causal = int(not_causal.size());
  return not_causal;
}

void CompareAttention(const Reference& r, const std::vector<float>& out,
                      const SegmentHeads& not_causal, Findings* f) {
  const AttentionShape& shape = r.in.shape;
  for (int32_t t = 0; t < r.in.turn; ++t) {
    for (int32_t h = 0; h < shape.heads; ++h) {
      if (not_causal.count({t / r.policy.segment, h / shape.group()})) continue;
      const int64_t at = (int64_t{t} * shape.heads + h) * shape.head_dim;
      for (int32_t c = 0; c < shape.head_dim; ++c) Widen(&f->out, out[at + c], r.out[at + c]);
    }
  }
}

// Pooled scores of the tokens before the window, in double: what tells whether tokens tie.
std::vector<double> TokenScores(const Reference& r, int32_t kv_head) {
  const int32_t n = r.in.turn, d = r.in.shape.head_dim, group = r.in.shape.group();
  const int32_t window = std::min(r.kv.window, n), earlier = n - window;
  std::vector<double> mean(n, 0), pooled(n, 0);
  for (int32_t row = 0; row < window * group; ++row) {
    const int32_t token = earlier + row / group;
    const float* q = r.in.Query(token, kv_head * group + row % group);
    std::vector<double> w(token + 1);
    double highest = -1e300, sum = 0;
    for (int32_t t = 0; t <= token; ++t) {
      for (int32_t c = 0; c < d; ++c) w[t] += double(q[c]) * r.in.Key(kv_head, t)[c];
      w[t] /= std::sqrt(double(d));
      highest = std::max(highest, w[t]);
    }
    for (double& x : w) sum += x = std::exp(x - highest);
    for (int32_t t = 0; t < earlier; ++t) mean[t] += w[t] / sum / (window * group);
  }
  const int32_t reach = r.kv.pool_after,
                kernel = 2 * reach + 1;  // the released code's is symmetric
  for (int32_t t = 0; t < earlier; ++t) {
    for (int32_t i = std::max(0, t - reach); i <= std::min(earlier - 1, t + reach); ++i) {
      pooled[t] = r.kv.pooling == Pooling::kAverage ? pooled[t] + mean[i] / kernel
                                                    : std::max(pooled[t], mean[i]);
    }
  }
  return pooled;
}

using Row = std::vector<float>;  // a token's K, then its V

Row JoinRow(const float* k, const float* v, int32_t d) {
  Row row(k, k + d);
  row.insert(row.end(), v, v + d);
  return row;
}

// Tokens of one head that the reference kept, found by their contents. Tokens with equal contents
// are given out in order. -1: no such token.
std::vector<int32_t> ReferenceTokens(const Reference& r, int32_t kv_head) {
  const int32_t d = r.in.shape.head_dim, kv_heads = r.in.shape.kv_heads;
  std::map<Row, std::vector<int32_t>> tokens;
  for (int32_t t = r.in.turn - 1; t >= 0; --t) {
    tokens[JoinRow(r.in.Key(kv_head, t), r.in.Value(kv_head, t), d)].push_back(t);
  }
  std::vector<int32_t> kept;
  for (int64_t i = 0; i < int64_t(r.compressed_k.size()) / (d * kv_heads); ++i) {
    const int64_t at = (i * kv_heads + kv_head) * d;
    auto it = tokens.find(JoinRow(r.compressed_k.data() + at, r.compressed_v.data() + at, d));
    const bool found = it != tokens.end() && !it->second.empty();
    kept.push_back(found ? it->second.back() : -1);
    if (found) it->second.pop_back();
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

void CompareTokens(const Reference& r, int32_t kv_head, const std::vector<int32_t>& ours,
                   Findings* f) {
  const std::vector<int32_t> theirs = ReferenceTokens(r, kv_head);
  std::vector<int32_t> only_ours, only_theirs;
  std::set_difference(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                      std::back_inserter(only_ours));
  std::set_difference(theirs.begin(), theirs.end(), ours.begin(), ours.end(),
                      std::back_inserter(only_theirs));
  if (only_ours.empty() && only_theirs.empty()) return;
  f->tokens += int(std::max(only_ours.size(), only_theirs.size()));
  if (only_ours.size() != only_theirs.size()) return;
  const std::vector<double> score = TokenScores(r, kv_head);
  for (size_t i = 0; i < only_ours.size(); ++i) {
    if (only_theirs[i] < 0) continue;
    f->token_ties += Tie(score[only_ours[i]], score[only_theirs[i]]);
  }
}

// Token selection and compaction: what lies in the `fresh` pages, [kv_heads, pages], must be what
// the reference kept.
void CompareCompression(const Reference& r, const PagedLayer& paged,
                        const std::vector<int32_t>& counts, const std::vector<int32_t>& fresh,
                        Findings* f) {
  const AttentionShape& shape = r.in.shape;
  const int32_t pages = int32_t(fresh.size()) / shape.kv_heads;
  for (int32_t kv = 0; kv < shape.kv_heads; ++kv) {
    std::vector<int32_t> tokens;
    for (int32_t i = 0; i < counts[kv]; ++i) {
      const int64_t row = PageRow(fresh[kv * pages + i / kPageTokens], i % kPageTokens);
      const int32_t token = paged.pool().positions[row];  // the turn starts at position 0
      bool moved = token >= 0 && token < r.in.turn;
      for (int32_t c = 0; moved && c < shape.head_dim; ++c) {
        moved = paged.Stored(paged.pool().k, row, c) == r.in.Key(kv, token)[c] &&
                paged.Stored(paged.pool().v, row, c) == r.in.Value(kv, token)[c];
      }
      tokens.push_back(moved ? token : -1);
    }
    CompareTokens(r, kv, tokens, f);
  }
}

// `workers`: of the CPU backend; null: another backend.
Findings Compare(const Reference& r, cpu::Workers* workers, Backend& backend) {
  const int32_t kept = std::min(r.in.turn, r.kv.budget);
  PagedLayer paged(r.in, r.policy, r.kv.window, /*seed=*/1);
  const std::vector<int32_t> fresh = paged.AddPages(r.in.shape.kv_heads * PagesFor(kept));
  paged.Trace();
  paged.Step(0, r.in.turn);
  Findings findings;
  if (workers) {
    cpu::SelectCapture capture;
    capture.columns = r.blocks;
    cpu::SelectBlocks(*workers, paged.Select(), &capture);
    CompareCapture(r, capture, &findings);
  }
  PagedMirror mirror(backend, paged);
  if (!workers) mirror.SelectBlocks();
  const SegmentHeads not_causal = CompareSelection(r, workers != nullptr, paged, &findings);
  mirror.PutLists();
  CompareAttention(r, mirror.PrefillAttention(), not_causal, &findings);
  const std::vector<int32_t> counts =
      mirror.Compress(r.kv, kept, std::min(r.kv.window, r.in.turn), fresh);
  CompareCompression(r, paged, counts, fresh, &findings);
  return findings;
}

// with_p: the backend shows p.
void Print(const std::string& path, const Findings& f, bool with_p) {
  const std::string p = with_p ? absl::StrFormat("%.1e", double(f.p)) : "not seen";
  std::printf(
      "%s: largest error p %s, entropy %.1e, out %.1e; differ: budgets %d, ranks %d (ties %d), "
      "tokens %d (ties %d): %s\n",
      path.substr(path.rfind('/') + 1).c_str(), p.c_str(), double(f.entropy), double(f.out),
      f.budgets, f.blocks, f.block_ties, f.tokens, f.token_ties, f.ok() ? "ok" : "WRONG");
  if (f.not_causal > 0) {
    std::printf(
        "  out not compared for %d (segment, kv head): the reference's ties fell on blocks "
        "that the segment cannot see\n",
        f.not_causal);
  }
}

// The largest of every reference that could be read.
Backend::Limits LimitsOf(const std::vector<absl::StatusOr<Reference>>& references) {
  Backend::Limits limits;
  limits.max_seqs = limits.vocab = 1;
  for (const auto& r : references) {
    if (!r.ok()) continue;
    const AttentionShape& s = r->in.shape;
    AttentionShape& most = limits.shape;
    most = {.layers = 1,
            .heads = std::max(most.heads, s.heads),
            .kv_heads = std::max(most.kv_heads, s.kv_heads),
            .head_dim = std::max(most.head_dim, s.head_dim)};
    // Operators expect segments of 128 tokens at least; these may be shorter.
    limits.max_rows = std::max<int64_t>(limits.max_rows, int64_t{r->segments} * 1024);
    limits.max_context = std::max<int64_t>(limits.max_context, int64_t{r->segments} * 1024);
  }
  return limits;
}

absl::StatusOr<bool> CheckFiles(const std::string& backend_name,
                                const std::vector<std::string>& paths) {
  constexpr int kThreads = 2;
  const bool outside = backend_name == "cpu-outside";
  ASSIGN_OR_RETURN(const BackendChoice choice,
                   MakeBackend(outside ? "cpu" : backend_name, kThreads));
  const bool inside = choice.name == "cpu" && !outside;
  cpu::Workers workers(kThreads);
  std::vector<absl::StatusOr<Reference>> references;
  for (const std::string& path : paths) references.push_back(Read(path));
  choice.backend->Reserve(LimitsOf(references));
  bool all_ok = true;
  for (size_t i = 0; i < paths.size(); ++i) {
    if (!references[i].ok()) {
      const std::string message(references[i].status().message());
      std::fprintf(stderr, "%s: %s\n", paths[i].c_str(), message.c_str());
      all_ok = false;
      continue;
    }
    const Findings findings = Compare(*references[i], inside ? &workers : nullptr, *choice.backend);
    Print(paths[i], findings, inside);
    all_ok = all_ok && findings.ok();
  }
  return all_ok;
}

int Main(int argc, char** argv) {
  std::string backend = "cpu";
  std::vector<std::string> paths(argv + 1, argv + argc);
  constexpr std::string_view kBackendFlag = "--backend=";
  if (!paths.empty() && paths[0].starts_with(kBackendFlag)) {
    backend = paths[0].substr(kBackendFlag.size());
    paths.erase(paths.begin());
  }
  if (paths.empty()) {
    std::fprintf(stderr,
                 "usage: policy_check [--backend=cpu|cuda|cpu-outside] FILE.safetensors...\n");
    return 2;
  }
  const absl::StatusOr<bool> ok = CheckFiles(backend, paths);
  if (!ok.ok()) {
    std::fprintf(stderr, "policy_check: %s\n", std::string(ok.status().message()).c_str());
    return 2;
  }
  return *ok ? 0 : 1;
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) { return entropyserve::Main(argc, argv); }
