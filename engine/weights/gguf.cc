#include "engine/weights/gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/gguf_parser.h"

namespace entropyserve {
namespace {

template <typename T>
T Load(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

bool IsInteger(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kUint16:
    case GgufType::kInt16:
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kUint64:
    case GgufType::kInt64:
      return true;
    default:
      return false;
  }
}

// A value of an integer type; a uint64 beyond int64 becomes INT64_MAX, which no field accepts.
int64_t LoadInt(GgufType type, const uint8_t* p) {
  switch (type) {
    case GgufType::kUint8:
      return *p;
    case GgufType::kInt8:
      return Load<int8_t>(p);
    case GgufType::kUint16:
      return Load<uint16_t>(p);
    case GgufType::kInt16:
      return Load<int16_t>(p);
    case GgufType::kUint32:
      return Load<uint32_t>(p);
    case GgufType::kInt32:
      return Load<int32_t>(p);
    case GgufType::kInt64:
      return Load<int64_t>(p);
    default: {
      const uint64_t x = Load<uint64_t>(p);
      return int64_t(std::min(x, uint64_t{INT64_MAX}));
    }
  }
}

std::string_view LoadString(const uint8_t** p) {
  const uint64_t n = Load<uint64_t>(*p);
  const std::string_view s(reinterpret_cast<const char*>(*p) + sizeof(n), size_t(n));
  *p += sizeof(n) + size_t(n);
  return s;
}

}  // namespace

absl::StatusOr<std::unique_ptr<GgufFile>> GgufFile::Open(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  ASSIGN_OR_RETURN(std::unique_ptr<GgufFile> parsed, Parse(file->bytes(), path));
  parsed->file_ = std::move(file);
  return parsed;
}

absl::StatusOr<std::unique_ptr<GgufFile>> GgufFile::Parse(absl::Span<const uint8_t> bytes,
                                                          std::string name) {
  std::unique_ptr<GgufFile> result(new GgufFile);
  result->name_ = std::move(name);
  RETURN_IF_ERROR(
      ParseGguf(bytes, result->name_, &result->metadata_, &result->tensors_, &result->data_));
  ASSIGN_OR_RETURN(const int64_t parts, result->IntOr("split.count", 1));
  if (parts > 1) {
    return absl::UnimplementedError(absl::StrCat(
        result->name_, ": split.count: one of ", parts,
        " parts; merge them into one file first (llama.cpp's gguf-split --merge does it)"));
  }
  return result;
}

absl::Status GgufFile::Invalid(std::string_view key, std::string_view what) const {
  return absl::InvalidArgumentError(
      absl::StrCat(name_, ": ", std::string(key), ": ", std::string(what)));
}

absl::StatusOr<const GgufValue*> GgufFile::Find(std::string_view key, bool array) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) {
    return absl::NotFoundError(absl::StrCat(name_, ": no metadata '", std::string(key), "'"));
  }
  if (it->second.is_array != array) {
    return Invalid(key, array ? "not an array" : "an array, expected one value");
  }
  return &it->second;
}

absl::StatusOr<int64_t> GgufFile::Int(std::string_view key) const {
  ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  if (!IsInteger(value->type)) return Invalid(key, "not an integer");
  return LoadInt(value->type, value->bytes.data());
}

absl::StatusOr<int64_t> GgufFile::IntOr(std::string_view key, int64_t value) const {
  return Has(key) ? Int(key) : value;
}

absl::StatusOr<double> GgufFile::Float(std::string_view key) const {
  ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  const uint8_t* p = value->bytes.data();
  double x;
  if (value->type == GgufType::kFloat32) {
    x = Load<float>(p);
  } else if (value->type == GgufType::kFloat64) {
    x = Load<double>(p);
  } else if (IsInteger(value->type)) {
    x = double(LoadInt(value->type, p));
  } else {
    return Invalid(key, "not a number");
  }
  if (!std::isfinite(x)) return Invalid(key, "not finite");
  return x;
}

absl::StatusOr<double> GgufFile::FloatOr(std::string_view key, double value) const {
  return Has(key) ? Float(key) : value;
}

absl::StatusOr<bool> GgufFile::BoolOr(std::string_view key, bool value) const {
  if (!Has(key)) return value;
  ASSIGN_OR_RETURN(const GgufValue* found, Find(key, false));
  if (found->type != GgufType::kBool) return Invalid(key, "not a boolean");
  return found->bytes[0] != 0;
}

absl::StatusOr<std::string> GgufFile::String(std::string_view key) const {
  ASSIGN_OR_RETURN(const GgufValue* value, Find(key, false));
  if (value->type != GgufType::kString) return Invalid(key, "not a string");
  const uint8_t* p = value->bytes.data();
  return std::string(LoadString(&p));
}

absl::StatusOr<std::string> GgufFile::StringOr(std::string_view key, std::string_view value) const {
  return Has(key) ? String(key) : std::string(value);
}

absl::StatusOr<std::vector<std::string_view>> GgufFile::StringViews(std::string_view key) const {
  ASSIGN_OR_RETURN(const GgufValue* value, Find(key, true));
  if (value->type != GgufType::kString) return Invalid(key, "not an array of strings");
  const uint8_t* p = value->bytes.data();
  std::vector<std::string_view> out(size_t(value->count));
  for (std::string_view& s : out) s = LoadString(&p);
  return out;
}

absl::StatusOr<std::vector<std::string>> GgufFile::Strings(std::string_view key) const {
  ASSIGN_OR_RETURN(const std::vector<std::string_view> views, StringViews(key));
  return std::vector<std::string>(views.begin(), views.end());
}

absl::StatusOr<std::vector<int32_t>> GgufFile::Ints(std::string_view key) const {
  ASSIGN_OR_RETURN(const GgufValue* value, Find(key, true));
  if (!IsInteger(value->type)) return Invalid(key, "not an array of integers");
  const size_t size = GgufTypeBytes(value->type);
  std::vector<int32_t> out(size_t(value->count));
  for (size_t i = 0; i < out.size(); ++i) {
    const int64_t x = LoadInt(value->type, value->bytes.data() + i * size);
    if (x < std::numeric_limits<int32_t>::min() || x > std::numeric_limits<int32_t>::max()) {
      return Invalid(key, absl::StrCat("element ", i, " is out of range"));
    }
    out[i] = int32_t(x);
  }
  return out;
}

absl::StatusOr<std::vector<float>> GgufFile::Floats(std::string_view key) const {
  ASSIGN_OR_RETURN(const GgufValue* value, Find(key, true));
  if (value->type != GgufType::kFloat32) return Invalid(key, "not an array of float32");
  std::vector<float> out(size_t(value->count));
  for (size_t i = 0; i < out.size(); ++i) out[i] = Load<float>(value->bytes.data() + i * 4);
  return out;
}

}  // namespace entropyserve
