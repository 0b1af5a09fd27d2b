#include <cstdint>

#include "kernels/cpu/cpu_backend.h"

namespace entropyserve {

void CpuBackend::FillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed) {
  constexpr int64_t kStrip = 1 << 16;  // elements of one task
  workers_.pool.ParallelFor(CeilDiv(n, kStrip), [&](int64_t task, int) {
    const int64_t end = n < (task + 1) * kStrip ? n : (task + 1) * kStrip;
    for (int64_t i = task * kStrip; i < end; ++i) {
      const float value = RandomUniform(seed, uint64_t(i), range);
      if (dtype == DType::kF32) {
        static_cast<float*>(p)[i] = value;
      } else {
        static_cast<bf16_t*>(p)[i] = ToBF16(value);
      }
    }
  });
}

}  // namespace entropyserve
