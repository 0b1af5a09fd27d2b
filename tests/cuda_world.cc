#include "cuda_world.h"

#include <cstdlib>

namespace entropyserve {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float Rounded(float x, DType dtype) { return dtype == DType::kF32 ? x : FromBF16(ToBF16(x)); }

std::unique_ptr<Backend> MakeCuda(bool portable_only) {
  CudaOptions options;
  options.pool_bytes = size_t{3} << 30;
  options.portable_only = portable_only;
  std::string error;
  std::unique_ptr<Backend> backend = MakeCudaBackend(options, &error);
  if (!backend) {
    std::fprintf(stderr, "%s\n", error.c_str());
    std::abort();
  }
  Backend::Limits limits;
  limits.shape = {.layers = 2, .heads = 32, .kv_heads = 32, .head_dim = 128};
  limits.max_rows = 8192;
  limits.max_context = 65536;
  limits.max_seqs = 64;
  limits.vocab = 160000;
  backend->Reserve(limits);
  return backend;
}

}  // namespace

Backend& Cpu() {
  static const std::unique_ptr<Backend> backend = MakeCpuBackend(0);
  return *backend;
}
Backend& Cuda() {
  static const std::unique_ptr<Backend> backend = MakeCuda(false);
  return *backend;
}
Backend& PortableCuda() {
  static const std::unique_ptr<Backend> backend = MakeCuda(true);
  return *backend;
}

World::World(AttentionShape s, DType type, std::vector<SeqSpec> seq_specs, uint32_t seed)
    : shape(s), dtype(type), layer(s.layers - 1), specs(std::move(seq_specs)) {
  std::mt19937 rng(seed);
  const int32_t heads = s.layers * s.kv_heads, d = s.head_dim;
  struct Need {
    int32_t pages = 0, bounds = 0, window = 0;
  };
  std::vector<Need> needs;
  for (size_t i = 0; i < specs.size(); ++i) {
    const SeqSpec& spec = specs[i];
    const int32_t turn = spec.before + spec.rows;
    Need need;
    for (int32_t kv = 0; kv < s.kv_heads; ++kv) {
      need.pages = std::max(need.pages, PagesFor(Past(i, kv)) + PagesFor(turn));
    }
    if (spec.bounds) need.bounds = PagesFor(CeilDiv(turn, spec.policy.block));
    if (spec.window > 0) need.window = CeilDiv(spec.window * s.group(), 2 * kPageTokens);
    pages += heads * (need.pages + need.bounds + need.window);
    rows += spec.rows;
    needs.push_back(need);
  }
  std::vector<int32_t> free_pages(size_t(pages), 0);
  std::iota(free_pages.begin(), free_pages.end(), 0);
  std::shuffle(free_pages.begin(), free_pages.end(), rng);
  const auto take = [&](int32_t n) {
    std::vector<int32_t> table(free_pages.end() - n, free_pages.end());
    free_pages.resize(free_pages.size() - size_t(n));
    return table;
  };
  k.assign(size_t(pages) * kPageTokens * d, kNan);
  v = k;
  positions.assign(size_t(pages) * kPageTokens, -7);
  std::normal_distribution<float> normal(0, 1);
  // Keys lean towards some common directions by a random amount, so that attention has structure.
  const std::vector<float> direction = RandomFloats(rng, d);
  const auto fill = [&](float* x, float lean) {
    for (int32_t c = 0; c < d; ++c)
      x[c] = Rounded(normal(rng) + lean * direction[size_t(c)], dtype);
  };
  for (size_t i = 0; i < specs.size(); ++i) {
    const SeqSpec& spec = specs[i];
    Tables t{take(heads * needs[i].pages),
             take(heads * needs[i].bounds),
             take(heads * needs[i].window),
             {}};
    for (int32_t layer_index = 0; layer_index < s.layers; ++layer_index) {
      for (int32_t kv = 0; kv < s.kv_heads; ++kv) {
        t.lengths.push_back({Past(i, kv), spec.turn_total == 0 ? spec.before : 0});
        if (layer_index != layer) continue;
        const int64_t head = int64_t{layer_index} * s.kv_heads + kv;
        HeadView view;
        view.pages = t.pages.data() + head * needs[i].pages;
        view.bounds = t.bounds.data() + head * needs[i].bounds;
        view.window_pages = t.window.data() + head * needs[i].window;
        view.past = Past(i, kv);
        view.turn_page = PagesFor(view.past);
        const int32_t length = view.past + spec.before + spec.rows;
        for (int32_t token = 0; token < length; ++token) {
          const int64_t row = view.Row(token);
          fill(&k[size_t(row * d)], 0.4f * normal(rng));
          fill(&v[size_t(row * d)], 0);
          positions[size_t(row)] = token;
          if (!spec.bounds || token < view.past) continue;
          const int32_t in_turn = token - view.past;
          const int64_t bounds = view.BoundsRow(in_turn / spec.policy.block) * d;
          for (int32_t c = 0; c < d; ++c) {
            float &high = k[size_t(bounds + c)], &low = v[size_t(bounds + c)];
            const float x = k[size_t(row * d + c)];
            if (in_turn % spec.policy.block == 0) high = low = x;
            high = std::max(high, x);
            low = std::min(low, x);
          }
        }
        for (int32_t slot = 0; slot < spec.window * s.group(); ++slot) {
          const WindowSlot at = WindowRow(view.window_pages, slot);
          fill(&(at.k_half ? k : v)[size_t(at.row * d)], 0.3f * normal(rng));
        }
      }
    }
    tables.push_back(std::move(t));
  }
  q.resize(size_t(rows) * s.heads * d);
  for (size_t i = 0; i < q.size(); i += size_t(d)) fill(&q[i], 0.3f * normal(rng));
  qkv = RandomFloats(rng, int64_t{rows} * (s.heads + 2 * s.kv_heads) * d);
}

