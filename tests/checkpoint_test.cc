#include "engine/weights/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/weights/mapped_checkpoint.h"
#include "engine/weights/safetensors.h"
#include "engine/weights/tensor_names.h"
#include "tests/weights_testing.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

constexpr const char* kArchitectures[] = {"llama", "qwen2", "qwen3", "pangu-embedded"};

std::unique_ptr<Checkpoint> OpenOrDie(const std::string& path) {
  auto checkpoint = Checkpoint::Open(path);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
}

// config.json of the golden models, whose tensors lie in <arch>.safetensors.
Json ConfigOf(const std::string& arch) {
  static const std::map<std::string, std::string> kNames = {
      {"llama", "LlamaForCausalLM"},
      {"qwen2", "Qwen2ForCausalLM"},
      {"qwen3", "Qwen3ForCausalLM"},
      {"pangu-embedded", "PanguEmbeddedForCausalLM"}};
  Json json = {{"architectures", {kNames.at(arch)}},
               {"hidden_size", 32},
               {"intermediate_size", 48},
               {"num_hidden_layers", 1},
               {"num_attention_heads", 4},
               {"num_key_value_heads", 2},
               {"head_dim", arch == "qwen3" ? 16 : 8},
               {"vocab_size", 40},
               {"max_position_embeddings", 512},
               {"tie_word_embeddings", arch != "pangu-embedded"}};
  return json;
}

// A folder with the golden tensors. The golden llama has q, k and v biases but none on o, which
// config.json cannot say, so the family tests here use the others.
void WriteFolder(const TempFolder& folder, const std::string& arch) {
  folder.Write("config.json", ConfigOf(arch).dump());
  folder.Write("model.safetensors", ReadFile(GoldenPath(arch + ".safetensors")));
}

class GgufCheckpoint : public testing::TestWithParam<const char*> {};

// Every tensor of the file under its canonical name, with the shape and exactly the values that the
// `gguf` package has: llama's q and k come back in half-split order, the others' as they are.
TEST_P(GgufCheckpoint, HoldsTheTensorsUnderCanonicalNames) {
  const std::string arch = GetParam();
  const auto checkpoint = OpenOrDie(GoldenPath(arch + ".gguf"));
  ASSERT_NE(checkpoint, nullptr);
  EXPECT_TRUE(checkpoint->is_gguf());
  const auto golden = SafetensorsFile::Open(GoldenPath(arch + ".safetensors"));
  ASSERT_TRUE(golden.ok());
  ASSERT_GT((*golden)->tensors().size(), 10u);
  for (const auto& [name, entry] : (*golden)->tensors()) {
    ASSERT_TRUE(checkpoint->Has(name)) << name;
    EXPECT_EQ(*checkpoint->Shape(name), entry.shape) << name;
    std::vector<float> got(size_t(entry.elements));
    const int64_t rows = entry.shape.size() == 1 ? 1 : entry.shape[0];
    const absl::Status status =
        checkpoint->Read(name, entry.shape, 0, rows, DType::kF32, got.data());
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(got, *(*golden)->ReadFloats(name)) << name;
  }
}

