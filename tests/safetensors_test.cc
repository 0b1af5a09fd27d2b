#include "engine/weights/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/weights_testing.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string OneTensor(const std::string& dtype, const std::string& shape,
                      const std::string& offsets) {
  return absl::StrCat(R"({"w":{"dtype":")", dtype, R"(","shape":)", shape, R"(,"data_offsets":)",
                      offsets, "}}");
}

absl::Status ParseStatus(const std::string& bytes) {
  return SafetensorsFile::Parse(Bytes(bytes), "test.safetensors").status();
}

void ExpectRefused(const std::string& bytes, absl::StatusCode code, const std::string& message) {
  const absl::Status status = ParseStatus(bytes);
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  EXPECT_THAT(std::string(status.message()), HasSubstr("test.safetensors"));
}

void ExpectInvalid(const std::string& header, size_t data_bytes, const std::string& message) {
  ExpectRefused(SafetensorsBytes(header, data_bytes), absl::StatusCode::kInvalidArgument, message);
}

TEST(Safetensors, ReadsValuesAndMetadata) {
  const std::string header = R"({"__metadata__":{"policy":"box","n":"3"},)"
                             R"("f":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
                             R"("h":{"dtype":"F16","shape":[2],"data_offsets":[16,20]},)"
                             R"("b":{"dtype":"BF16","shape":[1],"data_offsets":[20,22]},)"
                             R"("i":{"dtype":"I32","shape":[2],"data_offsets":[22,30]},)"
                             R"("l":{"dtype":"I64","shape":[],"data_offsets":[30,38]},)"
                             R"("u":{"dtype":"U8","shape":[2,1],"data_offsets":[38,40]},)"
                             R"("none":{"dtype":"F32","shape":[0,7],"data_offsets":[40,40]}})";
  std::string data;
  for (const float f : {1.0f, -2.5f, 3.0f, 1e30f}) data += Raw(f);
  data += Raw(uint16_t{0x3c00}) + Raw(uint16_t{0xc100});  // 1, -2.5 as halves
  data += Raw(uint16_t{0x4049});                          // 3.140625 as bf16
  data += Raw(int32_t{-7}) + Raw(int32_t{2000000000});
  data += Raw(int64_t{-9000000000});
  data += "\x05\xff";
  const std::string bytes = Raw(uint64_t{header.size()}) + header + data;
  const TempFolder folder;
  const auto file = SafetensorsFile::Open(folder.Write("a.safetensors", bytes));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->metadata().at("policy"), "box");
  EXPECT_EQ((*file)->metadata().size(), 2u);
  EXPECT_EQ((*file)->tensors().size(), 7u);
  EXPECT_THAT((*(*file)->Find("f"))->shape, ElementsAre(2, 2));
  EXPECT_THAT(*(*file)->ReadFloats("f"), ElementsAre(1.0f, -2.5f, 3.0f, 1e30f));
  EXPECT_THAT(*(*file)->ReadFloats("h"), ElementsAre(1.0f, -2.5f));
  EXPECT_THAT(*(*file)->ReadFloats("b"), ElementsAre(3.140625f));
  EXPECT_THAT(*(*file)->ReadInts("i"), ElementsAre(-7, 2000000000));
  EXPECT_THAT(*(*file)->ReadInts("l"), ElementsAre(-9000000000));
  EXPECT_THAT(*(*file)->ReadInts("u"), ElementsAre(5, 255));
  EXPECT_TRUE((*file)->ReadFloats("none")->empty());
  EXPECT_EQ((*file)->ReadFloats("x").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ((*file)->ReadFloats("i").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*file)->ReadInts("f").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Safetensors, RefusesAFileThatIsTooShortOrLiesAboutItsHeader) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ExpectRefused("", invalid, "too short");
  ExpectRefused("abc", invalid, "too short");
  ExpectRefused(Raw(uint64_t{1}), invalid, "header length 1");
  ExpectRefused(Raw(uint64_t{UINT64_MAX}) + "{}", invalid, "header length 18446744073709551615");
  ExpectRefused(Raw(uint64_t{UINT64_MAX - 7}) + "{}", invalid, "header length");
  // Longer than the limit although the file would have the bytes.
  ExpectRefused(Raw(uint64_t{17 << 20}) + std::string(17 << 20, ' '), invalid, "limit");
}

