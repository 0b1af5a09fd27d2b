// Tokenizer files that are truncated, inconsistent or unsupported: a named error, never a crash.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "engine/text/chat_template.h"
#include "engine/text/sentencepiece_normalizer.h"
#include "engine/text/tokenizer.h"
#include "tests/text_golden.h"

namespace entropyserve {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using Json = nlohmann::json;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnsupported = absl::StatusCode::kUnimplemented;

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& file,
                 const std::string& field) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(file), HasSubstr(field)));
}

Json GoldenJson(const std::string& name) { return Json::parse(ReadTextGolden(name + ".json")); }

void ExpectJsonError(const Json& json, absl::StatusCode code, const std::string& field) {
  ExpectError(ParseTokenizerJson(json.dump()).status(), code, "tokenizer.json", field);
}

// ---- tokenizer.json ----

TEST(TokenizerJsonTest, TruncatedFilesAreRefused) {
  const std::string text = ReadTextGolden("qwen2.json");
  for (size_t size = 0; size < text.size(); size += 1 + size / 40) {
    ExpectError(ParseTokenizerJson(text.substr(0, size)).status(), kInvalid, "tokenizer.json",
                "file");
  }
  for (const char* text : {"", "[]", "3", "null", "{\"model\":", "\xFF\xFE", "{\"a\":\"\xC3\"}"}) {
    ExpectError(ParseTokenizerJson(text).status(), kInvalid, "tokenizer.json", "file");
  }
  ExpectError(ParseTokenizerJson(std::string(1 << 20, '[')).status(), kInvalid, "tokenizer.json",
              "file");
}

TEST(TokenizerJsonTest, LyingVocabulariesAreRefused) {
  const auto with = [](auto edit) {
    Json json = GoldenJson("gpt2");
    edit(json);
    return json;
  };
  ExpectJsonError(with([](Json& j) { j.erase("model"); }), kInvalid, "model");
  ExpectJsonError(with([](Json& j) { j["model"] = 3; }), kInvalid, "model");
  ExpectJsonError(with([](Json& j) { j["model"].erase("vocab"); }), kInvalid, "model.vocab");
  ExpectJsonError(with([](Json& j) { j["model"]["vocab"] = Json::object(); }), kInvalid,
                  "model.vocab");
  for (const Json& id : std::vector<Json>{-1, 1 << 30, 1e300, 1.5, "7", nullptr, UINT64_MAX}) {
    ExpectJsonError(with([&](Json& j) { j["model"]["vocab"]["a"] = id; }), kInvalid, "model.vocab");
  }
  ExpectJsonError(with([](Json& j) { j["model"]["vocab"]["a"] = j["model"]["vocab"]["b"]; }),
                  kInvalid, "two tokens");
  ExpectJsonError(with([](Json& j) { j["model"]["vocab"][std::string(5000, 'a')] = 5000; }),
                  kInvalid, "too long");
  ExpectJsonError(with([](Json& j) { j["model"]["vocab"].erase("a"); }), kInvalid, "");
  ExpectJsonError(with([](Json& j) {
                    j["model"]["vocab"].erase("a");
                    j["model"]["merges"] = Json::array();
                  }),
                  kInvalid, "no token for byte 97");
}

TEST(TokenizerJsonTest, LyingMergesAreRefused) {
  Json json = GoldenJson("gpt2");
  for (const Json& merge : std::vector<Json>{3, "ab", {"a"}, {"a", "b", "c"}, {"a", 1}, nullptr}) {
    json["model"]["merges"] = Json::array({merge});
    ExpectJsonError(json, kInvalid, "model.merges");
  }
  json["model"]["merges"] = Json::array({Json::array({"a", "no such token"})});
  ExpectJsonError(json, kInvalid, "merges[0]");
  json["model"]["merges"] =
      Json::array({Json::array({"Q", "Q"})});  // both known, the result is not
  ExpectJsonError(json, kInvalid, "merges[0]");
  json["model"]["merges"] = "none";
  ExpectJsonError(json, kInvalid, "model.merges");
}

