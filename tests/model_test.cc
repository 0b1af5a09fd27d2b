// The transformer against the transformers library (and, for openPangu, an independent NumPy
// model): tests/golden/README.md says how the goldens are made.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/engine_factory.h"
#include "engine/weights/safetensors.h"
#include "tests/model_testing.h"

namespace entropyserve {
namespace {

// Of max |logit|, f32 (ARCHITECTURE.md, "What must always hold").
constexpr double kTolerance = 1e-4;
// bf16 rounds every weight and every matmul's input: its error against f32 is taken over all logits
// (norm of the difference over the norm), since a single one may be off by more.
constexpr double kBF16Tolerance = 2e-2;

// 8-bit linears against bf16 ones, likewise. Rounding to 3 bits of mantissa is off by 2.6 % (root
// mean square), rounding both factors by 3.7 %. Four layers of four products in a row, of random
// weights, add that up to 3.7 % * sqrt(16) = 15 %.
constexpr double kE4M3Tolerance = 0.2;
// The same 8-bit model by two kernels: a GPU sums a decode step's products in f32, a prompt's on
// tensor cores that keep 14 bits, and a last bit moves some of the next 8-bit roundings. Measured
// on an H200: 0.07.
constexpr double kE4M3KernelTolerance = 0.15;

struct Golden {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // [tokens, vocab]
};

Golden ReadGolden(const std::string& name) {
  auto file = SafetensorsFile::Open(GoldenPath("models/" + name + "/golden.safetensors"));
  EXPECT_TRUE(file.ok()) << file.status();
  Golden golden;
  const std::vector<int64_t> ids = *(*file)->ReadInts("token_ids");
  for (int64_t id : ids) golden.tokens.push_back(int32_t(id));
  golden.logits = *(*file)->ReadFloats("logits");
  return golden;
}

PrefillPolicy Full(int segment = 128) {
  PrefillPolicy policy = *PrefillPreset("full", "test");
  policy.params.segment = segment;
  return policy;
}
KvPolicy KeepAll() { return *KvPreset("full", "test"); }

double NormError(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    norm += double(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

std::vector<float> Prefill(TestModel* model, const std::vector<int32_t>& tokens, int64_t chunk) {
  TestSequence sequence(model, tokens, Full(), KeepAll(), 0);
  std::vector<float> logits;
  while (sequence.left() > 0) {
    const auto out = RunStep(model, {{&sequence, std::min(chunk, sequence.left())}});
    logits.insert(logits.end(), out[0].begin(), out[0].end());
  }
  return logits;
}

class ModelTest : public testing::TestWithParam<const char*> {
 protected:
  std::string Name() const {  // the folder of a GGUF file holds its golden
    const std::string param = GetParam();
    return param.substr(0, param.find('/'));
  }
  TestModel Load(DType dtype) const {
    return LoadTestModel(GoldenPath(std::string("models/") + GetParam()), dtype);
  }
};

TEST_P(ModelTest, WholePrefillAgrees) {
  const Golden golden = ReadGolden(Name());
  TestModel model = Load(DType::kF32);
  EXPECT_LT(RelativeError(Prefill(&model, golden.tokens, 1 << 20), golden.logits), kTolerance);
}

TEST_P(ModelTest, ChunkedPrefillAgrees) {
  const Golden golden = ReadGolden(Name());
  ASSERT_GT(golden.tokens.size(), 128u) << "too short to be cut";
  TestModel model = Load(DType::kF32);
  EXPECT_LT(RelativeError(Prefill(&model, golden.tokens, 128), golden.logits), kTolerance);
}

TEST_P(ModelTest, DecodeAgrees) {
  const Golden golden = ReadGolden(Name());
  TestModel model = Load(DType::kF32);
  const size_t prompt = 3, n = golden.tokens.size();
  TestSequence sequence(&model, {golden.tokens.begin(), golden.tokens.begin() + prompt}, Full(),
                        KeepAll(), n);
  std::vector<float> logits = RunStep(&model, {{&sequence, int64_t(prompt)}})[0];
  for (size_t i = prompt; i < n; ++i) {
    const std::vector<float> row = Decode(&model, &sequence, golden.tokens[i]);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  EXPECT_LT(RelativeError(logits, golden.logits), kTolerance);
}

TEST_P(ModelTest, BF16AgreesWithinItsTolerance) {
  const Golden golden = ReadGolden(Name());
  TestModel model = Load(DType::kBF16);
  const std::vector<float> whole = Prefill(&model, golden.tokens, 1 << 20);
  EXPECT_LT(NormError(whole, golden.logits), kBF16Tolerance);
  EXPECT_LT(RelativeError(Prefill(&model, golden.tokens, 128), whole), kBF16Tolerance);
}

TEST_P(ModelTest, BatchedIsAlone) {
  const Golden golden = ReadGolden(Name());
  const std::vector<int32_t>& t = golden.tokens;
  TestModel model = Load(DType::kF32);
  // Three sequences in one step: a whole prefill, the second chunk of another, and a decode.
  TestSequence a(&model, {t.begin(), t.begin() + 70}, Full(), KeepAll(), 0);
  TestSequence b(&model, t, Full(), KeepAll(), 0);
  TestSequence c(&model, {t.begin(), t.begin() + 40}, Full(), KeepAll(), 8);
  RunStep(&model, {{&b, 128}, {&c, 40}});
  const int64_t rest = b.left(), vocab = model.model->config().vocab;
  // The decode's token is set through Decode's own path, so give it a step alone first.
  Decode(&model, &c, t[40]);
  const auto out = RunStep(&model, {{&a, 70}, {&b, rest}});
  auto rows = [&](size_t begin, size_t end) {
    return std::vector<float>(golden.logits.begin() + begin * vocab,
                              golden.logits.begin() + end * vocab);
  };
  EXPECT_LT(RelativeError(out[0], rows(0, 70)), kTolerance);
  EXPECT_LT(RelativeError(out[1], rows(128, t.size())), kTolerance);
  EXPECT_LT(RelativeError(Decode(&model, &c, t[41]), rows(41, 42)), kTolerance);
}

// An exclusive whole-prompt step is larger than any other: what it took comes back.
TEST_P(ModelTest, RoomOfALargeStepIsGivenBack) {
  const Golden golden = ReadGolden(Name());
  TestModel model = Load(DType::kF32);
  const int64_t bytes = model.model->activation_bytes();
  const size_t free = model.backend->FreeMemory();
  ASSERT_TRUE(model.model->EnsureRows(2000).ok());
  EXPECT_GT(model.model->activation_bytes(), bytes);
  ASSERT_TRUE(model.model->EnsureRows(1).ok());
  EXPECT_EQ(model.model->activation_bytes(), bytes);
  // A GPU's pool may keep some of it as gaps between what is in use.
  EXPECT_GT(model.backend->FreeMemory(), free - (size_t{4} << 20));
  EXPECT_LT(RelativeError(Prefill(&model, golden.tokens, 1 << 20), golden.logits), kTolerance);
}

// A step computes of the last layer only what its logits need; cache and counters are the same.
TEST_P(ModelTest, LogitsOfFewRowsAreThoseOfAllRows) {
  const Golden golden = ReadGolden(Name());
  TestModel model = Load(DType::kF32);
  const int64_t n = int64_t(golden.tokens.size()), vocab = model.model->config().vocab;
  TestSequence all(&model, golden.tokens, Full(), KeepAll(), 1);
  TestSequence few(&model, golden.tokens, Full(), KeepAll(), 1);
  RunStep(&model, {{&all, n}});
  EXPECT_TRUE(RunStep(&model, {{&few, 128}}, /*last=*/0)[0].empty());
  const std::vector<float> last = RunStep(&model, {{&few, n - 128}}, /*last=*/3)[0];
  EXPECT_LT(RelativeError(last, {golden.logits.end() - 3 * vocab, golden.logits.end()}),
            kTolerance);
  const SeqCounters expected = all.cache().ReadCounters(), got = few.cache().ReadCounters();
  EXPECT_GT(got.pairs, 0u);
  EXPECT_EQ(got.pairs, expected.pairs);
  EXPECT_EQ(got.box_blocks, expected.box_blocks);
  const int32_t next = golden.tokens[0];
  EXPECT_LT(RelativeError(Decode(&model, &few, next), Decode(&model, &all, next)), kTolerance);
}

INSTANTIATE_TEST_SUITE_P(Families, ModelTest,
                         testing::Values("llama_llama3", "llama_llama3/model.gguf", "llama_linear",
                                         "qwen2_yarn", "qwen3", "pangu_embedded"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace_if(
                               name.begin(), name.end(), [](char c) { return !isalnum(c); }, '_');
                           return name;
                         });

// On a CPU these are the twins of what a GPU runs.
class E4M3ModelTest : public testing::Test {
 protected:
  static TestModel Load(DType dtype, bool e4m3_linears) {
    return LoadTestModel("synthetic:tiny", dtype, 256, 4096, TestBackend(), e4m3_linears);
  }
  static std::vector<int32_t> Tokens(int64_t n) {
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < n; ++i) tokens.push_back(int32_t((i * i * 31 + i * 7) % 512));
    return tokens;
  }
};

TEST_F(E4M3ModelTest, AgreesWithBF16WithinItsTolerance) {
  std::vector<float> expected;
  int64_t parameters = 0, weight_bytes = 0;
  {  // one model at a time: a GPU's memory is its backend's alone
    TestModel exact = Load(DType::kBF16, false);
    expected = Prefill(&exact, Tokens(200), 1 << 20);
    parameters = exact.model->parameters();
    weight_bytes = exact.model->weight_bytes();
  }
  TestModel model = Load(DType::kBF16, true);
  const double error = NormError(Prefill(&model, Tokens(200), 1 << 20), expected);
  RecordProperty("error", std::to_string(error));
  EXPECT_LT(error, kE4M3Tolerance);
  EXPECT_GT(error, 1e-2) << "nothing was rounded to 8 bits";
  EXPECT_EQ(model.model->parameters(), parameters);
  EXPECT_LT(model.model->weight_bytes(), weight_bytes * 6 / 10);
}

// Every row has its own scale: how a prompt is cut, and what else is in the step, change nothing.
// In f32, since a difference in the last bit of bf16 moves some of the next 8-bit roundings.
TEST_F(E4M3ModelTest, ChunkedBatchedAndDecodedIsWhole) {
  TestModel model = Load(DType::kF32, true);
  const std::vector<int32_t> tokens = Tokens(201);
  const int64_t vocab = model.model->config().vocab;
  const std::vector<float> whole = Prefill(&model, tokens, 1 << 20);
  EXPECT_LT(NormError(Prefill(&model, tokens, 128), whole), kBF16Tolerance);
  const auto rows = [&](int64_t begin, int64_t end) {
    return std::vector<float>(whole.begin() + begin * vocab, whole.begin() + end * vocab);
  };
  TestSequence a(&model, {tokens.begin(), tokens.begin() + 200}, Full(), KeepAll(), 2);
  TestSequence b(&model, {tokens.begin(), tokens.begin() + 40}, Full(), KeepAll(), 0);
  RunStep(&model, {{&a, 128}}, /*last=*/0);
  const auto out = RunStep(&model, {{&a, 72}, {&b, 40}}, /*last=*/2);
  EXPECT_LT(NormError(out[0], rows(198, 200)), kBF16Tolerance);
  EXPECT_LT(NormError(out[1], rows(38, 40)), kBF16Tolerance);
  EXPECT_LT(NormError(Decode(&model, &a, tokens[200]), rows(200, 201)),
            TestBackend() == "cuda" ? kE4M3KernelTolerance : kBF16Tolerance);
}

TEST(E4M3ModelLoad, RefusesShapesThatTensorCoresCannotRead) {
  const auto checkpoint = Checkpoint::Open(GoldenPath("models/llama_llama3"));
  ASSERT_TRUE(checkpoint.ok());
  const std::unique_ptr<Backend> backend = MakeCpuBackend(1);
  const auto model =
      Transformer::Load(**checkpoint, backend.get(), {.dtype = DType::kBF16, .e4m3_linears = true});
  EXPECT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument) << model.status();
  EXPECT_NE(model.status().message().find("--linear-dtype"), std::string::npos) << model.status();
}

TEST(E4M3ModelLoad, EngineNeedsHardwareAndBF16) {
  EngineConfig config{.model_path = "synthetic:tiny", .backend = "cpu", .dtype = "bf16"};
  config.linear_dtype = "fp8";
  const absl::Status on_cpu = LoadEngine(config).status();
  EXPECT_EQ(on_cpu.code(), absl::StatusCode::kFailedPrecondition) << on_cpu;
  EXPECT_NE(on_cpu.message().find("compute capability 9.0"), std::string::npos) << on_cpu;
  config.dtype = "f32";
  const absl::Status in_f32 = LoadEngine(config).status();
  EXPECT_EQ(in_f32.code(), absl::StatusCode::kInvalidArgument) << in_f32;
}

}  // namespace
}  // namespace entropyserve
