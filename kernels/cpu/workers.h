// What the operators share: the thread pool and, per thread, compiled matrix products and scratch.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/check.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/thread_pool.h"

namespace entropyserve::cpu {

// A 64-byte aligned buffer that grows and keeps nothing over a Get.
class Scratch {
 public:
  void* Get(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = (bytes + 4095) / 4096 * 4096;
      data_.reset(std::aligned_alloc(64, size_));
      Check(data_ != nullptr, "out of memory for scratch; Reserve() takes it at start");
    }
    return data_.get();
  }
  size_t size() const { return size_; }

 private:
  struct Release {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Release> data_;
  size_t size_ = 0;
};

struct Workers {
  explicit Workers(int threads, const CpuFeatures& features = DetectCpuFeatures())
      : features(features), pool(threads), threads(size_t(threads)) {}

  struct PerThread {
    Matmul matmul;
    Scratch scratch;
  };
  const CpuFeatures features;  // what operators may use
  ThreadPool pool;
  std::vector<PerThread> threads;
  Scratch shared;  // of an operator as a whole
};

// Hands out aligned pieces of one buffer. With a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<std::byte*>(base)) {}
  template <typename T>
  T* Take(size_t n) {
    std::byte* piece = base_ ? base_ + used_ : nullptr;
    used_ += (n * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

}  // namespace entropyserve::cpu
