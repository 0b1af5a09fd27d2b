#include "client/bench/distribution.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_split.h"
#include "engine/base/flag_set.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kExpected[] =
    "expected a number, uniform:a-b, normal:mean,deviation, lognormal:median,sigma or list:a,b,c, "
    "none "
    "of them negative";

absl::StatusOr<std::vector<double>> ParseNumbers(std::string_view text, char separator) {
  std::vector<double> values;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), separator)) {
    const auto value = ParseNumber(std::string(part));
    if (!value.ok() || !std::isfinite(*value) || *value < 0) {
      return absl::InvalidArgumentError(kExpected);
    }
    values.push_back(*value);
  }
  return values;
}

}  // namespace

absl::StatusOr<Distribution> Distribution::Parse(std::string_view text) {
  const size_t colon = text.find(':');
  const std::string_view kind = colon == text.npos ? "fixed" : text.substr(0, colon);
  const std::string_view rest = colon == text.npos ? text : text.substr(colon + 1);
  Distribution result;
  ASSIGN_OR_RETURN(result.values_, ParseNumbers(rest, kind == "uniform" ? '-' : ','));
  size_t numbers = 2;
  if (kind == "fixed") {
    numbers = 1;
  } else if (kind == "list") {
    numbers = result.values_.size();
  } else if (kind == "uniform") {
    result.kind_ = Kind::kUniform;
  } else if (kind == "normal") {
    result.kind_ = Kind::kNormal;
  } else if (kind == "lognormal") {
    result.kind_ = Kind::kLognormal;
  } else {
    return absl::InvalidArgumentError(kExpected);
  }
  const bool ordered =
      kind != "uniform" || result.values_.size() != 2 || result.values_[0] <= result.values_[1];
  if (result.values_.size() != numbers || !ordered) return absl::InvalidArgumentError(kExpected);
  return result;
}

double Distribution::Sample(Random* random) const {
  switch (kind_) {
    case Kind::kList:
      return values_[values_.size() == 1 ? 0 : random->Below(values_.size())];
    case Kind::kUniform:
      return values_[0] + (values_[1] - values_[0]) * random->Uniform();
    case Kind::kNormal:
      return std::max(0.0, values_[0] + values_[1] * random->Normal());
    case Kind::kLognormal:
      return values_[0] * std::exp(values_[1] * random->Normal());
  }
  return 0;
}

int64_t Distribution::SampleCount(Random* random, int64_t least) const {
  constexpr double kMost = 1e12;  // beyond any context; keeps the conversion defined
  if (kind_ == Kind::kUniform) {
    // Both ends as likely as what lies between them.
    const double low = std::ceil(values_[0]), high = std::floor(values_[1]);
    const double value = low + std::floor((std::max(low, high) - low + 1) * random->Uniform());
    return std::max(least, static_cast<int64_t>(std::min(value, kMost)));
  }
  return std::max(least, static_cast<int64_t>(std::round(std::min(Sample(random), kMost))));
}

}  // namespace entropyserve
