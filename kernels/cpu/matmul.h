// Single-threaded strided matrix products, f32 or bf16 inputs, sums in f32, by oneDNN.
//
// Why oneDNN and not OpenBLAS: bf16 (Debian's OpenBLAS 0.3.21 has none on x86) and, in f32, the
// better rate on the narrow products of attention. GFLOP/s on one core of a Sapphire Rapids class
// Xeon (AVX-512, AMX), oneDNN 2.6.3 and OpenBLAS 0.3.21:
//   m x n x k                      oneDNN f32   OpenBLAS f32   oneDNN bf16
//    512 x  960 x  576  A*B^T          163            155           723    q, k, v of SmolLM2-135M
//    512 x 3072 x  576  A*B^T          159            151           805    gate and up
//    512 x  576 x 1536  A*B^T          160            150           710    down
//     96 x  512 x   64  A*B^T          168            113           508    scores
//    384 x  512 x   64  A*B^T          170            133           356
//    384 x   64 x  512  A*B            171            135          1483    probabilities x values
//   1536 x   64 x  512  A*B            167            128           871
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/tensor.h"

namespace entropyserve {

// C = A * B, or C += A * B. A is [m, k] row-major; B is [k, n] row-major, or [n, k] when
// b_transposed.
struct MatmulShape {
  int64_t m = 0, n = 0, k = 0;
  int64_t lda = 0, ldb = 0, ldc = 0;  // elements from one row to the next
  DType in = DType::kF32;             // of A and B
  DType out = DType::kF32;            // of C
  bool b_transposed = false;
  bool accumulate = false;  // C +=; out must be kF32
  bool bias = false;        // C = A * B + bias (f32 [n]); not with accumulate

  bool operator==(const MatmulShape&) const = default;
};

// Compiled products, at most kMaxCached shapes of them (about 0.15 MB each); the least recently
// used is dropped, and oneDNN's own cache, which belongs to the process, is bounded alike. Belongs
// to one thread at a time: give each thread of a pool its own (oneDNN shares the generated code).
class Matmul {
 public:
  static constexpr int kMaxCached = 128;

  Matmul();
  ~Matmul();
  Matmul(Matmul&&) noexcept;
  Matmul& operator=(Matmul&&) noexcept;

  // Pointers need the alignment of their element only. Compiling a new shape takes about a
  // millisecond. No size may be 0.
  void Run(const MatmulShape& shape, const void* a, const void* b, void* c,
           const float* bias = nullptr);

 private:
  struct Impl;

  // bf16 by way of f32 copies, where oneDNN has no bf16. Slow; `--dtype=auto` does not come here.
  void RunWidened(const MatmulShape& shape, const void* a, const void* b, void* c,
                  const float* bias);

  std::unique_ptr<Impl> impl_;
};

}  // namespace entropyserve
