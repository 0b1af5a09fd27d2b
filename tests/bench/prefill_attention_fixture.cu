#include "tests/bench/prefill_attention_fixture.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <string>

#include "kernels/kv_view.h"

namespace entropyserve::bench {
namespace {

__device__ inline float HashNormal(uint64_t i, uint32_t seed) {  // mean 0, variance 1, bounded
  float sum = 0;
  uint64_t x = i * 0x9e3779b97f4a7c15u + seed;
  for (int k = 0; k < 4; ++k) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    sum += float(uint32_t(x)) * 0x1p-32f - 0.5f;
  }
  return sum * 1.7320508f;
}

__device__ inline uint16_t RoundBF16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ inline float WidenBF16(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }

__global__ void FillKernel(uint16_t* x, int64_t n, float scale, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x)
    x[i] = RoundBF16(scale * HashNormal(i, seed));
}

// Random K and V for tokens [0, tokens) of a run. One CTA per page.
__global__ void FillRunKernel(uint16_t* k, uint16_t* v, const int32_t* pages, int32_t tokens,
                              int32_t d, uint32_t seed) {
  const int32_t valid = min(kPageTokens, tokens - int32_t(blockIdx.x) * kPageTokens);
  const int64_t base = int64_t{pages[blockIdx.x]} * kPageTokens * d;
  for (int32_t i = threadIdx.x; i < valid * d; i += blockDim.x) {
    k[base + i] = RoundBF16(HashNormal(base + i, seed));
    v[base + i] = RoundBF16(HashNormal(base + i, seed + 1) + 0.25f);
  }
}

// One warp per row of a pair; keys one after another, online softmax in fp32. out: [pairs,
// max_rows, d].
__global__ void ReferenceKernel(PrefillAttentionParams p, const BatchSeq* seqs,
                                const BatchSegment* segments, const ReferencePair* pairs,
                                int32_t max_rows, float* out) {
  const ReferencePair pair = pairs[blockIdx.x];
  const BatchSegment segment = segments[pair.segment];
  const BatchSeq& seq = seqs[segment.seq];
  const int32_t i = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (i >= segment.rows) return;
  const int32_t d = p.shape.head_dim, group = p.shape.heads / p.shape.kv_heads,
                kv_head = pair.head / group;
  const int64_t head = int64_t{p.layer} * p.shape.kv_heads + kv_head;
  const int64_t list = int64_t{pair.segment} * p.shape.kv_heads + kv_head;
  const int32_t* pages = seq.pages + head * seq.max_pages;
  const int32_t past = seq.lengths[head].past, turn_page = (past + kPageTokens - 1) / kPageTokens;
  const int32_t own = seq.appended + segment.row_begin - seq.row_begin;
  const int32_t count = p.lists.counts[list], block = seq.policy.block;
  const int32_t earlier = count < 0 ? own : count * block;
  const auto* q = static_cast<const uint16_t*>(p.q) +
                  ((int64_t{segment.row_begin} + i) * p.shape.heads + pair.head) * d;
  const auto* k = static_cast<const uint16_t*>(p.pool.k);
  const auto* v = static_cast<const uint16_t*>(p.pool.v);

  float query[4] = {}, o[4] = {}, top = -INFINITY, sum = 0;
  for (int c = 0; c < d / 32; ++c) query[c] = WidenBF16(q[lane + 32 * c]);
  for (int32_t t = 0; t < past + earlier + i + 1; ++t) {
    int32_t page = t / kPageTokens, token = t;
    if (t >= past) {
      token = t - past;
      if (token >= earlier)
        token += own - earlier;
      else if (count >= 0)
        token = p.lists.blocks[list * p.lists.capacity + token / block] * block + token % block;
      page = turn_page + token / kPageTokens;
    }
    const int64_t at = (int64_t{pages[page]} * kPageTokens + token % kPageTokens) * d;
    float score = 0;
    for (int c = 0; c < d / 32; ++c) score += query[c] * WidenBF16(k[at + lane + 32 * c]);
    for (int x = 16; x > 0; x /= 2) score += __shfl_xor_sync(0xffffffff, score, x);
    score *= rsqrtf(float(d));
    const float higher = fmaxf(top, score), decay = expf(top - higher),
                weight = expf(score - higher);
    top = higher;
    sum = sum * decay + weight;
    for (int c = 0; c < d / 32; ++c)
      o[c] = o[c] * decay + weight * WidenBF16(v[at + lane + 32 * c]);
  }
  for (int c = 0; c < d / 32; ++c)
    out[(int64_t{blockIdx.x} * max_rows + i) * d + lane + 32 * c] = o[c] / sum;
}

