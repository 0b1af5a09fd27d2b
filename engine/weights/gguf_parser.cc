#include "engine/weights/gguf_parser.h"

#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place");

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr size_t kMaxKey = 65535;  // bytes, from the specification
constexpr uint32_t kMaxDims = 4;   // from ggml
constexpr int kMaxArrayDepth = 4;  // arrays of arrays; real files have one level
// The smallest records: a counter can be refused before the first one is read.
constexpr uint64_t kMinPairBytes = 8 + 4 + 1;
constexpr uint64_t kMinTensorBytes = 8 + 4 + 8 + 4 + 8;

// A cursor that cannot leave its bytes. Every read fails with the name of what was being read.
class Cursor {
 public:
  Cursor(absl::Span<const uint8_t> bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  size_t position() const { return position_; }
  uint64_t left() const { return bytes_.size() - position_; }

  absl::Status Invalid(const std::string& what, const std::string& why) const {
    return absl::InvalidArgumentError(
        absl::StrCat(file_, ": ", what, " at byte ", position_, ": ", why));
  }

  template <typename T>
  absl::StatusOr<T> Read(const std::string& what) {
    if (left() < sizeof(T)) return Invalid(what, "the file ends here (truncated?)");
    T x;
    std::memcpy(&x, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return x;
  }

  absl::Status Skip(uint64_t n, const std::string& what) {
    if (left() < n)
      return Invalid(what, absl::StrCat("needs ", n, " bytes, ", left(), " are left (truncated?)"));
    position_ += size_t(n);
    return absl::OkStatus();
  }

  absl::StatusOr<std::string_view> ReadString(const std::string& what) {
    ASSIGN_OR_RETURN(const uint64_t n, Read<uint64_t>(what));
    const size_t begin = position_;
    RETURN_IF_ERROR(Skip(n, what));
    return std::string_view(reinterpret_cast<const char*>(bytes_.data()) + begin, size_t(n));
  }

  absl::Span<const uint8_t> Since(size_t begin) const {
    return bytes_.subspan(begin, position_ - begin);
  }

 private:
  const absl::Span<const uint8_t> bytes_;
  const std::string& file_;
  size_t position_ = 0;
};

absl::StatusOr<GgufType> ReadType(Cursor* in, const std::string& key) {
  ASSIGN_OR_RETURN(const uint32_t code, in->Read<uint32_t>(key));
  if (code > uint32_t(GgufType::kFloat64)) {
    return in->Invalid(key, absl::StrCat("unknown value type ", code));
  }
  return GgufType(code);
}

// Walks an array's elements; `count` has been read. Each element takes at least one byte of the
// file, so the work is bounded by the file's size.
absl::Status SkipElements(Cursor* in, const std::string& key, GgufType type, uint64_t count,
                          int depth) {
  if (const size_t size = GgufTypeBytes(type); size != 0) {
    if (count > in->left() / size) {
      return in->Invalid(key, absl::StrCat("an array of ", count, " elements does not fit"));
    }
    return in->Skip(count * size, key);
  }
  // A string is at least its length, an array its type and its count.
  if (count > in->left() / (type == GgufType::kString ? 8 : 12)) {
    return in->Invalid(key, absl::StrCat("an array of ", count, " elements does not fit"));
  }
  for (uint64_t i = 0; i < count; ++i) {
    if (type == GgufType::kString) {
      RETURN_IF_ERROR(in->ReadString(key).status());
      continue;
    }
    if (depth >= kMaxArrayDepth) return in->Invalid(key, "arrays are nested too deeply");
    ASSIGN_OR_RETURN(const GgufType inner, ReadType(in, key));
    ASSIGN_OR_RETURN(const uint64_t inner_count, in->Read<uint64_t>(key));
    RETURN_IF_ERROR(SkipElements(in, key, inner, inner_count, depth + 1));
  }
  return absl::OkStatus();
}

absl::StatusOr<GgufValue> ReadValue(Cursor* in, const std::string& key) {
  GgufValue value;
  ASSIGN_OR_RETURN(value.type, ReadType(in, key));
  if (value.type == GgufType::kArray) {
    value.is_array = true;
    ASSIGN_OR_RETURN(value.type, ReadType(in, key));
    ASSIGN_OR_RETURN(value.count, in->Read<uint64_t>(key));
  }
  const size_t begin = in->position();
  if (value.is_array || value.type == GgufType::kString) {
    RETURN_IF_ERROR(SkipElements(in, key, value.type, value.count, 1));
  } else {
    RETURN_IF_ERROR(in->Skip(GgufTypeBytes(value.type), key));
  }
  value.bytes = in->Since(begin);
  return value;
}

absl::StatusOr<GgufTensor> ReadTensor(Cursor* in, const std::string& name) {
  GgufTensor tensor;
  ASSIGN_OR_RETURN(const uint32_t dims, in->Read<uint32_t>(name));
  if (dims < 1 || dims > kMaxDims) {
    return in->Invalid(name, absl::StrCat(dims, " dimensions, expected 1 to ", kMaxDims));
  }
  int64_t elements = 1;
  tensor.shape.resize(dims);
  for (uint32_t i = 0; i < dims; ++i) {
    ASSIGN_OR_RETURN(const int64_t dim, in->Read<int64_t>(name));
    if (dim <= 0 || __builtin_mul_overflow(elements, dim, &elements)) {
      return in->Invalid(name, absl::StrCat("dimension ", dim, " is not possible"));
    }
    tensor.shape[dims - 1 - i] = dim;
  }
  ASSIGN_OR_RETURN(tensor.type, in->Read<uint32_t>(name));
  ASSIGN_OR_RETURN(tensor.offset, in->Read<uint64_t>(name));
  return tensor;
}

absl::Status CheckPreamble(Cursor* in, const std::string& file) {
  ASSIGN_OR_RETURN(const uint32_t magic, in->Read<uint32_t>("magic"));
  if (magic != kMagic) return absl::InvalidArgumentError(absl::StrCat(file, ": not a GGUF file"));
  ASSIGN_OR_RETURN(const uint32_t version, in->Read<uint32_t>("version"));
  if (version == 2 || version == 3) return absl::OkStatus();
  if (__builtin_bswap32(version) <= 3) {
    return absl::UnimplementedError(
        absl::StrCat(file, ": a big-endian GGUF file; convert it to little endian"));
  }
  return absl::UnimplementedError(
      absl::StrCat(file, ": GGUF version ", version, " is not supported; versions 2 and 3 are"));
}

// A counter read from the file, refused when that many of the smallest records cannot follow.
absl::StatusOr<uint64_t> ReadCount(Cursor* in, const std::string& what, uint64_t record_bytes) {
  ASSIGN_OR_RETURN(const uint64_t count, in->Read<uint64_t>(what));
  if (count > in->left() / record_bytes) {
    return in->Invalid(what, absl::StrCat(count, " does not fit in the file"));
  }
  return count;
}

absl::StatusOr<uint64_t> Alignment(const GgufFile::Metadata& metadata, const Cursor& in) {
  const auto it = metadata.find("general.alignment");
  if (it == metadata.end()) return kDefaultAlignment;
  uint32_t alignment = 0;
  if (!it->second.is_array && it->second.type == GgufType::kUint32) {
    std::memcpy(&alignment, it->second.bytes.data(), sizeof(alignment));
  }
  if (!std::has_single_bit(alignment) || alignment > kMaxAlignment) {
    return in.Invalid("general.alignment",
                      absl::StrCat("must be a uint32 power of two up to ", kMaxAlignment));
  }
  return uint64_t{alignment};
}

}  // namespace

size_t GgufTypeBytes(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool:
      return 1;
    case GgufType::kUint16:
    case GgufType::kInt16:
      return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32:
      return 4;
    case GgufType::kUint64:
    case GgufType::kInt64:
    case GgufType::kFloat64:
      return 8;
    case GgufType::kString:
    case GgufType::kArray:
      return 0;
  }
  return 0;
}

