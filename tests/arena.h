// Test data in a backend's memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "kernels/backend.h"
#include "kernels/check.h"

namespace entropyserve {

// Floats as they lie in memory.
inline std::vector<std::byte> Pack(const std::vector<float>& x, DType dtype) {
  std::vector<std::byte> bytes(x.size() * SizeOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(bytes.data(), x.data(), bytes.size());
  } else {
    for (size_t i = 0; i < x.size(); ++i) {
      const bf16_t b = ToBF16(x[i]);
      std::memcpy(bytes.data() + 2 * i, &b, 2);
    }
  }
  return bytes;
}
inline std::vector<float> Unpack(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> x(bytes.size() / SizeOf(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(x.data(), bytes.data(), bytes.size());
  } else {
    for (size_t i = 0; i < x.size(); ++i) {
      bf16_t b;
      std::memcpy(&b, bytes.data() + 2 * i, 2);
      x[i] = FromBF16(b);
    }
  }
  return x;
}

// Memory of one backend, freed with it.
class Arena {
 public:
  explicit Arena(Backend& backend) : backend(backend) {}
  ~Arena() {
    for (void* p : taken_) backend.Free(p);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* Bytes(size_t n) {
    void* p = backend.Alloc(std::max<size_t>(n, 1));
    Check(p != nullptr, "the test fits into memory");
    taken_.push_back(p);
    return p;
  }
  template <typename T>
  T* Put(const T* x, size_t n) {
    T* p = static_cast<T*>(Bytes(n * sizeof(T)));
    if (n > 0) backend.CopyIn(p, x, n * sizeof(T));
    return p;
  }
  template <typename T>
  T* Put(const std::vector<T>& x) {
    return Put(x.data(), x.size());
  }
  void* PutFloats(const std::vector<float>& x, DType dtype) { return Put(Pack(x, dtype)); }
  // Poisoned: an element that nothing wrote reads as a NaN.
  void* Poisoned(int64_t n, DType dtype) {
    return PutFloats(std::vector<float>(size_t(n), std::nanf("")), dtype);
  }
  template <typename T>
  std::vector<T> Get(const T* p, size_t n) {
    std::vector<T> x(n);
    if (n > 0) backend.CopyOut(x.data(), p, n * sizeof(T));
    return x;
  }
  std::vector<float> GetFloats(const void* p, int64_t n, DType dtype) {
    return Unpack(Get(static_cast<const std::byte*>(p), size_t(n) * SizeOf(dtype)), dtype);
  }

  Backend& backend;

 private:
  std::vector<void*> taken_;
};

}  // namespace entropyserve
