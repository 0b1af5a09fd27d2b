// Timing of a backend's operators: buffers, the median of many calls, lines of a table.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/check.h"

namespace entropyserve {

// Of the card, measured in the same run.
struct Ceilings {
  double copy = 0;     // bytes/s, read and written
  double product = 0;  // FLOP/s
};

class KernelTimer {
 public:
  explicit KernelTimer(Backend& backend) : backend_(backend) {}

  Backend& backend() { return backend_; }
  Ceilings ceilings;

  // Buffers of one measurement.
  class Buffers {
   public:
    explicit Buffers(Backend& backend) : backend_(backend) {}
    ~Buffers() {
      for (void* p : taken_) backend_.Free(p);
    }
    void* Random(int64_t n, DType dtype, float range = 1) {
      void* p = Take(size_t(n) * SizeOf(dtype));
      backend_.FillRandom(p, dtype, n, range, ++seed_);
      return p;
    }
    template <typename T>
    T* Put(const std::vector<T>& x) {
      T* p = static_cast<T*>(Take(x.size() * sizeof(T)));
      backend_.CopyIn(p, x.data(), x.size() * sizeof(T));
      return p;
    }
    Matrix Quantized(int64_t rows, int64_t cols) {
      Matrix m{Take(size_t(rows * cols)), DType::kE4M3, rows, cols, nullptr};
      float* const scales = static_cast<float*>(Take(size_t(rows) * sizeof(float)));
      m.scales = scales;
      void* const wide = Random(rows * cols, DType::kBF16);
      backend_.Quantize({wide, DType::kBF16, static_cast<e4m3_t*>(m.data), scales, rows, cols});
      return m;
    }
    void* Take(size_t bytes) {
      void* p = backend_.Alloc(bytes);
      Check(p != nullptr, "not enough device memory for the bench");
      taken_.push_back(p);
      return p;
    }

   private:
    Backend& backend_;
    uint64_t seed_ = 0;
    std::vector<void*> taken_;
  };

  // Seconds of one call: the median of rounds of about 20 ms each.
  template <typename Call>
  double Time(Call call) {
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto seconds = [](auto d) { return std::chrono::duration<double>(d).count(); };
    const auto round = [&](int calls) {
      const auto begin = now();
      for (int i = 0; i < calls; ++i) call(i);
      backend_.Synchronize();
      return seconds(now() - begin) / calls;
    };
    round(2);
    const int calls = std::clamp(int(0.02 / round(3)), 3, 500);
    std::vector<double> times;
    for (int i = 0; i < 7; ++i) times.push_back(round(calls));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  void Print(const std::string& name, double seconds, double bytes, double flops) const {
    std::printf("%-34s %9.1f us", name.c_str(), seconds * 1e6);
    if (bytes > 0) {
      std::printf("  %6.0f GB/s %3.0f %%", bytes / seconds * 1e-9,
                  100 * bytes / seconds / ceilings.copy);
    }
    if (flops > 0) {
      std::printf("  %6.1f TFLOP/s %3.0f %%", flops / seconds * 1e-12,
                  100 * flops / seconds / ceilings.product);
    }
    std::printf("\n");
  }

 private:
  Backend& backend_;
};

}  // namespace entropyserve
