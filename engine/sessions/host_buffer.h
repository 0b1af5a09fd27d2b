// Memory outside the pool, counted: what idle sessions take there is in the engine's ledger.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

namespace entropyserve {

using ByteMeter = std::shared_ptr<std::atomic<int64_t>>;

// Written once, then shared: forks and the thread that writes files hold the same bytes.
class HostBuffer {
 public:
  // Null when there is not enough memory.
  static std::shared_ptr<HostBuffer> Create(int64_t bytes, ByteMeter meter) {
    std::unique_ptr<std::byte[]> data(new (std::nothrow) std::byte[size_t(bytes)]);
    if (!data) return nullptr;
    return std::shared_ptr<HostBuffer>(new HostBuffer(std::move(data), bytes, std::move(meter)));
  }
  ~HostBuffer() { *meter_ -= size_; }
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  HostBuffer(std::unique_ptr<std::byte[]> data, int64_t size, ByteMeter meter)
      : data_(std::move(data)), size_(size), meter_(std::move(meter)) {
    *meter_ += size_;
  }

  const std::unique_ptr<std::byte[]> data_;
  const int64_t size_;
  const ByteMeter meter_;  // any thread
};

}  // namespace entropyserve
