// A file mapped read-only into memory. Checkpoints are larger than what we want to hold twice, so
// nothing reads them whole: readers take bounds-checked views.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace entropyserve {

// Thread-compatible. The file must not be truncated while it is mapped: the kernel answers a read
// past its new end with SIGBUS, which no check here can prevent.
class MappedFile {
 public:
  // NOT_FOUND: no such file. INVALID_ARGUMENT: not a regular file, or empty. PERMISSION_DENIED,
  // INTERNAL: what the system said.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  absl::Span<const uint8_t> bytes() const { return {data_, size_}; }

  // Tells the kernel that [data, data + size) of this mapping is not needed soon: whole pages
  // inside leave the process's resident set (they stay in the page cache, and a later read finds
  // them again). Without it a loaded model would count twice in the peak memory.
  void Release(const uint8_t* data, size_t size) const;

 private:
  MappedFile(std::string path, const uint8_t* data, size_t size)
      : path_(std::move(path)), data_(data), size_(size) {}

  const std::string path_;
  const uint8_t* const data_;
  const size_t size_;
};

}  // namespace entropyserve
