// Runs a Transformer over its own paged cache, one sequence or several, and returns raw logits of
// every row. For tests only: the engine's own loop samples on the backend and reads no logits back.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "engine/cache/page_pool.h"
#include "engine/cache/sequence_cache.h"
#include "engine/model/transformer.h"
#include "engine/policy/policy.h"
#include "engine/step_batch.h"
#include "engine/weights/checkpoint.h"
#include "kernels/backend.h"

namespace entropyserve {

// ES_GOLDEN_DIR moves the golden files, for tests that run away from its sources.
inline std::string GoldenPath(const std::string& name) {
  if (const char* folder = std::getenv("ES_GOLDEN_DIR")) return std::string(folder) + "/" + name;
  return std::string(ES_SOURCE_DIR) + "/tests/golden/" + name;
}

// A model with its backend and pool. CHECK-fails (aborts) when the files are not there.
struct TestModel {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<Transformer> model;
  std::unique_ptr<PagePool> pool;
};

// What ES_TEST_BACKEND says, as --backend; cpu without it.
std::string TestBackend();

// `path`: a checkpoint's, or synthetic:SHAPE. `rows`: the largest step; every row of it may ask for
// logits. `backend`: as --backend.
TestModel LoadTestModel(const std::string& path, DType dtype, int64_t rows = 256,
                        int64_t pages = 4096, const std::string& backend = TestBackend(),
                        bool e4m3_linears = false);

// One sequence on a TestModel. Several may share a step: see RunStep.
class TestSequence {
 public:
  TestSequence(TestModel* model, std::vector<int32_t> prompt, PrefillPolicy prefill, KvPolicy kv,
               int64_t max_new);
  // Continues a cache that an earlier turn left.
  TestSequence(TestModel* model, std::unique_ptr<SequenceCache> cache, std::vector<int32_t> prompt,
               PrefillPolicy prefill, KvPolicy kv, int64_t max_new);

  SequenceCache& cache() { return *sequence_.cache; }
  std::unique_ptr<SequenceCache> TakeCache() { return std::move(sequence_.owned); }
  int64_t left() const { return int64_t(sequence_.input.size()) - sequence_.prefilled; }

 private:
  friend std::vector<std::vector<float>> RunStep(
      TestModel*, const std::vector<std::pair<TestSequence*, int64_t>>&, int64_t);
  friend std::vector<float> Decode(TestModel*, TestSequence*, int32_t);
  Sequence sequence_;
};

// Runs `tokens` of each sequence's prefill (or, for a finished prefill, its next token) in one
// batch. Returns logits [min(last, tokens), vocab] of each sequence's last rows.
std::vector<std::vector<float>> RunStep(TestModel* model,
                                        const std::vector<std::pair<TestSequence*, int64_t>>& work,
                                        int64_t last = int64_t{1} << 30);
// Feeds `token` to a sequence whose prefill is done; logits [vocab].
std::vector<float> Decode(TestModel* model, TestSequence* sequence, int32_t token);

// max |a - b| / max |b|.
double RelativeError(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace entropyserve
