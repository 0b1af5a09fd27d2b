#include "tests/model_testing.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "engine/make_backend.h"
#include "engine/weights/synthetic.h"
#include "kernels/check.h"

namespace entropyserve {

std::string TestBackend() {
  const char* name = std::getenv("ES_TEST_BACKEND");
  return name ? name : "cpu";
}

TestModel LoadTestModel(const std::string& path, DType dtype, int64_t rows, int64_t pages,
                        const std::string& backend, bool e4m3_linears) {
  constexpr int kThreads = 2;
  TestModel t;
  auto choice = MakeBackend(backend, kThreads);
  if (!choice.ok()) std::fprintf(stderr, "%s\n", choice.status().ToString().c_str());
  Check(choice.ok(), "test backend");
  t.backend = std::move(choice->backend);
  auto checkpoint = path.starts_with(kSyntheticPrefix)
                        ? OpenSynthetic(path.substr(kSyntheticPrefix.size()))
                        : Checkpoint::Open(path);
  if (!checkpoint.ok()) std::fprintf(stderr, "%s\n", checkpoint.status().ToString().c_str());
  Check(checkpoint.ok(), "golden checkpoint");
  t.checkpoint = *std::move(checkpoint);
  auto model = Transformer::Load(*t.checkpoint, t.backend.get(),
                                 {.dtype = dtype,
                                  .e4m3_linears = e4m3_linears,
                                  .step_rows = rows,
                                  .max_context = 8192,
                                  .max_seqs = rows});
  if (!model.ok()) std::fprintf(stderr, "%s\n", model.status().ToString().c_str());
  Check(model.ok(), "golden model");
  t.model = *std::move(model);
  auto pool = PagePool::Create(t.backend.get(), dtype, t.model->config().head_dim, pages);
  Check(pool.ok(), "test pool");
  t.pool = *std::move(pool);
  return t;
}

TestSequence::TestSequence(TestModel* model, std::vector<int32_t> prompt, PrefillPolicy prefill,
                           KvPolicy kv, int64_t max_new)
    : TestSequence(model,
                   std::make_unique<SequenceCache>(model->backend.get(), model->pool.get(),
                                                   model->model->shape()),
                   std::move(prompt), std::move(prefill), std::move(kv), max_new) {}

TestSequence::TestSequence(TestModel*, std::unique_ptr<SequenceCache> cache,
                           std::vector<int32_t> prompt, PrefillPolicy prefill, KvPolicy kv,
                           int64_t max_new) {
  sequence_.owned = std::move(cache);
  sequence_.cache = sequence_.owned.get();
  sequence_.input = std::move(prompt);
  sequence_.plan = {.prompt = int64_t(sequence_.input.size()),
                    .max_new = max_new,
                    .prefill = prefill.params,
                    .kv = kv.params,
                    .keep = true,
                    .trace = true};
  sequence_.request.prefill = std::move(prefill);
  sequence_.request.kv = std::move(kv);
  Check(sequence_.cache->BeginTurn(sequence_.plan).ok(), "pages for the test");
}

std::vector<std::vector<float>> RunStep(TestModel* model,
                                        const std::vector<std::pair<TestSequence*, int64_t>>& work,
                                        int64_t last) {
  StepBatch step(model->backend.get());
  step.Clear();
  int64_t rows = 0;
  for (const auto& [test, tokens] : work) {
    Sequence& s = test->sequence_;
    s.cache->Append(tokens);
    step.Add(&s, tokens, s.prefilling(), false, {});
    rows += tokens;
  }
  Check(model->model->EnsureRows(rows).ok() && step.Upload(), "memory for the test");
  std::vector<int32_t> wanted;
  int64_t end = 0;
  for (const auto& [test, tokens] : work) {
    end += tokens;
    for (int64_t i = std::min(last, tokens); i > 0; --i) wanted.push_back(int32_t(end - i));
  }
  const int64_t n = int64_t(wanted.size());
  DeviceArray<int32_t> logit_rows(model->backend.get(), n + 1);
  model->backend->CopyIn(logit_rows.data(), wanted.data(), n * sizeof(int32_t));
  const float* logits =
      model->model->Forward(step.batch(), model->pool->kv(), logit_rows.data(), n);
  const int64_t vocab = model->model->config().vocab;
  std::vector<std::vector<float>> out;
  for (const auto& [test, tokens] : work) {
    out.emplace_back(std::min(last, tokens) * vocab);
    model->backend->CopyOut(out.back().data(), logits, out.back().size() * sizeof(float));
    logits += std::min(last, tokens) * vocab;
    Sequence& s = test->sequence_;
    s.cache->Advance(tokens);
    if (s.prefilling()) s.prefilled += tokens;
  }
  return out;
}

std::vector<float> Decode(TestModel* model, TestSequence* sequence, int32_t token) {
  sequence->sequence_.last_token = token;
  return RunStep(model, {{sequence, 1}})[0];
}

double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  Check(a.size() == b.size() && !a.empty(), "sizes");
  double worst = 0, scale = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i])) return INFINITY;
    worst = std::max(worst, std::abs(double(a[i]) - double(b[i])));
    scale = std::max(scale, std::abs(double(b[i])));
  }
  return worst / scale;
}

}  // namespace entropyserve
