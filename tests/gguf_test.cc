#include "engine/weights/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "engine/weights/gguf_tokenizer.h"
#include "tests/weights_testing.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::Status ParseStatus(const std::string& bytes) {
  return GgufFile::Parse(Bytes(bytes), "test.gguf").status();
}

void ExpectRefused(const std::string& bytes, absl::StatusCode code, const std::string& message) {
  const absl::Status status = ParseStatus(bytes);
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  EXPECT_THAT(std::string(status.message()), HasSubstr("test.gguf"));
}

void ExpectInvalid(const std::string& bytes, const std::string& message) {
  ExpectRefused(bytes, absl::StatusCode::kInvalidArgument, message);
}

// A file of the `gguf` package with a value of every type.
TEST(Gguf, ReadsEveryTypeOfValue) {
  const auto opened = GgufFile::Open(GoldenPath("types.gguf"));
  ASSERT_TRUE(opened.ok()) << opened.status();
  const GgufFile& file = **opened;
  EXPECT_EQ(*file.String("general.architecture"), "llama");
  EXPECT_EQ(*file.Int("t.uint8"), 200);
  EXPECT_EQ(*file.Int("t.int8"), -100);
  EXPECT_EQ(*file.Int("t.uint16"), 60000);
  EXPECT_EQ(*file.Int("t.int16"), -30000);
  EXPECT_EQ(*file.Int("t.uint32"), 4000000000);
  EXPECT_EQ(*file.Int("t.int32"), -2000000000);
  EXPECT_EQ(*file.Int("t.int64"), -(int64_t{1} << 40));
  EXPECT_EQ(*file.Int("t.uint64"), INT64_MAX);  // 2^63 + 5 has no int64
  EXPECT_EQ(*file.Float("t.float32"), 0.5);
  EXPECT_EQ(*file.Float("t.float64"), 0.1);
  EXPECT_TRUE(*file.BoolOr("t.bool", false));
  EXPECT_EQ(*file.String("t.string"),
            "gr\xc3\xbc\xc3\x9f"
            "e");
  EXPECT_THAT(*file.Strings("t.strings"), ElementsAre("", "a", "bc"));
  EXPECT_THAT(*file.Ints("t.ints"), ElementsAre(1, -2, 3));
  EXPECT_THAT(*file.Floats("t.floats"), ElementsAre(0.25f, -1.5f));
  EXPECT_EQ(file.metadata().find("t.bools")->second.count, 2u);
  EXPECT_EQ(*file.Int("general.alignment"), 64);
}

TEST(Gguf, ReadsTheTensorDirectory) {
  const auto file = GgufFile::Open(GoldenPath("types.gguf"));
  ASSERT_TRUE(file.ok());
  const GgufTensor& a = (*file)->tensors().find("a")->second;
  const GgufTensor& b = (*file)->tensors().find("b")->second;
  EXPECT_THAT(a.shape, ElementsAre(2, 3));
  EXPECT_THAT(b.shape, ElementsAre(5));
  EXPECT_EQ(b.offset, 64u);
  float last;
  std::memcpy(&last, (*file)->data().data() + b.offset + 16, 4);
  EXPECT_EQ(last, 4.0f);
}

