#include "engine/weights/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/dequant.h"
#include "engine/weights/safetensors_header.h"

namespace entropyserve {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors is read in place");

constexpr size_t kLengthBytes = 8;
// Bytes. A 405B model in one file would need about 150 KiB; the rest is room.
constexpr uint64_t kMaxHeader = 16 << 20;

// Bytes per element, 0 when the dtype is unknown. Sub-byte types are not listed on purpose.
int64_t DtypeBytes(std::string_view dtype) {
  static constexpr std::pair<std::string_view, int64_t> kTable[] = {
      {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8},     {"I64", 8},
      {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U8", 1},      {"U16", 2},
      {"U32", 4}, {"U64", 8}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  for (const auto& [name, bytes] : kTable) {
    if (name == dtype) return bytes;
  }
  return 0;
}

// Product of the shape, -1 when it overflows.
int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t dim : shape) {
    if (__builtin_mul_overflow(n, dim, &n)) return -1;
  }
  return n;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> parsed, Parse(file->bytes(), path));
  parsed->file_ = std::move(file);
  return parsed;
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Parse(
    absl::Span<const uint8_t> bytes, std::string name) {
  const auto invalid = [&name](const std::string& tensor, const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(name, tensor.empty() ? "" : ": tensor '", tensor,
                                                   tensor.empty() ? "" : "'", ": ", what));
  };
  if (bytes.size() < kLengthBytes) return invalid("", "too short for a safetensors file");
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeader || header_bytes > bytes.size() - kLengthBytes) {
    return invalid(
        "", absl::StrCat("header length ", header_bytes, " does not fit (file: ", bytes.size(),
                         " bytes, limit ", kMaxHeader, "); truncated, or not a safetensors file"));
  }
  const std::string_view json(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                              size_t(header_bytes));
  ASSIGN_OR_RETURN(SafetensorsHeader header, ParseSafetensorsHeader(json, name));
  const absl::Span<const uint8_t> data = bytes.subspan(kLengthBytes + size_t(header_bytes));

  // The format allows neither overlap nor gap, so in offset order each tensor starts where the last
  // one ended.
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const auto& a, const auto& b) { return a.data_offsets < b.data_offsets; });
  std::unique_ptr<SafetensorsFile> result(new SafetensorsFile);
  int64_t next = 0;
  for (SafetensorsHeader::Tensor& tensor : header.tensors) {
    const int64_t begin = tensor.data_offsets[0], end = tensor.data_offsets[1];
    const int64_t element_bytes = DtypeBytes(tensor.dtype);
    if (element_bytes == 0) {
      return absl::UnimplementedError(
          absl::StrCat(name, ": tensor '", tensor.name, "': unknown dtype '", tensor.dtype, "'"));
    }
    const int64_t elements = Elements(tensor.shape);
    int64_t size;
    if (elements < 0 || __builtin_mul_overflow(elements, element_bytes, &size)) {
      return invalid(tensor.name, "shape overflows");
    }
    if (begin != next || end < begin) {
      return invalid(tensor.name,
                     absl::StrCat("data_offsets [", begin, ", ", end,
                                  ") overlap another tensor or leave a gap (expected ", next, ")"));
    }
    if (end - begin != size) {
      return invalid(tensor.name, absl::StrCat("data_offsets span ", end - begin,
                                               " bytes, dtype and shape need ", size));
    }
    if (uint64_t(end) > data.size()) {
      return invalid(tensor.name, absl::StrCat("ends at data byte ", end, ", the file has ",
                                               data.size(), ": truncated"));
    }
    next = end;
    result->tensors_.emplace(std::move(tensor.name),
                             SafetensorsEntry{std::move(tensor.dtype), std::move(tensor.shape),
                                              elements, data.subspan(size_t(begin), size_t(size))});
  }
  if (uint64_t(next) != data.size()) {
    return invalid("", absl::StrCat(data.size() - uint64_t(next), " bytes after the last tensor"));
  }
  result->name_ = std::move(name);
  result->metadata_ = std::move(header.metadata);
  return result;
}

absl::StatusOr<const SafetensorsEntry*> SafetensorsFile::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(name_, ": no tensor '", std::string(name), "'"));
  }
  return &it->second;
}

absl::StatusOr<std::vector<float>> SafetensorsFile::ReadFloats(std::string_view name) const {
  ASSIGN_OR_RETURN(const SafetensorsEntry* entry, Find(name));
  StorageType type;
  if (entry->dtype == "F32") {
    type = StorageType::kF32;
  } else if (entry->dtype == "F16") {
    type = StorageType::kF16;
  } else if (entry->dtype == "BF16") {
    type = StorageType::kBF16;
  } else {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": tensor '", std::string(name), "' is ",
                                                   entry->dtype, ", expected F32, F16 or BF16"));
  }
  std::vector<float> out(size_t(entry->elements));
  DequantizeRow(type, entry->data.data(), out.size(), out.data());
  return out;
}

absl::StatusOr<std::vector<int64_t>> SafetensorsFile::ReadInts(std::string_view name) const {
  ASSIGN_OR_RETURN(const SafetensorsEntry* entry, Find(name));
  const uint8_t* data = entry->data.data();
  std::vector<int64_t> out(size_t(entry->elements));
  if (entry->dtype == "I64") {
    if (!out.empty()) std::memcpy(out.data(), data, out.size() * sizeof(int64_t));
  } else if (entry->dtype == "I32") {
    for (size_t i = 0; i < out.size(); ++i) {
      int32_t x;
      std::memcpy(&x, data + i * sizeof(x), sizeof(x));
      out[i] = x;
    }
  } else if (entry->dtype == "U8") {
    out.assign(data, data + out.size());
  } else {
    return absl::InvalidArgumentError(absl::StrCat(name_, ": tensor '", std::string(name), "' is ",
                                                   entry->dtype, ", expected I32, I64 or U8"));
  }
  return out;
}

}  // namespace entropyserve