int32_t Uniform(std::mt19937& random, int32_t low, int32_t high) {
  return std::uniform_int_distribution<int32_t>(low, high)(random);
}

// `count` of [0, n), ascending.
std::vector<int32_t> Ascending(std::mt19937& random, int32_t n, int32_t count) {
  std::vector<int32_t> chosen;
  if (count < n / 8) {  // draw until enough differ
    std::vector<bool> taken(n);
    while (int32_t(chosen.size()) < count) {
      const int32_t i = Uniform(random, 0, n - 1);
      if (!taken[i]) chosen.push_back(i);
      taken[i] = true;
    }
    std::sort(chosen.begin(), chosen.end());
    return chosen;
  }
  for (int32_t i = 0; i < n && int32_t(chosen.size()) < count; ++i) {  // Knuth's selection sampling
    if (Uniform(random, 0, n - i - 1) < count - int32_t(chosen.size())) chosen.push_back(i);
  }
  return chosen;
}

}  // namespace

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--check") {
      options.check = true;
    } else if (arg == "--small") {
      options.small = true;
    } else if (arg == "--time") {
      options.time = true;
    } else if (arg.starts_with("--ceiling=")) {
      options.ceiling = std::atof(arg.c_str() + 10);
    } else if (arg.starts_with("--lengths=")) {
      options.lengths.clear();
      std::istringstream list(arg.substr(10));
      for (std::string length; std::getline(list, length, ',');)
        options.lengths.push_back(std::stoi(length));
    } else if (arg == "--head_dim=64" || arg == "--head_dim=128") {
      options.head_dim = std::stoi(arg.substr(11));
    } else {
      std::fprintf(stderr, "unknown argument %s\n", arg.c_str());
      std::exit(2);
    }
  }
  if (!options.check && !options.small && !options.time) options.check = options.time = true;
  return options;
}

Problem::Problem(const AttentionShape& shape, const std::vector<SeqSpec>& specs,
                 const ListSpec& lists, uint32_t seed)
    : shape_(shape), specs_(specs), seed_(seed) {
  std::mt19937 random(seed);
  MakeSequences(lists, random);
  const size_t values = size_t(batch_.rows) * shape.heads * shape.head_dim;
  q_ = DeviceArray<uint16_t>(values);
  out_ = DeviceArray<uint16_t>(values);
  FillKernel<<<1024, 256>>>(q_.get(), int64_t(values), 1.5f, seed + 17);
  params_.batch = &batch_;
  params_.shape = shape;
  params_.layer = shape.layers - 1;
  params_.q = q_.get();
  params_.out = out_.get();
  MakeLists(lists, random);
  Must(cudaDeviceSynchronize());
}

