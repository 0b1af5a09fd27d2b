// The safetensors format: 8 bytes of header length, a JSON header with every tensor's dtype, shape
// and byte range, then the bytes. The header is checked whole before anything is read through it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/weights/mapped_file.h"

namespace entropyserve {

struct SafetensorsEntry {
  std::string dtype;           // as written: "F32", "BF16", "I64", ...
  std::vector<int64_t> shape;  // empty: a scalar
  int64_t elements = 1;
  absl::Span<const uint8_t> data;  // elements * size of dtype
};

// One .safetensors file. Thread-compatible: const methods may run at the same time.
class SafetensorsFile {
 public:
  using Tensors = std::map<std::string, SafetensorsEntry, std::less<>>;

  // INVALID_ARGUMENT: not a safetensors file, a header that is truncated, malformed or longer than
  // 16 MiB, a shape that overflows, byte ranges that overlap, leave a gap, or do not match the
  // shape or the file. UNIMPLEMENTED: an unknown dtype. The message names file and tensor. Also
  // what MappedFile::Open returns.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  // The same over memory that outlives the object; `name` stands for the file in messages.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Parse(absl::Span<const uint8_t> bytes,
                                                                std::string name);

  const Tensors& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const MappedFile* file() const { return file_.get(); }  // null after Parse

  // NOT_FOUND: no such tensor.
  absl::StatusOr<const SafetensorsEntry*> Find(std::string_view name) const;
  // The whole tensor, row-major. F32, F16 and BF16. INVALID_ARGUMENT: another dtype.
  absl::StatusOr<std::vector<float>> ReadFloats(std::string_view name) const;
  // I32, I64 and U8. INVALID_ARGUMENT: another dtype.
  absl::StatusOr<std::vector<int64_t>> ReadInts(std::string_view name) const;

 private:
  SafetensorsFile() = default;

  std::string name_;
  std::unique_ptr<MappedFile> file_;
  Tensors tensors_;
  std::map<std::string, std::string> metadata_;  // "__metadata__"
};

}  // namespace entropyserve
