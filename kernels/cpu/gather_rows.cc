#include <cstring>

#include "kernels/cpu/ops.h"

namespace entropyserve::cpu {

void GatherRows(ThreadPool& pool, const GatherRowsParams& p) {
  constexpr int64_t kRowsPerTask = 64;
  pool.ParallelFor(CeilDiv(p.rows, kRowsPerTask), [&](int64_t task, int) {
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      std::memcpy(static_cast<std::byte*>(p.out) + row * p.row_bytes,
                  static_cast<const std::byte*>(p.x) + p.row_index[row] * p.row_bytes,
                  size_t(p.row_bytes));
    }
  });
}

}  // namespace entropyserve::cpu
