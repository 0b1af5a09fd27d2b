// Dense prefills that are timed at start: which lengths, and what lies between them.
#include "server/dense_calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/fake_engine.h"

namespace entropyserve {
namespace {

using testing::ElementsAre;

double Quadratic(int64_t tokens) { return 1e-4 * double(tokens) + 3e-9 * double(tokens * tokens); }

class DenseCalibrationTest : public testing::Test {
 protected:
  // `seconds`: of a dense prefill of so many tokens.
  DenseCalibration Measure(int64_t most, int64_t context,
                           std::function<absl::StatusOr<double>(int64_t)> seconds) {
    tried_.clear();
    engine_.time_dense_prefill = [this, seconds](int64_t tokens) {
      tried_.push_back(tokens);
      return seconds(tokens);
    };
    auto dense = DenseCalibration::Measure(&engine_, most, context);
    EXPECT_TRUE(dense.ok()) << dense.status();
    return dense.ok() ? *dense : DenseCalibration({});
  }

  FakeEngine engine_;
  std::vector<int64_t> tried_;
};

TEST_F(DenseCalibrationTest, LengthsDoubleUpToTheFlagOrTheContext) {
  Measure(20000, 1 << 20, Quadratic);
  EXPECT_THAT(tried_, ElementsAre(4096, 4096, 8192, 16384, 20000));  // the first warms up
  Measure(1 << 20, 8192, Quadratic);
  EXPECT_THAT(tried_, ElementsAre(4096, 4096, 8192));
  EXPECT_THAT(Measure(1 << 20, 2048, Quadratic).points(), testing::IsEmpty());
  EXPECT_THAT(tried_, testing::IsEmpty());
}

TEST_F(DenseCalibrationTest, TheFirstReadingOfALengthIsNotKept) {
  bool first = true;
  const DenseCalibration dense =
      Measure(4096, 4096, [&](int64_t) { return std::exchange(first, false) ? 9.0 : 2.0; });
  EXPECT_EQ(dense.Seconds(4096), 2.0);
}

TEST_F(DenseCalibrationTest, EndsBeforeALengthThatMightTakeTooLongOrDoesNotFit) {
  // 50 + 50 + 100 seconds; the next might take 400 more.
  EXPECT_EQ(
      Measure(1 << 20, 1 << 20, [](int64_t n) { return double(n) / 4096 * 50; }).points().size(),
      2u);
  EXPECT_THAT(tried_, ElementsAre(4096, 4096, 8192));
  const auto fits = [](int64_t n) -> absl::StatusOr<double> {
    if (n > 8192) return absl::ResourceExhaustedError("pages");
    return 1.0;
  };
  const DenseCalibration dense = Measure(1 << 20, 1 << 20, fits);
  EXPECT_THAT(tried_, ElementsAre(4096, 4096, 8192, 16384));
  EXPECT_EQ(dense.points().back().tokens, 8192);
  EXPECT_EQ(dense.Seconds(8193), std::nullopt);
}

TEST_F(DenseCalibrationTest, AnIllModelIsAnError) {
  engine_.time_dense_prefill = [](int64_t) { return absl::InternalError("not finite"); };
  EXPECT_TRUE(absl::IsInternal(DenseCalibration::Measure(&engine_, 8192, 8192).status()));
}

TEST_F(DenseCalibrationTest, ALineAndAParabolaAreFoundAgainBetweenThePoints) {
  const DenseCalibration dense = Measure(65536, 1 << 20, Quadratic);
  for (const int64_t tokens : {4096, 5000, 8191, 8192, 30000, 65535, 65536}) {
    ASSERT_TRUE(dense.Seconds(tokens).has_value()) << tokens;
    EXPECT_NEAR(*dense.Seconds(tokens), Quadratic(tokens), 1e-9) << tokens;
  }
  EXPECT_EQ(dense.Seconds(4095), std::nullopt);
  EXPECT_EQ(dense.Seconds(65537), std::nullopt);
}

TEST(LengthNameTest, IsInThousandsWhereItCan) {
  EXPECT_EQ(LengthName(4096), "4k");
  EXPECT_EQ(LengthName(1 << 20), "1024k");
  EXPECT_EQ(LengthName(20000), "20000");
}

}  // namespace
}  // namespace entropyserve
