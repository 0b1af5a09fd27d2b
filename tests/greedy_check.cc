// greedy_check MODEL.gguf GOLDEN.json [cpu|cuda] [f32|bf16|fp8]: continues the golden's prompts
// greedily and compares every token, and the lead of the top logit over the second. Exits 1 where
// they differ. In bf16, and in bf16 with 8-bit linears (fp8), every answer goes on with the
// golden's token, and the top logit may be another one's where the golden's lead is within
// tolerance. golden/smollm2_greedy.json is another engine's on the same file in f32;
// golden/README.md says how the goldens are made. With --write=N first it computes N tokens of
// every prompt and prints the golden.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
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
constexpr double kBF16Tolerance = 2e-2;
constexpr double kFp8Tolerance = 1e-1;
constexpr double kRounding = 5e-5;
constexpr int64_t kChunk = 512;   // tokens, one segment; logits of a whole chunk are computed
constexpr int64_t kPages = 8192;  // SmolLM2: 30 layers, 3 kv heads, 65 pages of 64 tokens, and room

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

// One prompt, read densely, and its greedy continuation.
class Continuation {
 public:
  Continuation(TestModel* model, const std::vector<int32_t>& prompt, int64_t max_new)
      : model_(model),
        sequence_(model, prompt, *PrefillPreset("full", "check"), *KvPreset("full", "check"),
                  max_new) {
    while (sequence_.left() > 0) {
      logits_ = RunStep(model, {{&sequence_, std::min(kChunk, sequence_.left())}}, 1)[0];
    }
  }
  // Of the token to come.
  Top Next() const { return TopOf(logits_.data(), logits_.size()); }
  void Feed(int32_t token) { logits_ = Decode(model_, &sequence_, token); }

 private:
  TestModel* const model_;
  TestSequence sequence_;
  std::vector<float> logits_;
};

// True when all tokens and leads agree.
bool CheckPrompt(TestModel* model, double tolerance, const nlohmann::json& golden) {
  const std::vector<int32_t> prompt = golden.at("token_ids"), expected = golden.at("greedy");
  const std::vector<double> leads = golden.at("margins");
  Continuation answer(model, prompt, int64_t(expected.size()));
  const bool exact = model->model->dtype() == DType::kF32;
  size_t agreed = 0;
  double worst = 0;  // error of a lead, of max |logit|
  bool ok = true;
  for (size_t i = 0; i < expected.size(); ++i) {
    const Top top = answer.Next();
    if (top.token == expected[i]) {
      ++agreed;
      const double error = std::abs(top.lead - leads[i]);
      worst = std::max(worst, error / top.scale);
      ok &= error <= tolerance * top.scale + kRounding;
    } else {
      ok &= !exact && leads[i] <= tolerance * top.scale;
    }
    answer.Feed(expected[i]);
  }
  std::printf("%-12s %5zu tokens, %zu of %zu greedy tokens agree, largest error %.1e of max: %s\n",
              golden.at("name").get<std::string>().c_str(), prompt.size(), agreed, expected.size(),
              worst, ok ? "ok" : "WRONG");
  return ok;
}

void WritePrompt(TestModel* model, int64_t tokens, nlohmann::json* golden) {
  Continuation answer(model, golden->at("token_ids"), tokens);
  nlohmann::json greedy = nlohmann::json::array(), margins = nlohmann::json::array();
  constexpr double kDigits = 1e4;
  for (int64_t i = 0; i < tokens; ++i) {
    const Top top = answer.Next();
    greedy.push_back(top.token);
    margins.push_back(std::round(top.lead * kDigits) / kDigits);
    answer.Feed(top.token);
  }
  (*golden)["greedy"] = greedy;
  (*golden)["margins"] = margins;
}

struct Arguments {
  std::string model, golden, backend = "cpu", dtype = "f32";
  int64_t write = 0;  // tokens; 0: check
};

int Main(const Arguments& arguments) {
  std::ifstream in(arguments.golden);
  nlohmann::json golden = nlohmann::json::parse(in);
  const bool f32 = arguments.dtype == "f32", fp8 = arguments.dtype == "fp8";
  const double tolerance = f32 ? kTolerance : fp8 ? kFp8Tolerance : kBF16Tolerance;
  TestModel model = LoadTestModel(arguments.model, f32 ? DType::kF32 : DType::kBF16, kChunk, kPages,
                                  arguments.backend, /*e4m3_linears=*/fp8);
  if (arguments.write > 0) {
    for (nlohmann::json& prompt : golden.at("prompts"))
      WritePrompt(&model, arguments.write, &prompt);
    std::printf("%s\n", golden.dump().c_str());
    return 0;
  }
  std::printf("%s, %s\n", model.backend->Description().c_str(), arguments.dtype.c_str());
  bool ok = true;
  for (const nlohmann::json& prompt : golden.at("prompts")) {
    ok &= CheckPrompt(&model, tolerance, prompt);
  }
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  entropyserve::Arguments arguments;
  std::vector<std::string> words(argv + 1, argv + argc);
  const std::string write = "--write=";
  if (!words.empty() && words[0].starts_with(write)) {
    arguments.write = std::atoll(words[0].c_str() + write.size());
    words.erase(words.begin());
  }
  if (words.size() > 2) arguments.backend = words[2];
  if (words.size() > 3) arguments.dtype = words[3];
  if (words.size() < 2 || words.size() > 4 ||
      (arguments.dtype != "f32" && arguments.dtype != "bf16" && arguments.dtype != "fp8")) {
    std::fprintf(
        stderr,
        "usage: greedy_check [--write=TOKENS] MODEL GOLDEN.json [cpu|cuda] [f32|bf16|fp8]\n");
    return 2;
  }
  arguments.model = words[0];
  arguments.golden = words[1];
  return entropyserve::Main(arguments);
}
