// Typed, checked access to JSON that is not trusted. Internal to engine/text.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace entropyserve {

using Json = nlohmann::json;

inline absl::Status JsonError(std::string_view file, std::string_view field,
                              std::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(file), ": ", std::string(field), " ", std::string(what)));
}

inline absl::StatusOr<Json> ParseJsonObject(std::string_view file, std::string_view text) {
  Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return JsonError(file, "the file", "is not valid JSON, or truncated");
  if (!json.is_object()) return JsonError(file, "the file", "is not a JSON object");
  return json;
}

// Null when `object` is not an object, or the field is absent or null.
inline const Json* FieldOf(const Json& object, const char* name) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

// Empty when absent or not a string.
inline std::string StringOf(const Json& object, const char* name) {
  const Json* field = FieldOf(object, name);
  return field != nullptr && field->is_string() ? field->get<std::string>() : std::string();
}

inline bool BoolOf(const Json& object, const char* name, bool otherwise) {
  const Json* field = FieldOf(object, name);
  return field != nullptr && field->is_boolean() ? field->get<bool>() : otherwise;
}

// An integer in [0, end), or nothing.
inline std::optional<int32_t> IdOf(const Json& value, int32_t end) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned()) {
    const uint64_t id = value.get<uint64_t>();
    if (id < static_cast<uint64_t>(end)) return static_cast<int32_t>(id);
  }
  return std::nullopt;
}

}  // namespace entropyserve