TEST(TokenizerJsonTest, LyingAddedTokensAreRefused) {
  Json json = GoldenJson("gpt2");
  const Json good = json["added_tokens"][0];
  const auto with = [&](const char* field, const Json& value) {
    json["added_tokens"][0] = good;
    json["added_tokens"][0][field] = value;
    return json;
  };
  ExpectJsonError(with("id", -3), kInvalid, "added_tokens");
  ExpectJsonError(with("id", 1 << 28), kInvalid, "added_tokens");
  ExpectJsonError(with("content", ""), kInvalid, "added_tokens");
  ExpectJsonError(with("content", 7), kInvalid, "added_tokens");
  ExpectJsonError(with("content", std::string(4096, 'x')), kInvalid, "added_tokens");
  ExpectJsonError(with("id", 5), kInvalid, "disagree about id 5");
  ExpectJsonError(with("content", "a"), kInvalid, "disagree");
  ExpectJsonError(with("lstrip", true), kUnsupported, "lstrip");
  json["added_tokens"] = 1;
  ExpectJsonError(json, kInvalid, "added_tokens");
}

TEST(TokenizerJsonTest, UnsupportedComponentsAreRefusedByName) {
  const auto with = [](const char* vocabulary, const Json::json_pointer& at, const Json& value) {
    Json json = GoldenJson(vocabulary);
    json[at] = value;
    return json;
  };
  using Pointer = Json::json_pointer;
  const auto unsupported = [&](const char* vocabulary, const char* at, const Json& value,
                               const std::string& name) {
    ExpectJsonError(with(vocabulary, Pointer(at), value), kUnsupported, name);
  };
  unsupported("gpt2", "/model/type", "WordPiece", "WordPiece");
  unsupported("gpt2", "/model/type", "Unigram", "Unigram");
  unsupported("gpt2", "/model/dropout", 0.1, "dropout");
  unsupported("gpt2", "/model/end_of_word_suffix", "</w>", "end_of_word_suffix");
  unsupported("gpt2", "/model/continuing_subword_prefix", "##", "continuing_subword_prefix");
  unsupported("gpt2", "/normalizer", {{"type", "Lowercase"}}, "Lowercase");
  unsupported("gpt2", "/pre_tokenizer", {{"type", "Whitespace"}}, "Whitespace");
  unsupported("gpt2", "/pre_tokenizer/add_prefix_space", true, "add_prefix_space");
  unsupported("gpt2", "/pre_tokenizer", nullptr, "neither ByteLevel nor SentencePiece");
  unsupported("gpt2", "/decoder", {{"type", "WordPiece"}}, "WordPiece");
  unsupported("gpt2", "/post_processor", {{"type", "BertProcessing"}}, "BertProcessing");
  unsupported("llama3", "/pre_tokenizer/pretokenizers/0/pattern/Regex", "(a+)+$", "pattern");
  unsupported("llama3", "/pre_tokenizer/pretokenizers/0/behavior", "Removed", "behavior");
  unsupported("llama3", "/pre_tokenizer/pretokenizers/0/invert", true, "inverted");
  unsupported("llama2", "/normalizer/normalizers/1/content", "_", "Replace");
  unsupported("llama2", "/model/ignore_merges", true, "ignore_merges");
}

// Random damage to a real file: the loader answers, and what it accepts can be used.
TEST(TokenizerJsonTest, DamagedFilesDoNotCrash) {
  std::mt19937 random(4);
  for (const char* name : {"llama3.json", "llama2.json", "sp_bpe.model", "sp_unigram_unk.model"}) {
    const std::string text = ReadTextGolden(name);
    int accepted = 0;
    for (int round = 0; round < 150; ++round) {
      std::string damaged = text;
      // Any bytes, which mostly end the parsing, or one digit, which goes deeper.
      const bool gently = round % 2 == 1;
      for (int n = gently ? 1 : 1 + random() % 3; n > 0; --n) {
        const auto byte = random();
        damaged[random() % damaged.size()] = static_cast<char>(gently ? '0' + byte % 10 : byte);
      }
      const auto tokenizer =
          damaged[0] == '{' ? ParseTokenizerJson(damaged) : ParseSentencePiece(damaged);
      if (!tokenizer.ok()) {
        EXPECT_THAT(std::string(tokenizer.status().message()),
                    AnyOf(HasSubstr("tokenizer.json"), HasSubstr("tokenizer.model")));
        continue;
      }
      ++accepted;
      EXPECT_TRUE((*tokenizer)->Encode("Some text, 12 \xE4\xB8\xAD\xFF").ok());
    }
    EXPECT_GT(accepted, 0) << name;
  }
}

