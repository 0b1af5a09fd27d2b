// ModelConfig from config.json and from GGUF metadata: what is read, what is refused and how.
#include "engine/weights/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/weights/config_gguf.h"
#include "engine/weights/config_json.h"
#include "engine/weights/gguf.h"
#include "tests/weights_testing.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;

Json LlamaJson() {
  return Json::parse(R"({"architectures":["LlamaForCausalLM"],"hidden_act":"silu",
    "hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,
    "num_key_value_heads":2,"vocab_size":100,"max_position_embeddings":2048,
    "rms_norm_eps":1e-5,"rope_theta":500000.0,"bos_token_id":1,"eos_token_id":2,
    "torch_dtype":"bfloat16","transformers_version":"4.40.0","use_cache":true})");
}

Json WithArchitecture(const char* name) {
  Json json = LlamaJson();
  json["architectures"] = {name};
  return json;
}

absl::StatusOr<ModelConfig> Parse(const Json& json, const Json& generation = Json::object()) {
  return ConfigFromJson(json, "config.json", generation, "generation_config.json");
}

ModelConfig ParseOrDie(const Json& json, const Json& generation = Json::object()) {
  auto config = Parse(json, generation);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : ModelConfig();
}

void ExpectRefused(const absl::Status& status, absl::StatusCode code, const std::string& text) {
  EXPECT_EQ(status.code(), code) << text << ": " << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

TEST(ConfigJson, ReadsLlama) {
  const ModelConfig c = ParseOrDie(LlamaJson());
  EXPECT_EQ(c.family, "llama");
  EXPECT_EQ(c.layers, 2);
  EXPECT_EQ(c.hidden, 64);
  EXPECT_EQ(c.ffn, 96);
  EXPECT_EQ(c.heads, 4);
  EXPECT_EQ(c.kv_heads, 2);
  EXPECT_EQ(c.head_dim, 16);  // hidden / heads
  EXPECT_EQ(c.vocab, 100);
  EXPECT_EQ(c.context, 2048);
  EXPECT_FLOAT_EQ(c.norm_eps, 1e-5f);
  EXPECT_FALSE(c.qkv_bias || c.o_bias || c.mlp_bias || c.qk_norm || c.tied_embeddings);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(c.bos_id, 1);
  EXPECT_THAT(c.eos_ids, ElementsAre(2));
}

TEST(ConfigJson, DefaultsAreTheFamilys) {
  Json json = LlamaJson();
  for (const char* field : {"num_key_value_heads", "rms_norm_eps", "rope_theta", "bos_token_id",
                            "eos_token_id", "hidden_act"}) {
    json.erase(field);
  }
  ModelConfig c = ParseOrDie(json);
  EXPECT_EQ(c.kv_heads, 4);
  EXPECT_FLOAT_EQ(c.norm_eps, 1e-6f);
  EXPECT_EQ(c.rope.theta, 10000.0);
  EXPECT_EQ(c.bos_id, -1);
  EXPECT_THAT(c.eos_ids, IsEmpty());
  json["architectures"] = {"Qwen3ForCausalLM"};
  EXPECT_EQ(ParseOrDie(json).head_dim, 128);
  json["architectures"] = {"PanguEmbeddedForCausalLM"};
  EXPECT_EQ(ParseOrDie(json).rope.theta, 1.6e7);
}

TEST(ConfigJson, BiasesAndNormsFollowTheFamily) {
  ModelConfig c = ParseOrDie(WithArchitecture("Qwen2ForCausalLM"));
  EXPECT_EQ(c.family, "qwen2");
  EXPECT_TRUE(c.qkv_bias);
  EXPECT_FALSE(c.o_bias || c.qk_norm);
  Json qwen3 = WithArchitecture("Qwen3ForCausalLM");
  c = ParseOrDie(qwen3);
  EXPECT_TRUE(c.qk_norm);
  EXPECT_FALSE(c.qkv_bias || c.o_bias);
  qwen3["attention_bias"] = true;
  EXPECT_TRUE(ParseOrDie(qwen3).qkv_bias && ParseOrDie(qwen3).o_bias);
  Json pangu = WithArchitecture("PanguEmbeddedForCausalLM");
  c = ParseOrDie(pangu);
  EXPECT_EQ(c.family, "pangu_embedded");
  EXPECT_TRUE(c.qkv_bias && c.o_bias);
  pangu["bias"] = false;
  EXPECT_FALSE(ParseOrDie(pangu).qkv_bias || ParseOrDie(pangu).o_bias);
  Json llama = LlamaJson();
  llama["attention_bias"] = true;
  llama["mlp_bias"] = true;
  llama["head_dim"] = 32;
  llama["tie_word_embeddings"] = true;
  c = ParseOrDie(llama);
  EXPECT_TRUE(c.qkv_bias && c.o_bias && c.mlp_bias && c.tied_embeddings);
  EXPECT_EQ(c.head_dim, 32);
}

TEST(ConfigJson, EosIdsComeFromBothFiles) {
  Json json = LlamaJson();
  json["eos_token_id"] = {7, 8};
  json["bos_token_id"] = nullptr;
  const ModelConfig c = ParseOrDie(json, {{"eos_token_id", {8, 9}}, {"bos_token_id", 3}});
  EXPECT_THAT(c.eos_ids, ElementsAre(7, 8, 9));
  EXPECT_EQ(c.bos_id, 3);
  ExpectRefused(Parse(LlamaJson(), {{"eos_token_id", 100}}).status(),
                absl::StatusCode::kInvalidArgument, "generation_config.json: eos_token_id: 100");
}

TEST(ConfigJson, ReadsRopeScalingInEverySpelling) {
  const Json llama3 = {{"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 512}};
  for (const char* spelling : {"type", "rope_type"}) {
    for (const char* field : {"rope_scaling", "rope_parameters"}) {
      Json json = LlamaJson();
      json[field] = llama3;
      json[field][spelling] = "llama3";
      if (std::string(field) == "rope_parameters") {
        json.erase("rope_theta");
        json[field]["rope_theta"] = 500000.0;
      }
      const RopeConfig rope = ParseOrDie(json).rope;
      EXPECT_EQ(rope.scaling, RopeScaling::kLlama3);
      EXPECT_EQ(rope.theta, 500000.0);
      EXPECT_EQ(rope.factor, 8.0);
      EXPECT_EQ(rope.low_freq_factor, 1.0);
      EXPECT_EQ(rope.high_freq_factor, 4.0);
      EXPECT_EQ(rope.original_context, 512);
    }
  }
  Json linear = LlamaJson();
  linear["rope_scaling"] = {{"type", "linear"}, {"factor", 2.5}};
  EXPECT_EQ(ParseOrDie(linear).rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(ParseOrDie(linear).rope.factor, 2.5);
  Json none = LlamaJson();
  none["rope_scaling"] = nullptr;
  none["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 123.0}};
  EXPECT_EQ(ParseOrDie(none).rope.scaling, RopeScaling::kNone);
  EXPECT_EQ(ParseOrDie(none).rope.theta, 123.0);
}

TEST(ConfigJson, ReadsYarnAndStretchesTheContext) {
  Json json = WithArchitecture("Qwen2ForCausalLM");
  json["rope_scaling"] = {
      {"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 2048}};
  ModelConfig c = ParseOrDie(json);
  EXPECT_EQ(c.rope.scaling, RopeScaling::kYarn);
  EXPECT_EQ(c.rope.original_context, 2048);
  EXPECT_EQ(c.rope.beta_fast, 32.0);
  EXPECT_EQ(c.rope.beta_slow, 1.0);
  EXPECT_EQ(c.rope.attention_factor, 0.0);  // the default rule
  EXPECT_TRUE(c.rope.truncate);
  EXPECT_EQ(c.context, 8192);
  json["rope_scaling"]["attention_factor"] = 1.25;
  json["rope_scaling"]["truncate"] = false;
  json["rope_scaling"]["beta_fast"] = 16;
  c = ParseOrDie(json);
  EXPECT_EQ(c.rope.attention_factor, 1.25);
  EXPECT_FALSE(c.rope.truncate);
  EXPECT_EQ(c.rope.beta_fast, 16.0);
  json["rope_scaling"].erase("attention_factor");
  json["rope_scaling"]["mscale"] = 1.0;
  json["rope_scaling"]["mscale_all_dim"] = 0.5;
  // (0.1 ln 4 + 1) / (0.05 ln 4 + 1)
  EXPECT_NEAR(ParseOrDie(json).rope.attention_factor, 1.0648213, 1e-6);
  // Without a factor: the ratio of the lengths.
  json["rope_scaling"] = {{"rope_type", "yarn"}, {"original_max_position_embeddings", 512}};
  EXPECT_EQ(ParseOrDie(json).rope.factor, 4.0);
}

TEST(ConfigJson, RefusesByNameWhatChangesTheMaths) {
  const std::vector<std::pair<std::string, Json>> fields = {
      {"use_sliding_window", true},
      {"sliding_window", 4096},
      {"partial_rotary_factor", 0.5},
      {"hidden_act", "gelu"},
      {"attn_logit_softcapping", 50.0},
      {"final_logit_softcapping", 30.0},
      {"num_local_experts", 8},
      {"num_experts", 64},
      {"quantization_config", {{"quant_method", "awq"}}},
      {"attention_multiplier", 0.0078125},
      {"embedding_multiplier", 12.0},
      {"residual_multiplier", 0.22},
      {"logits_scaling", 8.0},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"no_rope_layers", {1, 1, 0}},
      {"qk_layernorm", true},
      {"dual_chunk_attention_config", {{"chunk_size", 262144}}},
      {"attention_chunk_size", 8192}};
  for (const auto& [field, value] : fields) {
    Json json = LlamaJson();
    json[field] = value;
    ExpectRefused(Parse(json).status(), absl::StatusCode::kUnimplemented, "config.json: " + field);
  }
}

TEST(ConfigJson, AcceptsTheSameFieldsWhenTheyAreNeutral) {
  Json json = WithArchitecture("Qwen2ForCausalLM");
  json.update({{"use_sliding_window", false},
               {"sliding_window", 32768},
               {"max_window_layers", 21},
               {"partial_rotary_factor", 1.0},
               {"attn_logit_softcapping", nullptr},
               {"num_local_experts", 0},
               {"quantization_config", nullptr},
               {"residual_multiplier", 1},
               {"layer_types", {"full_attention", "full_attention"}},
               {"attention_dropout", 0.0}});
  EXPECT_TRUE(Parse(json).ok()) << Parse(json).status();
}

TEST(ConfigJson, RefusesOtherRopeByName) {
  const auto with = [](const Json& rope) {
    Json json = LlamaJson();
    json["rope_scaling"] = rope;
    return Parse(json).status();
  };
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(with({{"type", "dynamic"}, {"factor", 2.0}}), unimplemented, "'dynamic'");
  ExpectRefused(with({{"rope_type", "longrope"}}), unimplemented, "'longrope'");
  ExpectRefused(with({{"rope_type", "default"}, {"mrope_section", {16, 24, 24}}}), unimplemented,
                "rope_scaling: mrope_section");
  ExpectRefused(with({{"rope_type", "default"}, {"partial_rotary_factor", 0.25}}), unimplemented,
                "partial_rotary_factor");
  ExpectRefused(with({{"rope_type", "linear"}, {"type", "yarn"}}), invalid, "differs");
  ExpectRefused(with({{"rope_type", "linear"}}), invalid, "rope_scaling: factor: missing");
  ExpectRefused(with({{"rope_type", "linear"}, {"factor", 0}}), invalid, "factor");
  ExpectRefused(with({{"rope_type", "llama3"}, {"factor", 8}}), invalid, "low_freq_factor");
  ExpectRefused(with("linear"), invalid, "rope_scaling: not an object");
}

TEST(ConfigJson, RefusesOtherArchitectures) {
  ExpectRefused(Parse(WithArchitecture("MixtralForCausalLM")).status(),
                absl::StatusCode::kUnimplemented, "MixtralForCausalLM");
  Json json = LlamaJson();
  json.erase("architectures");
  ExpectRefused(Parse(json).status(), absl::StatusCode::kInvalidArgument, "architectures");
}

TEST(ConfigJson, RefusesDimensionsThatCannotBe) {
  const std::vector<std::pair<std::string, Json>> fields = {
      {"hidden_size", 0},
      {"hidden_size", -64},
      {"hidden_size", 1e3},
      {"hidden_size", "64"},
      {"hidden_size", uint64_t{18446744073709551615u}},
      {"num_hidden_layers", 1 << 30},
      {"num_attention_heads", 0},
      {"num_key_value_heads", 3},
      {"head_dim", 15},
      {"head_dim", 4096},
      {"vocab_size", int64_t{1} << 40},
      {"max_position_embeddings", 0},
      {"intermediate_size", nullptr},
      {"rms_norm_eps", -1.0},
      {"rope_theta", 0.0},
      {"eos_token_id", 100},
      {"eos_token_id", "</s>"},
      {"bos_token_id", -5},
      {"tie_word_embeddings", "yes"}};
  for (const auto& [field, value] : fields) {
    Json json = LlamaJson();
    json[field] = value;
    const absl::Status status = Parse(json).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("config.json: "));
  }
}

// --- GGUF ---

GgufBuilder TinyGguf(const std::string& arch) {
  GgufBuilder b;
  b.Text("general.architecture", arch)
      .U32(arch + ".block_count", 1)
      .U32(arch + ".embedding_length", 32)
      .U32(arch + ".feed_forward_length", 48)
      .U32(arch + ".attention.head_count", 4)
      .U32(arch + ".attention.head_count_kv", 2)
      .U32(arch + ".context_length", 256)
      .F32(arch + ".attention.layer_norm_rms_epsilon", 1e-6f)
      .Zeros("token_embd.weight", {32, 40});
  return b;
}

absl::StatusOr<ModelConfig> ParseGguf(const GgufBuilder& builder) {
  const std::string bytes = builder.Build();
  auto file = GgufFile::Parse(Bytes(bytes), "m.gguf");
  if (!file.ok()) return file.status();
  return ConfigFromGguf(**file);
}

ModelConfig ParseGgufOrDie(const GgufBuilder& builder) {
  auto config = ParseGguf(builder);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *config : ModelConfig();
}

TEST(ConfigGguf, ReadsDimensionsAndTensors) {
  ModelConfig c = ParseGgufOrDie(TinyGguf("llama"));
  EXPECT_EQ(c.family, "llama");
  EXPECT_EQ(c.layers, 1);
  EXPECT_EQ(c.hidden, 32);
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.vocab, 40);  // rows of the embedding
  EXPECT_EQ(c.context, 256);
  EXPECT_FLOAT_EQ(c.norm_eps, 1e-6f);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_FALSE(c.qkv_bias || c.qk_norm);
  c = ParseGgufOrDie(TinyGguf("pangu-embedded")
                         .U32("pangu-embedded.attention.key_length", 16)
                         .U32("pangu-embedded.attention.value_length", 16)
                         .Zeros("output.weight", {32, 40})
                         .Zeros("blk.0.attn_q.bias", {64})
                         .Zeros("blk.0.attn_output.bias", {32}));
  EXPECT_EQ(c.family, "pangu_embedded");
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_FALSE(c.tied_embeddings);
  EXPECT_TRUE(c.qkv_bias && c.o_bias);
  EXPECT_TRUE(ParseGgufOrDie(TinyGguf("qwen3")).qk_norm);
}

TEST(ConfigGguf, ReadsRopeScaling) {
  ModelConfig c = ParseGgufOrDie(TinyGguf("qwen2")
                                     .Text("qwen2.rope.scaling.type", "yarn")
                                     .F32("qwen2.rope.scaling.factor", 4.0f)
                                     .U32("qwen2.rope.scaling.original_context_length", 128));
  EXPECT_EQ(c.rope.scaling, RopeScaling::kYarn);
  EXPECT_EQ(c.rope.factor, 4.0);
  EXPECT_EQ(c.rope.original_context, 128);
  EXPECT_EQ(c.context, 512);
  c = ParseGgufOrDie(TinyGguf("llama").F32("llama.rope.scaling.factor", 2.0f));
  EXPECT_EQ(c.rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(c.rope.factor, 2.0);
  ExpectRefused(ParseGguf(TinyGguf("llama").Text("llama.rope.scaling.type", "longrope")).status(),
                absl::StatusCode::kUnimplemented, "llama.rope.scaling.type: 'longrope'");
}

TEST(ConfigGguf, EosIdsAreTheFilesAndTheVocabularys) {
  const std::string tokens = GgufBuilder::Str("a") + GgufBuilder::Str("<|im_end|>") +
                             GgufBuilder::Str("<|eot_id|>") + GgufBuilder::Str("<|end|>");
  // The last one is ordinary text here, so it does not end an answer.
  const std::string types = Raw(int32_t{1}) + Raw(int32_t{3}) + Raw(int32_t{3}) + Raw(int32_t{1});
  const ModelConfig c = ParseGgufOrDie(TinyGguf("llama")
                                           .U32("tokenizer.ggml.bos_token_id", 5)
                                           .U32("tokenizer.ggml.eos_token_id", 6)
                                           .U32("tokenizer.ggml.eot_token_id", 2)
                                           .Array("tokenizer.ggml.tokens", 8, 4, tokens)
                                           .Array("tokenizer.ggml.token_type", 5, 4, types));
  EXPECT_EQ(c.bos_id, 5);
  EXPECT_THAT(c.eos_ids, ElementsAre(6, 2, 1));
}

TEST(ConfigGguf, RefusesByName) {
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused(ParseGguf(TinyGguf("gemma2")).status(), unimplemented, "'gemma2'");
  for (const char* key : {"llama.expert_count", "llama.attention.sliding_window",
                          "llama.rope.scaling.yarn_log_multiplier"}) {
    ExpectRefused(ParseGguf(TinyGguf("llama").U32(key, 3)).status(), unimplemented, key);
  }
  ExpectRefused(ParseGguf(TinyGguf("llama").U32("llama.rope.dimension_count", 4)).status(),
                unimplemented, "llama.rope.dimension_count");
  ExpectRefused(ParseGguf(TinyGguf("llama").U32("llama.attention.value_length", 4)).status(),
                unimplemented, "llama.attention.value_length");
  EXPECT_TRUE(ParseGguf(TinyGguf("llama").U32("llama.expert_count", 0)).ok());
  ExpectRefused(ParseGguf(TinyGguf("llama").U32("llama.attention.key_length", 7)).status(), invalid,
                "head_dim must be even");
  ExpectRefused(ParseGguf(TinyGguf("llama").U32("tokenizer.ggml.eos_token_id", 40)).status(),
                invalid, "eos id 40");
  ExpectRefused(ParseGguf(GgufBuilder().Text("general.architecture", "llama")).status(),
                absl::StatusCode::kNotFound, "llama.block_count");
  ExpectRefused(ParseGguf(TinyGguf("llama").Zeros("rope_freqs.weight", {4})).status(), invalid,
                "rope_freqs.weight must be over 0");
}

}  // namespace
}  // namespace entropyserve