// Rows are the same however they are asked for, and bf16 is the rounded float.
TEST_P(GgufCheckpoint, ReadsAnyRangeOfRows) {
  const auto checkpoint = OpenOrDie(GoldenPath(std::string(GetParam()) + ".gguf"));
  ASSERT_NE(checkpoint, nullptr);
  const std::string name = "model.layers.0.self_attn.q_proj.weight";
  const std::vector<int64_t> shape = *checkpoint->Shape(name);
  const int64_t rows = shape[0], columns = shape[1];
  std::vector<float> whole(size_t(rows * columns));
  ASSERT_TRUE(checkpoint->Read(name, shape, 0, rows, DType::kF32, whole.data()).ok());
  std::mt19937 random(3);
  for (int i = 0; i < 50; ++i) {
    int64_t begin = random() % (rows + 1), end = random() % (rows + 1);
    if (begin > end) std::swap(begin, end);
    std::vector<bf16_t> part(size_t((end - begin) * columns));
    ASSERT_TRUE(checkpoint->Read(name, shape, begin, end, DType::kBF16, part.data()).ok());
    for (size_t j = 0; j < part.size(); ++j) {
      ASSERT_EQ(part[j], ToBF16(whole[size_t(begin * columns) + j]));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, GgufCheckpoint, testing::ValuesIn(kArchitectures),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// The permutation itself, on values that say where they belong: row h*d + half*d/2 + i of ours lies
// at h*d + 2i + half of a llama file, and stays where it is in a qwen2 file.
TEST(GgufCheckpointOrder, OnlyLlamaIsInterleaved) {
  for (const bool llama : {true, false}) {
    const std::string arch = llama ? "llama" : "qwen2";
    std::string bytes = ReadFile(GoldenPath(arch + ".gguf"));
    auto file = GgufFile::Parse(Bytes(bytes), arch);
    ASSERT_TRUE(file.ok());
    const GgufTensor tensor = (*file)->tensors().find("blk.0.attn_k.bias")->second;
    ASSERT_THAT(tensor.shape, ElementsAre(16));  // 2 kv heads of 8
    const size_t at = bytes.size() - (*file)->data().size() + tensor.offset;
    for (int i = 0; i < 16; ++i) {
      const float x = float(i);
      std::memcpy(bytes.data() + at + size_t(i) * 4, &x, 4);
    }
    file = GgufFile::Parse(Bytes(bytes), arch);
    const auto checkpoint = MappedCheckpoint::FromGguf(*std::move(file), arch);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    std::vector<float> k(16);
    ASSERT_TRUE(
        (*checkpoint)
            ->Read("model.layers.0.self_attn.k_proj.bias", {16}, 0, 1, DType::kF32, k.data())
            .ok());
    if (llama) {
      EXPECT_THAT(k, ElementsAre(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    } else {
      EXPECT_THAT(k, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    }
  }
}

TEST(GgufCheckpointConfig, TakesFieldsTensorsAndVocabulary) {
  const auto llama = OpenOrDie(GoldenPath("llama.gguf"));
  ASSERT_NE(llama, nullptr);
  EXPECT_EQ(llama->config().name, "tiny llama");
  EXPECT_EQ(llama->config().rope.theta, 5e5);
  EXPECT_THAT(llama->config().rope.freq_factors, ElementsAre(1, 1, 2, 8));
  EXPECT_FALSE(llama->Has("rope_freqs.weight"));
  EXPECT_TRUE(llama->config().tied_embeddings);
  EXPECT_FALSE(llama->Has("lm_head.weight"));
  EXPECT_EQ(llama->config().bos_id, 1);
  // 2 from eos_token_id; 38 is the control token <|im_end|>; 39, <|eot_id|>, is not a control
  // token.
  EXPECT_THAT(llama->config().eos_ids, ElementsAre(2, 38));
  const auto qwen2 = OpenOrDie(GoldenPath("qwen2.gguf"));
  ASSERT_NE(qwen2, nullptr);
  EXPECT_EQ(qwen2->config().rope.scaling, RopeScaling::kYarn);
  EXPECT_TRUE(qwen2->config().qkv_bias);
}

TEST(FolderCheckpoint, HoldsTheFilesTensors) {
  for (const std::string arch : {"qwen2", "qwen3", "pangu-embedded"}) {
    const TempFolder folder;
    WriteFolder(folder, arch);
    const auto whole = OpenOrDie(folder.path());
    ASSERT_NE(whole, nullptr);
    EXPECT_FALSE(whole->is_gguf());
    EXPECT_EQ(whole->path(), folder.path());
    EXPECT_EQ(whole->config().name, std::filesystem::path(folder.path()).filename().string());
    const auto gguf = OpenOrDie(GoldenPath(arch + ".gguf"));
    ASSERT_NE(gguf, nullptr);
    for (const TensorSpec& spec : TensorsOf(whole->config())) {
      if (!whole->Has(spec.name)) continue;
      size_t n = 1;
      for (const int64_t dim : spec.shape) n *= size_t(dim);
      const int64_t rows = spec.shape.size() == 1 ? 1 : spec.shape[0];
      std::vector<float> a(n), b(n);
      ASSERT_TRUE(whole->Read(spec.name, spec.shape, 0, rows, DType::kF32, a.data()).ok());
      ASSERT_TRUE(gguf->Read(spec.name, spec.shape, 0, rows, DType::kF32, b.data()).ok());
      EXPECT_EQ(a, b) << spec.name;
    }
  }
}

std::string ModelPath(const std::string& name) {
  return std::string(ES_SOURCE_DIR) + "/tests/golden/models/" + name;
}

TEST(FolderCheckpoint, ReadsShards) {
  const std::string path = ModelPath("llama_linear");
  const auto checkpoint = OpenOrDie(path);
  ASSERT_NE(checkpoint, nullptr);
  size_t found = 0;
  for (const std::string shard :
       {"/model-00001-of-00002.safetensors", "/model-00002-of-00002.safetensors"}) {
    const auto file = SafetensorsFile::Open(path + shard);
    ASSERT_TRUE(file.ok());
    for (const auto& [name, entry] : (*file)->tensors()) {
      std::vector<bf16_t> got(size_t(entry.elements));
      const int64_t rows = entry.shape.size() == 1 ? 1 : entry.shape[0];
      ASSERT_TRUE(checkpoint->Read(name, entry.shape, 0, rows, DType::kBF16, got.data()).ok());
      ASSERT_EQ(entry.dtype, "BF16");
      EXPECT_EQ(std::memcmp(got.data(), entry.data.data(), entry.data.size()), 0) << name;
      ++found;
    }
  }
  EXPECT_EQ(found, TensorsOf(checkpoint->config()).size());
  EXPECT_EQ(checkpoint->config().rope.scaling, RopeScaling::kLinear);
}

// One model in both formats: equal tensors, and rope_freqs.weight holds what the scaling says.
TEST(FolderCheckpoint, EqualsTheSameModelInGguf) {
  const auto folder = OpenOrDie(ModelPath("llama_llama3"));
  const auto gguf = OpenOrDie(ModelPath("llama_llama3/model.gguf"));
  ASSERT_TRUE(folder != nullptr && gguf != nullptr);
  for (const TensorSpec& spec : TensorsOf(folder->config())) {
    ASSERT_EQ(folder->Has(spec.name), gguf->Has(spec.name)) << spec.name;
    if (!folder->Has(spec.name)) continue;
    size_t n = 1;
    for (const int64_t dim : spec.shape) n *= size_t(dim);
    const int64_t rows = spec.shape.size() == 1 ? 1 : spec.shape[0];
    std::vector<float> a(n), b(n);
    ASSERT_TRUE(folder->Read(spec.name, spec.shape, 0, rows, DType::kF32, a.data()).ok());
    ASSERT_TRUE(gguf->Read(spec.name, spec.shape, 0, rows, DType::kF32, b.data()).ok());
    EXPECT_EQ(a, b) << spec.name;
  }
  const ModelConfig &f = folder->config(), &g = gguf->config();
  EXPECT_EQ(f.rope.scaling, RopeScaling::kLlama3);
  EXPECT_EQ(g.rope.scaling, RopeScaling::kNone);
  ASSERT_EQ(g.rope.freq_factors.size(), size_t(f.head_dim) / 2);
  EXPECT_EQ(g.rope.freq_factors.front(), 1.0f);
  EXPECT_EQ(g.rope.freq_factors.back(), float(f.rope.factor));
  EXPECT_EQ(f.head_dim, g.head_dim);
  EXPECT_EQ(f.context, g.context);
  EXPECT_EQ(f.eos_ids, g.eos_ids);
  EXPECT_TRUE(f.tied_embeddings && g.tied_embeddings);
}

// A file with one tensor.
std::string OneTensorFile(const std::string& name) {
  return SafetensorsBytes(
      R"({")" + name + R"(":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}})", 8);
}

TEST(FolderCheckpoint, RefusesABadIndex) {
  const TempFolder folder;
  WriteFolder(folder, "qwen2");
  const auto open_with = [&folder](const Json& index) {
    folder.Write("model.safetensors.index.json", index.dump());
    return Checkpoint::Open(folder.path()).status();
  };
  const auto expect = [](const absl::Status& status, absl::StatusCode code, const char* text) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_TRUE(open_with({{"weight_map", {{"x", "model.safetensors"}}}}).ok());
  expect(open_with({{"weights", 1}}), invalid, "weight_map");
  expect(open_with({{"weight_map", {{"x", "../model.safetensors"}}}}), invalid, "not a file name");
  expect(open_with({{"weight_map", {{"x", 3}}}}), invalid, "not a file name");
  expect(open_with({{"weight_map", {{"x", "other.safetensors"}}}}), absl::StatusCode::kNotFound,
         "other.safetensors");
  folder.Write("a.safetensors", OneTensorFile("model.norm.weight"));
  expect(open_with({{"weight_map", {{"x", "model.safetensors"}, {"y", "a.safetensors"}}}}), invalid,
         "also in another file");
}

TEST(FolderCheckpoint, RefusesWhatTheConfigurationDoesNotExplain) {
  const auto expect = [](const TempFolder& folder, absl::StatusCode code, const char* text) {
    const absl::Status status = Checkpoint::Open(folder.path()).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  const TempFolder folder;
  WriteFolder(folder, "qwen2");
  // The same tensors for Llama: biases that a Llama without attention_bias does not have.
  Json config = ConfigOf("qwen2");
  config["architectures"] = {"LlamaForCausalLM"};
  folder.Write("config.json", config.dump());
  expect(folder, absl::StatusCode::kUnimplemented, "self_attn.k_proj.bias");
  // With attention_bias there must be one on o as well.
  config["attention_bias"] = true;
  folder.Write("config.json", config.dump());
  expect(folder, absl::StatusCode::kInvalidArgument, "self_attn.o_proj.bias' is missing");
  config = ConfigOf("qwen2");
  config["intermediate_size"] = 64;
  folder.Write("config.json", config.dump());
  expect(folder, absl::StatusCode::kInvalidArgument, "is [48, 32], expected [64, 32]");
  config = ConfigOf("qwen2");
  config["tie_word_embeddings"] = false;
  folder.Write("config.json", config.dump());
  expect(folder, absl::StatusCode::kInvalidArgument, "'lm_head.weight' is missing");
  folder.Write("config.json", "{]");
  expect(folder, absl::StatusCode::kInvalidArgument, "not a JSON object");
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "{\"a\":";
  folder.Write("config.json", deep);
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::remove(folder.path() + "/model.safetensors");
  folder.Write("config.json", ConfigOf("qwen2").dump());
  expect(folder, absl::StatusCode::kInvalidArgument, "neither model.safetensors nor");
}

TEST(Checkpoint, OpensAFolderWithOneGgufFile) {
  const TempFolder folder;
  EXPECT_EQ(Checkpoint::Open(folder.path() + "/x").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kInvalidArgument);
  const std::string path = folder.Write("a.gguf", ReadFile(GoldenPath("qwen2.gguf")));
  const auto checkpoint = OpenOrDie(folder.path());
  ASSERT_NE(checkpoint, nullptr);
  EXPECT_EQ(checkpoint->path(), path);
  folder.Write("b.gguf", "");
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Checkpoint, ReadNamesWhatDoesNotFit) {
  const auto checkpoint = OpenOrDie(GoldenPath("qwen2.gguf"));
  ASSERT_NE(checkpoint, nullptr);
  const std::string name = "model.embed_tokens.weight";
  float out[64];
  const auto read = [&](const std::string& what, const std::vector<int64_t>& shape, int64_t begin,
                        int64_t end) {
    return checkpoint->Read(what, shape, begin, end, DType::kF32, out);
  };
  EXPECT_EQ(read("nothing", {40, 32}, 0, 1).code(), absl::StatusCode::kNotFound);
  const absl::Status shape = read(name, {32, 40}, 0, 1);
  EXPECT_EQ(shape.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(shape.message()), HasSubstr("is [40, 32], expected [32, 40]"));
  EXPECT_FALSE(read(name, {40, 32}, 40, 41).ok());
  EXPECT_FALSE(read(name, {40, 32}, -1, 1).ok());
  EXPECT_FALSE(read(name, {40, 32}, 2, 1).ok());
  EXPECT_TRUE(read(name, {40, 32}, 39, 40).ok());
  EXPECT_TRUE(read(name, {40, 32}, 40, 40).ok());
}

TEST(Checkpoint, FingerprintTellsModelsApart) {
  std::vector<uint64_t> seen;
  for (const char* arch : kArchitectures) {
    const std::string path = GoldenPath(std::string(arch) + ".gguf");
    seen.push_back(OpenOrDie(path)->Fingerprint());
    EXPECT_EQ(OpenOrDie(path)->Fingerprint(), seen.back());
  }
  // Another RoPE base is another model, although every tensor is the same.
  std::string bytes = ReadFile(GoldenPath("qwen2.gguf"));
  const size_t at = bytes.find("qwen2.rope.freq_base") + std::string("qwen2.rope.freq_base").size();
  const float theta = 7e5f;
  std::memcpy(bytes.data() + at + 4, &theta, 4);
  const TempFolder folder;
  seen.push_back(OpenOrDie(folder.Write("m.gguf", bytes))->Fingerprint());
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(std::unique(seen.begin(), seen.end()), seen.end());
}

TEST(Checkpoint, RefusesGgufTensorsThatLie) {
  const std::string good = ReadFile(GoldenPath("llama.gguf"));
  const TempFolder folder;
  const auto expect = [&folder](const std::string& bytes, absl::StatusCode code, const char* text) {
    const absl::Status status = Checkpoint::Open(folder.Write("m.gguf", bytes)).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  for (size_t n = good.size() - 64; n > 2000; n = n * 3 / 4) {
    expect(good.substr(0, n), invalid, "truncated?");
  }
  // The last tensor's directory entry: name, 1 dimension count, dims, type, offset.
  const auto patch = [&good](const std::string& tensor, size_t dims, size_t field,
                             const std::string& value) {
    std::string bytes = good;
    const size_t at = bytes.find(tensor) + tensor.size() + 4 + dims * 8 + field;
    bytes.replace(at, value.size(), value);
    return bytes;
  };
  constexpr size_t kType = 0, kOffset = 4;
  expect(patch("blk.0.ffn_down.weight", 2, kOffset, Raw(uint64_t{0})), invalid, "overlap");
  expect(patch("blk.0.ffn_down.weight", 2, kOffset, Raw(uint64_t{1} << 62)), invalid, "beyond");
  expect(patch("blk.0.ffn_down.weight", 2, kType, Raw(uint32_t{12})), invalid, "Q4_K blocks");
  expect(patch("blk.0.ffn_down.weight", 2, kType, Raw(uint32_t{10})),
         absl::StatusCode::kUnimplemented, "tensor type Q2_K");
  expect(patch("blk.0.ffn_down.weight", 2, kType, Raw(uint32_t{999})),
         absl::StatusCode::kUnimplemented, "number 999");
  std::string renamed = good;
  renamed.replace(renamed.find("blk.0.ffn_down.weight"), 21, "blk.0.ffn_ouch.weight");
  expect(renamed, absl::StatusCode::kUnimplemented, "blk.0.ffn_ouch.weight");
  renamed.replace(renamed.find("blk.0.ffn_ouch.weight"), 21, "blk.1.ffn_down.weight");
  expect(renamed, invalid, "'model.layers.0.mlp.down_proj.weight' is missing");
}

}  // namespace
}  // namespace entropyserve