TEST(Safetensors, RefusesOffsetsThatDoNotFit) {
  ExpectInvalid(OneTensor("F32", "[2]", "[0,8]"), 7, "truncated");
  ExpectInvalid(OneTensor("F32", "[2]", "[0,8]"), 9, "1 bytes after the last tensor");
  ExpectInvalid(OneTensor("F32", "[2]", "[0,12]"), 12, "need 8");
  ExpectInvalid(OneTensor("F32", "[2]", "[4,12]"), 12, "gap");
  ExpectInvalid(OneTensor("F32", "[2]", "[8,0]"), 8, "tensor 'w'");
  ExpectInvalid(OneTensor("F32", "[2]", "[0]"), 8, "not a pair");
  ExpectInvalid(OneTensor("F32", "[2]", "[0,8,8]"), 8, "too long");
  ExpectInvalid(OneTensor("F32", "[2]", "[0,18446744073709551615]"), 8, "out of range");
  ExpectInvalid(OneTensor("F32", "[9223372036854775807]", "[0,8]"), 8, "overflows");
  ExpectInvalid(OneTensor("F32", "[4294967296,4294967296]", "[0,0]"), 0, "overflows");
  ExpectInvalid(OneTensor("F32", "[-1]", "[0,8]"), 8, "negative");
  ExpectInvalid(OneTensor("F32", "[2.0]", "[0,8]"), 8, "fraction");
  ExpectInvalid(OneTensor("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8, "too long");
}

TEST(Safetensors, RefusesOverlap) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                             R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})";
  ExpectInvalid(header, 12, "tensor 'b': data_offsets [4, 12) overlap");
}

TEST(Safetensors, RefusesAHeaderOfAnotherForm) {
  ExpectInvalid("", 0, "not JSON");
  ExpectInvalid("[]", 0, "unexpected an array");
  ExpectInvalid("7", 0, "unexpected a number");
  ExpectInvalid(R"({"w":{"dtype":"F32")", 0, "not JSON at byte");
  ExpectInvalid(R"({"w":3})", 0, "tensor 'w'");
  ExpectInvalid(R"({"w":{}})", 0, "'dtype' is missing");
  ExpectInvalid(R"({"w":{"dtype":"F32","shape":[0]}})", 0, "'data_offsets' is missing");
  ExpectInvalid(R"({"w":{"dtype":7}})", 0, "unexpected a number");
  ExpectInvalid(R"({"w":{"shape":[[1]]}})", 0, "unexpected an array");
  ExpectInvalid(R"({"w":{"colour":"red"}})", 0, "unknown field 'colour'");
  ExpectInvalid(R"({"w":{"dtype":"F32","dtype":"F16"}})", 0, "'dtype' occurs twice");
  ExpectInvalid(R"({"__metadata__":{"a":1}})", 0, "unexpected a number");
  ExpectInvalid("{\"\xff\":{}}", 0, "not JSON");
  ExpectInvalid(std::string(1 << 20, '['), 0, "unexpected an array");
  const std::string twice = R"("w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
  ExpectInvalid("{" + twice + "," + twice + "}", 0, "the name occurs twice");
}

TEST(Safetensors, RefusesAnUnknownDtypeByName) {
  ExpectRefused(SafetensorsBytes(OneTensor("F6_WILD", "[2]", "[0,8]"), 8),
                absl::StatusCode::kUnimplemented, "tensor 'w': unknown dtype 'F6_WILD'");
}

TEST(Safetensors, NamesAMissingFile) {
  EXPECT_EQ(SafetensorsFile::Open("/nonexistent/x.safetensors").status().code(),
            absl::StatusCode::kNotFound);
  const TempFolder folder;
  EXPECT_EQ(SafetensorsFile::Open(folder.path()).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SafetensorsFile::Open(folder.Write("empty", "")).status().code(),
            absl::StatusCode::kInvalidArgument);
}

// Every prefix and many random corruptions of a good file either parse or are refused: what parses
// stays inside the bytes (ASan watches).
TEST(Safetensors, SurvivesTruncationAndCorruption) {
  const std::string good = ReadFile(GoldenPath("llama.safetensors"));
  ASSERT_TRUE(ParseStatus(good).ok());
  for (size_t n = 0; n < good.size(); n += n < 2000 ? 1 : 997) {
    EXPECT_FALSE(ParseStatus(good.substr(0, n)).ok()) << n;
  }
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string bad = good;
    for (int flips = 0; flips < 3; ++flips) bad[random() % 1600] = char(random());
    const auto file = SafetensorsFile::Parse(Bytes(bad), "bad");
    refused += !file.ok();
    if (!file.ok()) continue;
    for (const auto& [name, entry] : (*file)->tensors()) {
      if (entry.dtype != "F32") continue;
      EXPECT_EQ((*file)->ReadFloats(name)->size(), size_t(entry.elements));
    }
  }
  EXPECT_GT(refused, 2000);
}

}  // namespace
}  // namespace entropyserve