void Problem::MakeSequences(const ListSpec& lists, std::mt19937& random) {
  const int32_t heads = shape_.layers * shape_.kv_heads, d = shape_.head_dim;
  int64_t pages = 0;
  for (int32_t n = 0; n < int32_t(specs_.size()); ++n) {
    const SeqSpec& spec = specs_[n];
    BatchSeq seq;
    std::vector<HeadLength> lengths(heads);
    for (HeadLength& length : lengths) {
      length.past = Uniform(random, 0, spec.max_past);
      const int32_t used =
          CeilDiv(length.past, kPageTokens) + CeilDiv(spec.appended + spec.rows, kPageTokens);
      seq.max_pages = std::max(seq.max_pages, used);
    }
    pages += int64_t{heads} * seq.max_pages;
    seq.row_begin = batch_.rows;
    seq.rows = spec.rows;
    seq.appended = spec.appended;
    seq.position = spec.max_past + spec.appended;
    seq.turn_total = spec.decode ? 0 : spec.appended + spec.rows;
    seq.policy.segment = spec.segment;
    seq.policy.block = spec.block;
    seq.policy.correction = spec.correction;
    seq.policy.first_sparse_layer = 0;
    seq.policy.dense_prefix = lists.dense_prefix;
    seq.policy.dense_suffix = lists.dense_suffix;
    for (int32_t at = 0; !spec.decode && at < spec.rows; at += spec.segment)
      segments_.push_back({n, batch_.rows + at, std::min(spec.segment, spec.rows - at),
                           (spec.appended + at) / spec.segment});
    batch_.rows += spec.rows;
    lengths_.push_back(lengths);
    seqs_.push_back(seq);
  }
  pages += 3;
  std::vector<int32_t> order(pages);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  k_ = DeviceArray<uint16_t>(pages * kPageTokens * d);
  v_ = DeviceArray<uint16_t>(pages * kPageTokens * d);
  k_.Fill(0xff);
  v_.Fill(0xff);
  int64_t next = 0;
  for (size_t n = 0; n < specs_.size(); ++n) {
    BatchSeq& seq = seqs_[n];
    const int64_t used = int64_t{heads} * seq.max_pages;
    tables_.emplace_back(std::vector<int32_t>(order.begin() + next, order.begin() + next + used));
    next += used;
    device_lengths_.emplace_back(lengths_[n]);
    seq.pages = tables_.back().get();
    seq.lengths = device_lengths_.back().get();
    for (int32_t h = 0; h < heads; ++h) {
      const int32_t past = lengths_[n][h].past, turn = seq.appended + seq.rows;
      const int32_t* table = seq.pages + int64_t{h} * seq.max_pages;
      if (past > 0)
        FillRunKernel<<<CeilDiv(past, kPageTokens), 128>>>(k_.get(), v_.get(), table, past, d,
                                                           seed_);
      FillRunKernel<<<CeilDiv(turn, kPageTokens), 128>>>(
          k_.get(), v_.get(), table + CeilDiv(past, kPageTokens), turn, d, seed_);
    }
  }
  device_seqs_ = DeviceArray<BatchSeq>(seqs_);
  device_segments_ = DeviceArray<BatchSegment>(segments_);
  batch_.num_seqs = int32_t(seqs_.size());
  batch_.num_segments = int32_t(segments_.size());
  batch_.seqs = seqs_.data();
  batch_.segments = segments_.data();
  batch_.device_seqs = device_seqs_.get();
  batch_.device_segments = device_segments_.get();
  params_.pool = {
      .k = k_.get(), .v = v_.get(), .dtype = DType::kBF16, .head_dim = d, .pages = pages};
}

