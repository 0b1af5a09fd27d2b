// Makes small checkpoint files for the tests: sound ones, and ones that lie.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "absl/types/span.h"

namespace entropyserve {

inline absl::Span<const uint8_t> Bytes(const std::string& s) {
  return {reinterpret_cast<const uint8_t*>(s.data()), s.size()};
}

inline std::string GoldenPath(const std::string& name) {
  return std::string(ES_SOURCE_DIR) + "/tests/golden/weights/" + name;
}

inline std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

// A folder that goes away with the object.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "es_weights_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string Write(const std::string& name, const std::string& bytes) const {
    const std::string path = path_ + "/" + name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

 private:
  std::string path_;
};

template <typename T>
std::string Raw(T x) {
  return std::string(reinterpret_cast<const char*>(&x), sizeof(x));
}

inline std::string SafetensorsBytes(const std::string& header, size_t data_bytes) {
  return Raw(uint64_t{header.size()}) + header + std::string(data_bytes, '\0');
}

// Writes GGUF as told, truth or not: counts default to what was added.
class GgufBuilder {
 public:
  static std::string Str(std::string_view s) { return Raw(uint64_t{s.size()}) + std::string(s); }

  GgufBuilder& Pair(std::string_view key, uint32_t type, const std::string& value) {
    pairs_ += Str(key) + Raw(type) + value;
    ++pair_count_;
    return *this;
  }
  GgufBuilder& U32(std::string_view key, uint32_t x) { return Pair(key, 4, Raw(x)); }
  GgufBuilder& F32(std::string_view key, float x) { return Pair(key, 6, Raw(x)); }
  GgufBuilder& Text(std::string_view key, std::string_view x) { return Pair(key, 8, Str(x)); }
  GgufBuilder& Array(std::string_view key, uint32_t type, uint64_t count, const std::string& x) {
    return Pair(key, 9, Raw(type) + Raw(count) + x);
  }
  // `dims` in the file's order: columns first.
  GgufBuilder& Tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type,
                      uint64_t offset) {
    tensors_ += Str(name) + Raw(uint32_t(dims.size()));
    for (const uint64_t dim : dims) tensors_ += Raw(dim);
    tensors_ += Raw(type) + Raw(offset);
    ++tensor_count_;
    return *this;
  }
  // An F32 tensor of zeros after the ones before.
  GgufBuilder& Zeros(std::string_view name, const std::vector<uint64_t>& dims) {
    uint64_t size = 4;
    for (const uint64_t dim : dims) size *= dim;
    Tensor(name, dims, 0, data_bytes_);
    data_bytes_ += (size + 31) / 32 * 32;
    return *this;
  }
  GgufBuilder& Counts(uint64_t tensors, uint64_t pairs) {
    tensor_count_ = tensors;
    pair_count_ = pairs;
    return *this;
  }
  GgufBuilder& Version(uint32_t version) {
    version_ = version;
    return *this;
  }

  std::string Build() const {
    std::string out = "GGUF" + Raw(version_) + Raw(tensor_count_) + Raw(pair_count_);
    out += pairs_ + tensors_;
    out.resize((out.size() + 31) / 32 * 32, '\0');
    return out + std::string(size_t(data_bytes_), '\0');
  }

 private:
  uint32_t version_ = 3;
  uint64_t tensor_count_ = 0, pair_count_ = 0, data_bytes_ = 0;
  std::string pairs_, tensors_;
};

}  // namespace entropyserve
