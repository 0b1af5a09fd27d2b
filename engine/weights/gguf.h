// The GGUF format, versions 2 and 3, little endian: typed metadata, then a tensor directory, then
// aligned tensor data. Everything is checked against the file's size before it is believed, and
// nothing is copied until it is asked for.
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

// Type codes as in the file.
enum class GgufType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// A metadata value, still in the file's bytes.
struct GgufValue {
  GgufType type;  // of the value, or of an array's elements when is_array
  bool is_array =
      false;           // an array of arrays is walked and checked, but its elements are not offered
  uint64_t count = 1;  // elements of an array
  absl::Span<const uint8_t>
      bytes;  // the value, or the array's elements; strings with their lengths
};

struct GgufTensor {
  uint32_t type = 0;           // ggml's code, not interpreted here
  std::vector<int64_t> shape;  // [rows, columns] or [n]: slowest first, the reverse of the file's
  uint64_t offset = 0;         // in the tensor data, bytes
};

// One GGUF file. Thread-compatible: const methods may run at the same time.
//
// Getters: NOT_FOUND when the key is missing; INVALID_ARGUMENT when its type is another or its
// value does not fit. ...Or: the default when the key is missing. Messages name file and key.
class GgufFile {
 public:
  using Tensors = std::map<std::string, GgufTensor, std::less<>>;
  using Metadata = std::map<std::string, GgufValue, std::less<>>;

  // INVALID_ARGUMENT: not GGUF, truncated, a length or count that the file cannot hold, a bad
  // alignment, repeated keys or names. UNIMPLEMENTED: GGUF version 1, big endian, one part of a
  // split model. Also what MappedFile::Open returns.
  static absl::StatusOr<std::unique_ptr<GgufFile>> Open(const std::string& path);
  // The same over memory that outlives the object; `name` stands for the file in messages.
  static absl::StatusOr<std::unique_ptr<GgufFile>> Parse(absl::Span<const uint8_t> bytes,
                                                         std::string name);

  const std::string& name() const { return name_; }
  const MappedFile* file() const { return file_.get(); }  // null after Parse
  const Tensors& tensors() const { return tensors_; }
  const Metadata& metadata() const { return metadata_; }
  absl::Span<const uint8_t> data() const { return data_; }  // the tensor data
  bool Has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }

  absl::StatusOr<int64_t> Int(std::string_view key) const;  // any integer type
  absl::StatusOr<int64_t> IntOr(std::string_view key, int64_t value) const;
  absl::StatusOr<double> Float(std::string_view key) const;  // any number
  absl::StatusOr<double> FloatOr(std::string_view key, double value) const;
  absl::StatusOr<bool> BoolOr(std::string_view key, bool value) const;
  absl::StatusOr<std::string> String(std::string_view key) const;
  absl::StatusOr<std::string> StringOr(std::string_view key, std::string_view value) const;
  absl::StatusOr<std::vector<std::string>> Strings(std::string_view key) const;
  // Views into the file, valid while this object lives.
  absl::StatusOr<std::vector<std::string_view>> StringViews(std::string_view key) const;
  absl::StatusOr<std::vector<int32_t>> Ints(std::string_view key) const;
  absl::StatusOr<std::vector<float>> Floats(std::string_view key) const;

 private:
  GgufFile() = default;
  absl::StatusOr<const GgufValue*> Find(std::string_view key, bool array) const;
  absl::Status Invalid(std::string_view key, std::string_view what) const;

  std::string name_;
  std::unique_ptr<MappedFile> file_;
  Metadata metadata_;
  Tensors tensors_;
  absl::Span<const uint8_t> data_;
};

}  // namespace entropyserve