// ---- tokenizer.model ----

TEST(SentencePieceTest, TruncatedFilesAreRefused) {
  const std::string bytes = ReadTextGolden("sp_bpe.model");
  int refused = 0;
  for (size_t size = 0; size < bytes.size(); size += 1 + size / 60) {
    const auto tokenizer = ParseSentencePiece(bytes.substr(0, size));
    // A cut between two fields leaves a shorter file that may still be a vocabulary.
    refused += !tokenizer.ok();
    if (!tokenizer.ok()) {
      EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr("tokenizer.model"));
    }
  }
  EXPECT_GT(refused, 100);
  ExpectError(ParseSentencePiece("").status(), kInvalid, "tokenizer.model", "no pieces");
}

// Protocol buffer bytes by hand.
std::string Varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
  return out;
}
std::string Bytes(int field, const std::string& bytes) {
  return Varint(field << 3 | 2) + Varint(bytes.size()) + bytes;
}
std::string Number(int field, uint64_t value) { return Varint(field << 3) + Varint(value); }
std::string Float(int field, float value) {
  std::string out = Varint(field << 3 | 5);
  out.append(reinterpret_cast<const char*>(&value), 4);
  return out;
}
std::string Piece(const std::string& text, float score, int type = 1) {
  return Bytes(1, Bytes(1, text) + Float(2, score) + Number(3, type));
}
// unk, and the letters a and b.
std::string SmallModel() { return Piece("<unk>", 0, 2) + Piece("a", -1) + Piece("b", -2); }

TEST(SentencePieceTest, BadFieldsAreRefusedByName) {
  const auto error = [](const std::string& bytes, absl::StatusCode code, const std::string& field) {
    ExpectError(ParseSentencePiece(bytes).status(), code, "tokenizer.model", field);
  };
  ASSERT_TRUE(ParseSentencePiece(SmallModel()).ok());
  error(SmallModel() + "\x0A\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F", kInvalid, "malformed file");
  error(SmallModel() + std::string(11, '\xFF'), kInvalid, "malformed file");
  error(SmallModel() + Piece("x", 0, 7), kInvalid, "pieces.type");
  error(SmallModel() + Bytes(1, "\x0A\x05zz"), kInvalid, "pieces");
  error(SmallModel() + Piece("x", NAN), kInvalid, "piece 3");
  error(SmallModel() + Piece(std::string(2000, 'x'), 0), kInvalid, "too long");
  error(SmallModel() + Piece("<0xZZ>", 0, 6), kInvalid, "type byte");
  error(SmallModel() + Bytes(2, Number(35, 1)), kInvalid, "byte_fallback");
  error(SmallModel() + Bytes(2, Number(40, 99)), kInvalid, "unk_id 99");
  error(SmallModel() + Bytes(2, Number(3, 3)), kUnsupported, "model_type 3");
  error(SmallModel() + Bytes(2, Number(24, 1)), kUnsupported, "treat_whitespace_as_suffix");
  error(SmallModel() + Bytes(2, Number(3, 2)) + Piece("ab", 0, 5), kUnsupported, "unused");
  for (const std::string map : {"x", "\xFF\xFF\xFF\xFFzz", "abcdefgh", "\x04"}) {
    error(SmallModel() + Bytes(3, Bytes(2, map)), kInvalid, "precompiled_charsmap");
  }
}

