#include "engine/weights/dequant.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/weights/safetensors.h"
#include "tests/weights_testing.h"

namespace entropyserve {
namespace {

constexpr StorageType kAll[] = {StorageType::kF32,  StorageType::kF16,  StorageType::kBF16,
                                StorageType::kQ8_0, StorageType::kQ4_0, StorageType::kQ4_1,
                                StorageType::kQ5_0, StorageType::kQ5_1, StorageType::kQ4_K,
                                StorageType::kQ5_K, StorageType::kQ6_K};

class DequantTest : public testing::TestWithParam<StorageType> {
 protected:
  void SetUp() override {
    auto file = SafetensorsFile::Open(GoldenPath("dequant.safetensors"));
    ASSERT_TRUE(file.ok()) << file.status();
    file_ = *std::move(file);
    const std::string name = FormatOf(GetParam()).name;
    auto raw = file_->Find(name + ".raw");
    auto expected = file_->Find(name + ".f32");
    ASSERT_TRUE(raw.ok() && expected.ok());
    raw_ = (*raw)->data;
    rows_ = size_t((*expected)->shape[0]);
    columns_ = size_t((*expected)->shape[1]);
    ASSERT_EQ(raw_.size(), rows_ * RowBytes(GetParam(), columns_));
    auto values = file_->ReadFloats(name + ".f32");
    ASSERT_TRUE(values.ok());
    expected_ = *std::move(values);
  }

  std::unique_ptr<SafetensorsFile> file_;
  absl::Span<const uint8_t> raw_;
  std::vector<float> expected_;  // [rows, columns]
  size_t rows_ = 0, columns_ = 0;
};

// Bit for bit the `gguf` package's values, from an address of any alignment.
TEST_P(DequantTest, EqualsTheReferenceBitForBit) {
  const size_t row_bytes = RowBytes(GetParam(), columns_);
  for (size_t row = 0; row < rows_; ++row) {
    std::vector<uint8_t> unaligned(row_bytes + 1);
    std::memcpy(unaligned.data() + 1, raw_.data() + row * row_bytes, row_bytes);
    std::vector<float> got(columns_);
    DequantizeRow(GetParam(), unaligned.data() + 1, columns_, got.data());
    for (size_t i = 0; i < columns_; ++i) {
      const float want = expected_[row * columns_ + i];
      ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(want))
          << "row " << row << " element " << i << ": " << got[i] << " and " << want;
    }
  }
}

TEST_P(DequantTest, ConvertsToBf16ByRoundingToNearestEven) {
  const size_t row_bytes = RowBytes(GetParam(), columns_);
  std::vector<float> scratch(columns_);
  for (size_t row = 0; row < rows_; ++row) {
    std::vector<bf16_t> got(columns_);
    ConvertRow(GetParam(), raw_.data() + row * row_bytes, columns_, DType::kBF16, got.data(),
               scratch.data());
    for (size_t i = 0; i < columns_; ++i) {
      const float want = expected_[row * columns_ + i];
      // The nearest of the two neighbours, by distance rather than by the conversion under test.
      const uint32_t low = std::bit_cast<uint32_t>(want) & 0xffff0000u;
      const double below = std::bit_cast<float>(low), above = std::bit_cast<float>(low + 0x10000u);
      const double distance = std::abs(double(FromBF16(got[i])) - want);
      ASSERT_LE(distance, std::min(std::abs(want - below), std::abs(above - want)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllTypes, DequantTest, testing::ValuesIn(kAll),
                         [](const auto& info) { return FormatOf(info.param).name; });

TEST(ConvertRow, Bf16ToBf16KeepsEveryBit) {
  std::vector<bf16_t> in(65536), out(65536);
  for (size_t i = 0; i < in.size(); ++i) in[i] = bf16_t(i);  // NaN payloads too
  ConvertRow(StorageType::kBF16, reinterpret_cast<const uint8_t*>(in.data()), in.size(),
             DType::kBF16, out.data(), nullptr);
  EXPECT_EQ(in, out);
}

TEST(DequantizeRow, EveryHalfBecomesItsExactValue) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t half = uint16_t(h);
    float got;
    DequantizeRow(StorageType::kF16, reinterpret_cast<const uint8_t*>(&half), 1, &got);
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double sign = half & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(got), mantissa != 0);
      EXPECT_EQ(std::isinf(got), mantissa == 0);
    } else {
      const double want =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      EXPECT_EQ(double(got), sign * want) << h;
      EXPECT_EQ(std::signbit(got), sign < 0) << h;
    }
  }
}

}  // namespace
}  // namespace entropyserve