Side::Side(Backend& backend, const World& w) : arena(backend), world(w) {
  const AttentionShape& s = w.shape;
  pool.k = arena.PutFloats(w.k, w.dtype);
  pool.v = arena.PutFloats(w.v, w.dtype);
  pool.positions = arena.Put(w.positions);
  pool.dtype = w.dtype;
  pool.head_dim = s.head_dim;
  pool.pages = w.pages;
  q = arena.PutFloats(w.q, w.dtype);
  out = arena.Poisoned(OutElements(), w.dtype);
  probe_out = static_cast<float*>(arena.Poisoned(OutElements(), DType::kF32));
  const int32_t heads = s.layers * s.kv_heads;
  int32_t row = 0, most_blocks = 1;
  std::vector<int32_t> row_seq;
  for (size_t i = 0; i < w.specs.size(); ++i) {
    const SeqSpec& spec = w.specs[i];
    const World::Tables& t = w.tables[i];
    BatchSeq seq;
    seq.pages = arena.Put(t.pages);
    seq.max_pages = int32_t(t.pages.size()) / heads;
    if (spec.bounds) seq.bounds = arena.Put(t.bounds);
    seq.max_bounds = int32_t(t.bounds.size()) / heads;
    if (spec.window > 0) seq.window_pages = arena.Put(t.window);
    seq.max_window_pages = int32_t(t.window.size()) / heads;
    seq.window = spec.window;
    seq.lengths = arena.Put(t.lengths);
    seq.row_begin = row;
    seq.rows = spec.rows;
    seq.appended = spec.turn_total == 0 ? 0 : spec.before;
    const int32_t longest =
        spec.past.empty() ? 0 : *std::max_element(spec.past.begin(), spec.past.end());
    seq.position = longest + spec.before + 3;  // compression left holes: position is not length
    seq.turn_total = spec.turn_total;
    seq.policy = spec.policy;
    if (spec.turn_total > 0) {
      HeadState state;  // a later chunk goes on from what an earlier one left
      if (spec.before > 0) {
        state = {1.5f, 1.2f * float(spec.policy.base), spec.before / spec.policy.segment, 1};
      }
      seq.states = arena.Put(std::vector<HeadState>(size_t(heads), state));
      seq.counters = arena.Put(std::vector<SeqCounters>(1));
      seq.trace_segments = CeilDiv(spec.turn_total, spec.policy.segment);
      const size_t n = size_t(heads) * size_t(seq.trace_segments);
      seq.trace_entropy = arena.Put(std::vector<float>(n, -1));
      seq.trace_budget = arena.Put(std::vector<float>(n, -1));
      seq.trace_selected = arena.Put(std::vector<int32_t>(n, -2));
      for (int32_t done = 0; done < spec.rows; done += spec.policy.segment) {
        segments.push_back({int32_t(i), row + done, std::min(spec.policy.segment, spec.rows - done),
                            (spec.before + done) / spec.policy.segment});
      }
      most_blocks = std::max(most_blocks, CeilDiv(spec.turn_total, spec.policy.block));
    } else {
      decodes.push_back(int32_t(i));
    }
    row_seq.insert(row_seq.end(), size_t(spec.rows), int32_t(i));
    row += spec.rows;
    seqs.push_back(seq);
  }
  batch.rows = w.rows;
  batch.num_seqs = int32_t(seqs.size());
  batch.num_segments = int32_t(segments.size());
  batch.num_decodes = int32_t(decodes.size());
  batch.seqs = seqs.data();
  batch.segments = segments.data();
  batch.decodes = decodes.data();
  batch.device_seqs = arena.Put(seqs);
  batch.device_segments = arena.Put(segments);
  batch.device_decodes = arena.Put(decodes);
  batch.row_seq = arena.Put(row_seq);
  const size_t lists_rows = segments.size() * size_t(s.kv_heads);
  lists.capacity = most_blocks;
  lists.counts = arena.Put(std::vector<int32_t>(lists_rows, -1));
  lists.blocks = arena.Put(std::vector<int32_t>(lists_rows * size_t(most_blocks), -9));
}

void Side::SelectBlocks() {
  arena.backend.SelectBlocks({.batch = &batch,
                              .pool = pool,
                              .shape = world.shape,
                              .layer = world.layer,
                              .q = q,
                              .lists = lists,
                              .probe_out = probe_out});
  arena.backend.Synchronize();
}

void Side::PrefillAttention() {
  arena.backend.PrefillAttention({.batch = &batch,
                                  .pool = pool,
                                  .shape = world.shape,
                                  .layer = world.layer,
                                  .q = q,
                                  .lists = lists,
                                  .probe_out = probe_out,
                                  .out = out});
  arena.backend.Synchronize();
}

void Side::DecodeAttention() {
  arena.backend.DecodeAttention({.batch = &batch,
                                 .pool = pool,
                                 .shape = world.shape,
                                 .layer = world.layer,
                                 .q = q,
                                 .out = out});
  arena.backend.Synchronize();
}

}  // namespace entropyserve