TEST(CharsMapTest, HostileTriesEnd) {
  // One unit that is its own child for a label, and has a value far outside.
  std::string blob(4 + 4 * 256, '\0');
  blob[1] = 4;  // trie size 1024
  for (size_t i = 4; i < blob.size(); ++i) blob[i] = static_cast<char>(i * 37);
  blob += std::string("ab\0", 3);
  const auto map = CharsMap::Parse(blob);
  ASSERT_TRUE(map.ok()) << map.status();
  for (int c = 0; c < 256; ++c) {
    const std::string text(4096, static_cast<char>(c));
    EXPECT_LE(map->Longest(text).length, 128u);
  }
  EXPECT_FALSE(CharsMap::Parse(blob.substr(0, 4 + 4 * 256) + std::string(2000, 'x') + '\0').ok());
}

// ---- Side files ----

TEST(SideFilesTest, BadFieldsAreRefusedByName) {
  const std::string json = ReadTextGolden("qwen2.json");
  const auto config = [&](const std::string& text, const std::string& field) {
    ExpectError(ParseTokenizerJson(json, {.tokenizer_config = text}).status(), kInvalid,
                "tokenizer_config.json", field);
  };
  config("{", "file");
  config(R"({"bos_token": "<none>"})", "bos_token");
  config(R"({"eos_token": {"content": "<none>"}})", "eos_token");
  config(R"({"add_bos_token": "yes"})", "add_bos_token");
  config(R"({"added_tokens_decoder": []})", "added_tokens_decoder");
  config(R"({"added_tokens_decoder": {"-1": {"content": "x"}}})", "added_tokens_decoder");
  config(R"({"added_tokens_decoder": {"99999999999999999999": {"content": "x"}}})",
         "added_tokens_decoder");
  for (const char* ids : {"\"x\"", "-1", "[1, -1]", "99999999", "[[1]]"}) {
    const std::string text = std::string("{\"eos_token_id\": ") + ids + "}";
    ExpectError(ParseTokenizerJson(json, {.generation_config = text}).status(), kInvalid,
                "generation_config.json", "eos_token_id");
  }
  const auto model = ParseSentencePiece(
      ReadTextGolden("sp_bpe.model"),
      {.tokenizer_config = R"({"added_tokens_decoder": {"5": {"content": "other"}}})"});
  ExpectError(model.status(), kInvalid, "tokenizer_config.json", "id 5");
}

TEST(SideFilesTest, DeclaredTokensExtendASentencePieceFile) {
  const auto plain = LoadGoldenTokenizer("sp_bpe");
  const int32_t next = plain->vocab_size();
  const Json config = {{"added_tokens_decoder",
                        {{std::to_string(next), {{"content", "<|im_end|>"}, {"special", true}}},
                         {std::to_string(next + 1), {{"content", "<tool>"}, {"special", false}}}}}};
  const auto tokenizer = LoadGoldenTokenizer("sp_bpe", {.tokenizer_config = config.dump()});
  EXPECT_EQ(tokenizer->vocab_size(), next + 2);
  EXPECT_EQ(tokenizer->FindControl("<|im_end|>"), next);
  EXPECT_EQ(tokenizer->FindControl("<tool>"), std::nullopt);
  EXPECT_EQ(tokenizer->FindAdded("<tool>"), next + 1);
  const auto ids = tokenizer->Encode("a<tool>b<|im_end|>");
  ASSERT_TRUE(ids.ok());
  EXPECT_THAT(*ids, testing::Contains(next + 1));
  EXPECT_THAT(*ids, testing::Not(testing::Contains(next)));
}

// ---- Folders ----

class FolderTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        std::filesystem::path(testing::TempDir()) /
        ("tokenizer_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  std::filesystem::path folder_;
};

