// smollm2_check MODEL.gguf [cpu|cuda] [f32|bf16]: continues five prompts greedily on
// SmolLM2-135M-Instruct and compares every token, and the lead of the top logit over the second,
// with another engine on the same file in f32 (golden/smollm2_greedy.json; golden/README.md says
// how it is made). Exits 1 where they differ. In bf16 an answer is compared up to the first token
// whose lead is within bf16's tolerance.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/model_testing.h"

namespace entropyserve {
namespace {

// Of max |logit|, as for the tiny models: the lead is a difference of two logits, and its golden
// value is rounded to four digits.
constexpr double kTolerance = 2e-4;
constexpr double kBF16Tolerance = 1e-2;
constexpr double kRounding = 5e-5;
constexpr int64_t kChunk = 512;   // tokens, one segment; logits of a whole chunk are computed
constexpr int64_t kPages = 8192;  // 30 layers, 3 kv heads, 65 pages of 64 tokens, and room

struct Top {
  int32_t token;
  double lead;   // over the second
  double scale;  // max |logit|
};

Top TopOf(const float* logits, size_t vocab) {
  size_t best = 0;
  double scale = 0;
  for (size_t i = 0; i < vocab; ++i) {
    if (logits[i] > logits[best]) best = i;
    scale = std::max(scale, std::abs(double(logits[i])));
  }
  double second = -INFINITY;
  for (size_t i = 0; i < vocab; ++i) {
    if (i != best) second = std::max(second, double(logits[i]));
  }
  return {int32_t(best), logits[best] - second, scale};
}

// True when all tokens and leads agree.
bool CheckPrompt(TestModel* model, const nlohmann::json& golden) {
  const std::vector<int32_t> prompt = golden.at("token_ids"), expected = golden.at("greedy");
  const std::vector<double> leads = golden.at("margins");
  const size_t vocab = size_t(model->model->config().vocab);
  TestSequence sequence(model, prompt, *PrefillPreset("full", "check"), *KvPreset("full", "check"),
                        int64_t(expected.size()));
  std::vector<float> logits;
  while (sequence.left() > 0) {
    logits = RunStep(model, {{&sequence, std::min(kChunk, sequence.left())}})[0];
  }
  const bool bf16 = model->model->dtype() == DType::kBF16;
  const double tolerance = bf16 ? kBF16Tolerance : kTolerance;
  size_t agreed = 0, compared = 0;
  double worst = 0;  // error of a lead, of max |logit|
  bool leads_agree = true;
  for (size_t i = 0; i < expected.size(); ++i) {
    const Top top = TopOf(logits.data() + logits.size() - vocab, vocab);
    if (bf16 && leads[i] <= tolerance * top.scale) break;
    ++compared;
    const double error = std::abs(top.lead - leads[i]);
    worst = std::max(worst, error / top.scale);
    leads_agree &= error <= tolerance * top.scale + kRounding;
    if (top.token != expected[i]) break;
    ++agreed;
    logits = Decode(model, &sequence, top.token);
  }
  const bool ok = agreed == compared && leads_agree;
  std::printf("%-12s %5zu tokens, %zu of %zu greedy tokens agree, largest error %.1e of max: %s\n",
              golden.at("name").get<std::string>().c_str(), prompt.size(), agreed, compared, worst,
              ok ? "ok" : "WRONG");
  return ok;
}

int Main(const char* path, const std::string& backend, DType dtype) {
  std::ifstream in(GoldenPath("smollm2_greedy.json"));
  const nlohmann::json golden = nlohmann::json::parse(in);
  TestModel model = LoadTestModel(path, dtype, kChunk, kPages, backend);
  std::printf("%s, %s\n", model.backend->Description().c_str(), Name(dtype));
  bool ok = true;
  for (const nlohmann::json& prompt : golden.at("prompts")) ok &= CheckPrompt(&model, prompt);
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  const std::string backend = argc > 2 ? argv[2] : "cpu", dtype = argc > 3 ? argv[3] : "f32";
  if (argc < 2 || argc > 4 || (dtype != "f32" && dtype != "bf16")) {
    std::fprintf(stderr,
                 "usage: smollm2_check SmolLM2-135M-Instruct.Q4_1.gguf [cpu|cuda] [f32|bf16]\n");
    return 2;
  }
  return entropyserve::Main(
      argv[1], backend, dtype == "f32" ? entropyserve::DType::kF32 : entropyserve::DType::kBF16);
}
