// Typed access to a JSON object from a checkpoint's folder: every error names file and field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace entropyserve {

// A field that is null counts as absent, as in Hugging Face's configurations.
//
// Getters with a default return it when the field is absent; those without return INVALID_ARGUMENT.
// All return INVALID_ARGUMENT for another type or a number that is not finite.
class JsonFields {
 public:
  // `object` must be a JSON object and outlive this; `where` starts every message ("config.json").
  JsonFields(const nlohmann::json& object, std::string where)
      : object_(object), where_(std::move(where)) {}

  bool Has(const std::string& field) const {
    const auto it = object_.find(field);
    return it != object_.end() && !it->is_null();
  }
  const nlohmann::json& Get(const std::string& field) const { return object_.at(field); }
  const nlohmann::json& object() const { return object_; }
  const std::string& where() const { return where_; }

  absl::StatusOr<int64_t> Int(const std::string& field) const;
  absl::StatusOr<int64_t> Int(const std::string& field, int64_t value) const;
  absl::StatusOr<double> Double(const std::string& field) const;
  absl::StatusOr<double> Double(const std::string& field, double value) const;
  absl::StatusOr<bool> Bool(const std::string& field, bool value) const;
  absl::StatusOr<std::string> String(const std::string& field, const std::string& value) const;
  // One integer or a list of them; empty when absent.
  absl::StatusOr<std::vector<int64_t>> IntOrList(const std::string& field) const;

  // INVALID_ARGUMENT and UNIMPLEMENTED, naming the field.
  absl::Status Invalid(const std::string& field, const std::string& what) const;
  absl::Status Unsupported(const std::string& field, const std::string& what) const;

 private:
  const nlohmann::json& object_;
  const std::string where_;
};

// Parses text that must be a JSON object. INVALID_ARGUMENT names `where`.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, const std::string& where);

// Reads and parses a file of at most 16 MiB. Also the errors of MappedFile::Open.
absl::StatusOr<nlohmann::json> LoadJsonObject(const std::string& path);

}  // namespace entropyserve