TEST_F(FolderTest, FilesAreFoundAndJsonComesFirst) {
  ExpectError(LoadTokenizer(folder_).status(), absl::StatusCode::kNotFound, "tokenizer.json",
              "tokenizer.model");
  ExpectError(LoadTokenizer(folder_ / "none").status(), absl::StatusCode::kNotFound,
              "tokenizer.json", "tokenizer.model");
  Write("tokenizer.model", ReadTextGolden("sp_bpe.model"));
  auto tokenizer = LoadTokenizer(folder_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE((*tokenizer)->strips_leading_space());
  Write("tokenizer.json", ReadTextGolden("qwen2.json"));
  Write("tokenizer_config.json",
        R"({"eos_token": "<|im_end|>", "chat_template": "from the config"})");
  tokenizer = LoadTokenizer(folder_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_FALSE((*tokenizer)->strips_leading_space());
  EXPECT_EQ((*tokenizer)->chat_template(), "from the config");
  Write("chat_template.jinja", "from its own file");
  Write("generation_config.json", R"({"eos_token_id": [0]})");
  tokenizer = LoadTokenizer(folder_);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->chat_template(), "from its own file");
  EXPECT_EQ((*tokenizer)->eos_ids().size(), 2u);
  Write("tokenizer.json", "");
  ExpectError(LoadTokenizer(folder_).status(), kInvalid, "tokenizer.json", "file");
}

// ---- GGUF metadata ----

TEST(GgufTokenizerErrorsTest, BadFieldsAreRefusedByName) {
  const auto error = [](auto edit, absl::StatusCode code, const std::string& key) {
    GgufTokenizerData data = GgufFromSentencePiece("sp_bpe");
    edit(data);
    ExpectError(MakeGgufTokenizer(std::move(data)).status(), code, "tokenizer.ggml", key);
  };
  error([](auto& d) { d.model = "bert"; }, kUnsupported, "bert");
  error(
      [](auto& d) {
        d.model = "gpt2";
        d.pre = "falcon";
      },
      kUnsupported, "falcon");
  error(
      [](auto& d) {
        d.model = "gpt2";
        d.pre = "";
      },
      kUnsupported, "pre");
  error(
      [](auto& d) {
        d.model = "gpt2";
        d.pre = "smollm";
      },
      kInvalid, "byte");
  error(
      [](auto& d) {
        d.model = "gpt2";
        d.pre = "smollm";
        d.merges = {"ab"};
      },
      kInvalid, "merges");
  error(
      [](auto& d) {
        d.model = "gpt2";
        d.pre = "smollm";
        d.merges = {""};
      },
      kInvalid, "merges");
  error([](auto& d) { d.tokens.clear(); }, kInvalid, "tokens");
  error([](auto& d) { d.tokens[9] = std::string(9999, 'x'); }, kInvalid, "token 9");
  error([](auto& d) { d.scores.pop_back(); }, kInvalid, "scores");
  error([](auto& d) { d.scores[7] = INFINITY; }, kInvalid, "score of piece 7");
  error([](auto& d) { d.types.pop_back(); }, kInvalid, "token_type");
  error([](auto& d) { d.types[3] = 9; }, kInvalid, "token_type");
  error([](auto& d) { d.types[3] = -1; }, kInvalid, "token_type");
  error([](auto& d) { d.bos_id = 1 << 20; }, kInvalid, "bos_token_id");
  error([](auto& d) { d.eos_id = -2; }, kInvalid, "eos_token_id");
  error([](auto& d) { d.eot_id = INT32_MAX; }, kInvalid, "eot_token_id");
  error([](auto& d) { d.unk_id = INT32_MIN; }, kInvalid, "unknown_token_id");
  error(
      [](auto& d) {
        d.types.assign(d.types.size(), 1);
        d.unk_id = -1;
      },
      kInvalid, "unknown token");
}

TEST(GgufTokenizerErrorsTest, SpecialIdsAndTemplateAreTaken) {
  GgufTokenizerData data = GgufFromSentencePiece("sp_bpe");
  data.eot_id = static_cast<int32_t>(
      std::find(data.tokens.begin(), data.tokens.end(), "[unused10]") - data.tokens.begin());
  const int32_t eot = data.eot_id;
  data.chat_template = "T";
  auto tokenizer = MakeGgufTokenizer(data);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos_id(), 1);
  EXPECT_EQ((*tokenizer)->eos_ids(), (std::vector<int32_t>{2, eot}));
  EXPECT_TRUE((*tokenizer)->IsControl(eot));
  EXPECT_TRUE((*tokenizer)->add_bos());
  EXPECT_EQ((*tokenizer)->chat_template(), "T");
  data.add_bos = false;
  tokenizer = MakeGgufTokenizer(data);
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_FALSE((*tokenizer)->add_bos());
}

}  // namespace
}  // namespace entropyserve