void Problem::MakeLists(const ListSpec& spec, std::mt19937& random) {
  std::vector<std::vector<int32_t>> lists;
  for (const BatchSegment& segment : segments_) {
    const BatchSeq& seq = seqs_[segment.seq];
    const int32_t begin = segment.index * seq.policy.segment;
    const int32_t visible = begin / seq.policy.block;
    for (int32_t h = 0; h < shape_.kv_heads; ++h) {
      const bool dense = std::bernoulli_distribution(spec.dense_share)(random) ||
                         begin < spec.dense_prefix ||
                         begin + segment.rows > seq.turn_total - spec.dense_suffix;
      const int32_t want =
          spec.tokens < 0 ? Uniform(random, 0, visible) : spec.tokens / seq.policy.block;
      lists.push_back(dense ? std::vector<int32_t>()
                            : Ascending(random, visible, std::min(want, visible)));
      counts_.push_back(dense ? -1 : int32_t(lists.back().size()));
    }
  }
  size_t capacity = 1;
  for (const auto& list : lists) capacity = std::max(capacity, list.size());
  std::vector<int32_t> blocks(lists.size() * capacity,
                              -1);  // what is beyond a count must not be read
  for (size_t i = 0; i < lists.size(); ++i)
    std::copy(lists[i].begin(), lists[i].end(), blocks.begin() + i * capacity);
  device_counts_ = DeviceArray<int32_t>(counts_);
  device_blocks_ = DeviceArray<int32_t>(blocks);
  params_.lists = {device_counts_.get(), device_blocks_.get(), int32_t(capacity)};

  bool correction = false;
  for (const SeqSpec& s : specs_) correction |= s.correction > 0;
  if (!correction) return;
  const size_t row = size_t(shape_.heads) * shape_.head_dim;
  std::vector<float> probes(batch_.rows * row, NAN);
  for (const BatchSegment& segment : segments_) {
    const int32_t stride = specs_[segment.seq].correction;
    for (int32_t i = 0; stride > 0 && i < segment.rows; i += stride) {
      for (size_t c = 0; c < row; ++c)
        probes[(segment.row_begin + i) * row + c] = float(Uniform(random, -1000, 1000)) * 1e-3f;
    }
  }
  probes_ = DeviceArray<float>(probes);
  params_.probe_out = probes_.get();
}

void Problem::Poison() { out_.Fill(0xff); }

double Problem::MaskedPairs() const {
  double pairs = 0;
  for (size_t s = 0; s < segments_.size(); ++s) {
    const BatchSegment& segment = segments_[s];
    const BatchSeq& seq = seqs_[segment.seq];
    for (int32_t h = 0; h < shape_.kv_heads; ++h) {
      const int32_t count = counts_[s * shape_.kv_heads + h];
      const double earlier = count < 0 ? seq.appended + segment.row_begin - seq.row_begin
                                       : double(count) * seq.policy.block;
      const double past = Past(segment.seq, h);
      pairs += shape_.group() *
               (segment.rows * (past + earlier) + segment.rows * (segment.rows + 1.0) / 2);
    }
  }
  return pairs;
}

int32_t Problem::StrideOf(const BatchSegment& segment) const {
  const BatchSeq& seq = seqs_[segment.seq];
  return IsDense(seq, segment, params_.layer) ? 0 : std::max(seq.policy.correction, 0);
}

double Problem::ProbePairs() const {
  double pairs = 0;
  for (const BatchSegment& segment : segments_) {
    const BatchSeq& seq = seqs_[segment.seq];
    const int32_t stride = StrideOf(segment);
    if (stride == 0) continue;
    for (int32_t h = 0; h < shape_.kv_heads; ++h) {
      const double before = Past(segment.seq, h) + seq.appended + segment.row_begin - seq.row_begin;
      for (int32_t i = 0; i < segment.rows; i += stride) pairs += shape_.group() * (before + i + 1);
    }
  }
  return pairs;
}

std::vector<float> Problem::Reference(const std::vector<ReferencePair>& pairs, int32_t max_rows,
                                      bool dense) const {
  DeviceArray<ReferencePair> device_pairs(pairs);
  DeviceArray<int32_t> dense_counts(std::vector<int32_t>(counts_.size(), -1));
  PrefillAttentionParams params = params_;
  if (dense) params.lists.counts = dense_counts.get();
  DeviceArray<float> out(pairs.size() * max_rows * shape_.head_dim);
  out.Fill(0xff);
  constexpr int kWarps = 8;
  ReferenceKernel<<<dim3(pairs.size(), CeilDiv(max_rows, kWarps)), kWarps * 32>>>(
      params, device_seqs_.get(), device_segments_.get(), device_pairs.get(), max_rows, out.get());
  Must(cudaGetLastError());
  Must(cudaDeviceSynchronize());
  return out.Host();
}

}  // namespace entropyserve::bench