absl::Status ParseGguf(absl::Span<const uint8_t> bytes, const std::string& name,
                       GgufFile::Metadata* metadata, GgufFile::Tensors* tensors,
                       absl::Span<const uint8_t>* data) {
  Cursor in(bytes, name);
  RETURN_IF_ERROR(CheckPreamble(&in, name));
  ASSIGN_OR_RETURN(const uint64_t tensor_count, ReadCount(&in, "tensor count", kMinTensorBytes));
  ASSIGN_OR_RETURN(const uint64_t pair_count, ReadCount(&in, "metadata count", kMinPairBytes));

  for (uint64_t i = 0; i < pair_count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view key, in.ReadString("metadata key"));
    if (key.empty() || key.size() > kMaxKey) return in.Invalid("metadata key", "bad length");
    ASSIGN_OR_RETURN(GgufValue value, ReadValue(&in, std::string(key)));
    if (!metadata->emplace(key, value).second) {
      return in.Invalid(std::string(key), "the key occurs twice");
    }
  }
  ASSIGN_OR_RETURN(const uint64_t alignment, Alignment(*metadata, in));

  for (uint64_t i = 0; i < tensor_count; ++i) {
    ASSIGN_OR_RETURN(const std::string_view view, in.ReadString("tensor name"));
    if (view.empty() || view.size() > kMaxKey) return in.Invalid("tensor name", "bad length");
    const std::string tensor_name(view);
    ASSIGN_OR_RETURN(GgufTensor tensor, ReadTensor(&in, tensor_name));
    if (tensor.offset % alignment != 0) {
      return in.Invalid(
          tensor_name, absl::StrCat("offset ", tensor.offset, " is not a multiple of ", alignment));
    }
    if (!tensors->emplace(tensor_name, std::move(tensor)).second) {
      return in.Invalid(tensor_name, "the tensor occurs twice");
    }
  }
  const uint64_t padding = (alignment - in.position() % alignment) % alignment;
  // A file of metadata alone (a vocabulary) may end without the padding.
  if (tensor_count != 0 || in.left() != 0) RETURN_IF_ERROR(in.Skip(padding, "tensor data"));
  *data = bytes.subspan(in.position());
  return absl::OkStatus();
}

}  // namespace entropyserve
