#include "engine/weights/json_fields.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/mapped_file.h"

namespace entropyserve {
namespace {

// Bytes. A shard index of the largest models is about 1 MiB.
constexpr size_t kMaxJsonFile = 16 << 20;
// Objects and arrays inside one another; a configuration needs three.
constexpr int kMaxDepth = 32;

bool ToInt(const nlohmann::json& value, int64_t* out) {
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}) return false;
  *out = value.get<int64_t>();
  return true;
}

}  // namespace

absl::Status JsonFields::Invalid(const std::string& field, const std::string& what) const {
  return absl::InvalidArgumentError(absl::StrCat(where_, ": ", field, ": ", what));
}

absl::Status JsonFields::Unsupported(const std::string& field, const std::string& what) const {
  return absl::UnimplementedError(absl::StrCat(where_, ": ", field, ": ", what));
}

absl::StatusOr<int64_t> JsonFields::Int(const std::string& field) const {
  if (!Has(field)) return Invalid(field, "missing");
  int64_t x;
  if (!ToInt(Get(field), &x)) return Invalid(field, "not an integer");
  return x;
}

absl::StatusOr<int64_t> JsonFields::Int(const std::string& field, int64_t value) const {
  return Has(field) ? Int(field) : value;
}

absl::StatusOr<double> JsonFields::Double(const std::string& field) const {
  if (!Has(field)) return Invalid(field, "missing");
  const nlohmann::json& value = Get(field);
  if (!value.is_number() || !std::isfinite(value.get<double>())) {
    return Invalid(field, "not a finite number");
  }
  return value.get<double>();
}

absl::StatusOr<double> JsonFields::Double(const std::string& field, double value) const {
  return Has(field) ? Double(field) : value;
}

absl::StatusOr<bool> JsonFields::Bool(const std::string& field, bool value) const {
  if (!Has(field)) return value;
  if (!Get(field).is_boolean()) return Invalid(field, "not a boolean");
  return Get(field).get<bool>();
}

absl::StatusOr<std::string> JsonFields::String(const std::string& field,
                                               const std::string& value) const {
  if (!Has(field)) return value;
  if (!Get(field).is_string()) return Invalid(field, "not a string");
  return Get(field).get<std::string>();
}

absl::StatusOr<std::vector<int64_t>> JsonFields::IntOrList(const std::string& field) const {
  std::vector<int64_t> out;
  if (!Has(field)) return out;
  const nlohmann::json& value = Get(field);
  const nlohmann::json list = value.is_array() ? value : nlohmann::json::array({value});
  for (const nlohmann::json& element : list) {
    if (!ToInt(element, &out.emplace_back())) {
      return Invalid(field, "neither an integer nor a list of integers");
    }
  }
  return out;
}

absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, const std::string& where) {
  bool too_deep = false;
  const auto limit_depth = [&too_deep](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    too_deep |= depth > kMaxDepth;
    return depth <= kMaxDepth;  // deeper parts are dropped as they are read
  };
  nlohmann::json json =
      nlohmann::json::parse(text.begin(), text.end(), limit_depth, /*allow_exceptions=*/false);
  if (too_deep) return absl::InvalidArgumentError(absl::StrCat(where, ": nested too deeply"));
  if (!json.is_object())
    return absl::InvalidArgumentError(absl::StrCat(where, ": not a JSON object"));
  return json;
}

absl::StatusOr<nlohmann::json> LoadJsonObject(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  if (file->bytes().size() > kMaxJsonFile) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", file->bytes().size(), " bytes, the limit is ", kMaxJsonFile));
  }
  return ParseJsonObject(
      {reinterpret_cast<const char*>(file->bytes().data()), file->bytes().size()}, path);
}

}  // namespace entropyserve
