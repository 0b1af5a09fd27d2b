#pragma once

#include <cstdint>
#include <utility>

#include "kernels/backend.h"

namespace entropyserve {

// A typed array in the backend's memory.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(Backend* backend, int64_t size)
      : backend_(backend),
        data_(static_cast<T*>(backend->Alloc(size * sizeof(T)))),
        size_(data_ ? size : 0) {}
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceArray() {
    if (data_) backend_->Free(data_);
  }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  bool ok() const { return data_ != nullptr; }

 private:
  Backend* backend_ = nullptr;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace entropyserve
