// A PagedLayer's step in the memory of any backend: what runs there comes back into the PagedLayer.
#pragma once

#include <algorithm>
#include <vector>

#include "tests/arena.h"
#include "tests/select_testing.h"

namespace entropyserve {

class PagedMirror {
 public:
  // After host.Step(), and after host.Trace() where traces are wanted. Copies all of it.
  PagedMirror(Backend& backend, PagedLayer& host)
      : arena_(backend), host_(host), select_(host.Select()), batch_(*select_.batch) {
    const KvPool& pool = host.pool();
    const size_t rows = size_t(pool.pages) * kPageTokens;
    const size_t half = rows * size_t(pool.head_dim) * SizeOf(pool.dtype);
    pool_ = pool;
    pool_.k = arena_.Put(static_cast<const std::byte*>(pool.k), half);
    pool_.v = arena_.Put(static_cast<const std::byte*>(pool.v), half);
    pool_.positions = arena_.Put(pool.positions, rows);
    seqs_ = {Put(batch_.seqs[0])};
    batch_.seqs = seqs_.data();
    batch_.device_seqs = arena_.Put(seqs_);
    batch_.device_segments = arena_.Put(batch_.segments, size_t(batch_.num_segments));
    lists_ = select_.lists;
    lists_.counts = arena_.Put(select_.lists.counts, Lists());
    lists_.blocks = arena_.Put(select_.lists.blocks, Lists() * size_t(lists_.capacity));
    q_ = arena_.Put(static_cast<const std::byte*>(select_.q), Elements() * SizeOf(pool.dtype));
    probe_out_ = arena_.Put(select_.probe_out, Elements());
  }

  void SelectBlocks() {
    SelectParams p = select_;
    p.batch = &batch_, p.pool = pool_, p.q = q_, p.lists = lists_, p.probe_out = probe_out_;
    arena_.backend.SelectBlocks(p);
    arena_.backend.CopyOut(select_.lists.counts, lists_.counts, Lists() * sizeof(int32_t));
    arena_.backend.CopyOut(select_.lists.blocks, lists_.blocks,
                           Lists() * size_t(lists_.capacity) * sizeof(int32_t));
    if (seqs_[0].trace_entropy) {
      arena_.backend.CopyOut(host_.trace_entropy.data(), seqs_[0].trace_entropy,
                             host_.trace_entropy.size() * sizeof(float));
    }
  }

  // The host's lists, after PagedLayer::Replace.
  void PutLists() {
    arena_.backend.CopyIn(lists_.counts, select_.lists.counts, Lists() * sizeof(int32_t));
    arena_.backend.CopyIn(lists_.blocks, select_.lists.blocks,
                          Lists() * size_t(lists_.capacity) * sizeof(int32_t));
  }

  // [rows, heads, head_dim]
  std::vector<float> PrefillAttention() {
    void* const out = arena_.Poisoned(int64_t(Elements()), pool_.dtype);
    PrefillAttentionParams p = host_.Attention(out);
    p.batch = &batch_, p.pool = pool_, p.q = q_, p.lists = lists_, p.probe_out = probe_out_;
    arena_.backend.PrefillAttention(p);
    return arena_.GetFloats(out, int64_t(Elements()), pool_.dtype);
  }

  // Selects tokens after the prefill and moves them to `fresh` pages, [kv_heads, pages of budget];
  // the host's pool becomes what then lies on the backend. Returns how many were kept, [kv_heads].
  std::vector<int32_t> Compress(const KvParams& kv, int32_t kept, int32_t window_queries,
                                const std::vector<int32_t>& fresh) {
    const AttentionShape& shape = select_.shape;
    const BatchSeq seq = Put(host_.AfterPrefill());
    int32_t* const indices =
        static_cast<int32_t*>(arena_.Bytes(size_t(shape.kv_heads) * kept * sizeof(int32_t)));
    int32_t* const counts =
        static_cast<int32_t*>(arena_.Bytes(size_t(shape.kv_heads) * sizeof(int32_t)));
    arena_.backend.SelectTokens({.seq = &seq,
                                 .pool = pool_,
                                 .shape = shape,
                                 .layer = select_.layer,
                                 .kv = kv,
                                 .budget = kv.budget,
                                 .window_queries = window_queries,
                                 .indices = indices,
                                 .counts = counts,
                                 .capacity = kept});
    arena_.backend.Compact({.seq = &seq,
                            .pool = pool_,
                            .shape = shape,
                            .layer = select_.layer,
                            .indices = indices,
                            .counts = counts,
                            .capacity = kept,
                            .new_pages = arena_.Put(fresh),
                            .max_new_pages = int32_t(fresh.size()) / shape.kv_heads});
    const KvPool& pool = host_.pool();
    const size_t rows = size_t(pool.pages) * kPageTokens;
    const size_t half = rows * size_t(pool.head_dim) * SizeOf(pool.dtype);
    arena_.backend.CopyOut(pool.k, pool_.k, half);
    arena_.backend.CopyOut(pool.v, pool_.v, half);
    arena_.backend.CopyOut(pool.positions, pool_.positions, rows * sizeof(int32_t));
    return arena_.Get(counts, size_t(shape.kv_heads));
  }

 private:
  size_t Lists() const { return size_t(batch_.num_segments) * size_t(select_.shape.kv_heads); }
  size_t Elements() const {
    return size_t(batch_.rows) * size_t(select_.shape.heads * select_.shape.head_dim);
  }

  // A sequence whose arrays lie on the backend.
  BatchSeq Put(BatchSeq seq) {
    const size_t heads = size_t(select_.shape.layers) * size_t(select_.shape.kv_heads);
    const auto put = [&](auto& array, size_t n) {
      if (array) array = arena_.Put(array, heads * n);
    };
    put(seq.pages, size_t(seq.max_pages));
    put(seq.bounds, size_t(seq.max_bounds));
    put(seq.window_pages, size_t(seq.max_window_pages));
    put(seq.lengths, 1);
    put(seq.states, 1);
    put(seq.trace_entropy, size_t(seq.trace_segments));
    put(seq.trace_budget, size_t(seq.trace_segments));
    put(seq.trace_selected, size_t(seq.trace_segments));
    if (seq.counters) seq.counters = arena_.Put(seq.counters, 1);
    return seq;
  }

  Arena arena_;
  PagedLayer& host_;
  const SelectParams select_;  // the host's
  Batch batch_;
  std::vector<BatchSeq> seqs_;
  KvPool pool_;
  BlockLists lists_;
  void* q_ = nullptr;
  float* probe_out_ = nullptr;
};

}  // namespace entropyserve