TEST(Gguf, GettersNameKeyAndTypeOnError) {
  const auto file = GgufFile::Open(GoldenPath("types.gguf"));
  ASSERT_TRUE(file.ok());
  const auto message = [](const absl::Status& s) { return std::string(s.message()); };
  EXPECT_EQ((*file)->Int("nothing").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(*(*file)->IntOr("nothing", 5), 5);
  EXPECT_EQ(*(*file)->StringOr("nothing", "x"), "x");
  EXPECT_THAT(message((*file)->Int("t.string").status()), HasSubstr("t.string: not an integer"));
  EXPECT_THAT(message((*file)->IntOr("t.float32", 1).status()), HasSubstr("not an integer"));
  EXPECT_THAT(message((*file)->Float("t.bool").status()), HasSubstr("not a number"));
  EXPECT_THAT(message((*file)->BoolOr("t.int8", false).status()), HasSubstr("not a boolean"));
  EXPECT_THAT(message((*file)->String("t.ints").status()), HasSubstr("an array"));
  EXPECT_THAT(message((*file)->Strings("t.string").status()), HasSubstr("not an array"));
  EXPECT_THAT(message((*file)->Strings("t.ints").status()), HasSubstr("strings"));
  EXPECT_THAT(message((*file)->Ints("t.floats").status()), HasSubstr("integers"));
  EXPECT_THAT(message((*file)->Floats("t.ints").status()), HasSubstr("float32"));
}

TEST(Gguf, AcceptsVersionTwoAndNestedArrays) {
  const std::string inner = Raw(uint32_t{4}) + Raw(uint64_t{2}) + std::string(8, '\1');
  const std::string bytes =
      GgufBuilder().Version(2).Array("nested", 9, 2, inner + inner).U32("after", 7).Build();
  const auto file = GgufFile::Parse(Bytes(bytes), "test.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(*(*file)->Int("after"), 7);
  EXPECT_FALSE((*file)->Ints("nested").ok());
}

TEST(Gguf, RefusesOtherFilesAndVersions) {
  const auto unimplemented = absl::StatusCode::kUnimplemented;
  ExpectInvalid("", "truncated");
  ExpectInvalid("GGU", "truncated");
  ExpectInvalid("<html>not a model", "not a GGUF file");
  ExpectRefused(GgufBuilder().Version(1).Build(), unimplemented, "version 1");
  ExpectRefused(GgufBuilder().Version(4).Build(), unimplemented, "version 4");
  ExpectRefused(GgufBuilder().Version(0x03000000).Build(), unimplemented, "big-endian");
  ExpectRefused(GgufBuilder().U32("split.count", 3).Build(), unimplemented, "merge them");
}

TEST(Gguf, RefusesCountsAndLengthsThatTheFileCannotHold) {
  ExpectInvalid(GgufBuilder().Counts(UINT64_MAX, 0).Build(), "tensor count");
  ExpectInvalid(GgufBuilder().Counts(0, UINT64_MAX).Build(), "metadata count");
  ExpectInvalid(GgufBuilder().Counts(0, 1).Build(), "metadata");
  ExpectInvalid(GgufBuilder().Pair("k", 8, Raw(uint64_t{UINT64_MAX})).Build(), "k at byte");
  ExpectInvalid(GgufBuilder().Array("k", 8, UINT64_MAX, "").Build(), "does not fit");
  ExpectInvalid(GgufBuilder().Array("k", 10, (UINT64_MAX / 8) + 2, "").Build(), "does not fit");
  ExpectInvalid(GgufBuilder().Array("k", 9, uint64_t{1} << 40, "").Build(), "does not fit");
  ExpectInvalid(GgufBuilder().Pair("k", 13, "").Build(), "unknown value type 13");
  ExpectInvalid(GgufBuilder().Array("k", 77, 0, "").Build(), "unknown value type 77");
  ExpectInvalid(GgufBuilder().U32("", 1).Build(), "bad length");
  ExpectInvalid(GgufBuilder().U32("k", 1).U32("k", 1).Build(), "occurs twice");
  std::string deep;
  for (int i = 0; i < 40; ++i) deep += Raw(uint32_t{9}) + Raw(uint64_t{1});
  ExpectInvalid(GgufBuilder().Array("k", 9, 1, deep).Build(), "nested too deeply");
}

TEST(Gguf, RefusesAlignmentsThatAreNone) {
  ExpectInvalid(GgufBuilder().U32("general.alignment", 0).Build(), "general.alignment");
  ExpectInvalid(GgufBuilder().U32("general.alignment", 48).Build(), "power of two");
  ExpectInvalid(GgufBuilder().U32("general.alignment", 1u << 31).Build(), "general.alignment");
  ExpectInvalid(GgufBuilder().Text("general.alignment", "64").Build(), "general.alignment");
}

TEST(Gguf, RefusesTensorsThatCannotBe) {
  ExpectInvalid(GgufBuilder().Tensor("w", {}, 0, 0).Build(), "0 dimensions");
  ExpectInvalid(GgufBuilder().Tensor("w", {1, 1, 1, 1, 1}, 0, 0).Build(), "5 dimensions");
  ExpectInvalid(GgufBuilder().Tensor("w", {4, 0}, 0, 0).Build(), "dimension 0");
  ExpectInvalid(GgufBuilder().Tensor("w", {UINT64_MAX}, 0, 0).Build(), "dimension -1");
  ExpectInvalid(GgufBuilder().Tensor("w", {1ull << 32, 1ull << 32}, 0, 0).Build(), "not possible");
  ExpectInvalid(GgufBuilder().Tensor("w", {4}, 0, 5).Build(), "not a multiple of 32");
  ExpectInvalid(GgufBuilder().Zeros("w", {4}).Zeros("w", {4}).Build(), "occurs twice");
}

TEST(Gguf, SurvivesTruncationAndCorruption) {
  for (const char* name : {"types.gguf", "llama.gguf"}) {
    const std::string good = ReadFile(GoldenPath(name));
    ASSERT_TRUE(ParseStatus(good).ok());
    const auto file = GgufFile::Parse(Bytes(good), "good");
    const size_t header = good.size() - (*file)->data().size();
    for (size_t n = 0; n < header; ++n) EXPECT_FALSE(ParseStatus(good.substr(0, n)).ok()) << n;
    std::mt19937 random(11);
    int refused = 0;
    for (int i = 0; i < 3000; ++i) {
      std::string bad = good;
      for (int flips = 0; flips < 4; ++flips) bad[random() % header] = char(random());
      refused += !ParseStatus(bad).ok();
    }
    EXPECT_GT(refused, 300) << name;
  }
}

TEST(GgufTokenizer, TakesWhatTheFileSays) {
  const std::string tokens = GgufBuilder::Str("a") + GgufBuilder::Str("b") + GgufBuilder::Str("ab");
  const std::string bytes = GgufBuilder()
                                .Text("tokenizer.ggml.model", "gpt2")
                                .Text("tokenizer.ggml.pre", "qwen2")
                                .Array("tokenizer.ggml.tokens", 8, 3, tokens)
                                .Array("tokenizer.ggml.token_type", 5, 3,
                                       Raw(int32_t{1}) + Raw(int32_t{1}) + Raw(int32_t{3}))
                                .Array("tokenizer.ggml.merges", 8, 1, GgufBuilder::Str("a b"))
                                .U32("tokenizer.ggml.bos_token_id", 0xffffffff)
                                .U32("tokenizer.ggml.eos_token_id", 2)
                                .Pair("tokenizer.ggml.add_bos_token", 7, std::string(1, '\0'))
                                .Text("tokenizer.chat_template", "{{x}}")
                                .Build();
  const auto file = GgufFile::Parse(Bytes(bytes), "test.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  const auto data = ReadGgufTokenizer(**file);
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->model, "gpt2");
  EXPECT_EQ(data->pre, "qwen2");
  EXPECT_THAT(data->tokens, ElementsAre("a", "b", "ab"));
  EXPECT_THAT(data->types, ElementsAre(1, 1, 3));
  EXPECT_THAT(data->merges, ElementsAre("a b"));
  EXPECT_TRUE(data->scores.empty());
  EXPECT_EQ(data->bos_id, -1);
  EXPECT_EQ(data->eos_id, 2);
  EXPECT_EQ(data->eot_id, -1);
  EXPECT_EQ(data->add_bos, false);
  EXPECT_FALSE(data->add_space_prefix.has_value());
  EXPECT_EQ(data->chat_template, "{{x}}");
}

TEST(GgufTokenizer, NamesWhatIsMissingOrWrong) {
  const std::string none = GgufBuilder().Build();
  const auto empty = GgufFile::Parse(Bytes(none), "test.gguf");
  ASSERT_TRUE(empty.ok());
  const absl::Status missing = ReadGgufTokenizer(**empty).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("tokenizer.ggml.model"));
  const std::string bytes =
      GgufBuilder().Text("tokenizer.ggml.model", "gpt2").U32("tokenizer.ggml.tokens", 1).Build();
  const auto wrong = GgufFile::Parse(Bytes(bytes), "test.gguf");
  ASSERT_TRUE(wrong.ok());
  const absl::Status status = ReadGgufTokenizer(**wrong).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer.ggml.tokens"));
}

}  // namespace
}  // namespace entropyserve
