// Linears of the Llama-3.1-8B shape, and the card's ceilings.
#pragma once

#include <cstdint>

#include "tests/bench/kernel_timer.h"

namespace entropyserve {

inline constexpr int64_t kHidden = 4096, kFfn = 14336, kVocab = 128256;
inline constexpr int32_t kChunk = 8192;  // tokens of a prefill step

struct LinearShape;

class LinearBench {
 public:
  explicit LinearBench(KernelTimer& timer) : timer_(timer) {}

  // A large copy, and a large bf16 product through our own linear: for the timer.
  void MeasureCeilings();
  // Decode's and prefill's row counts.
  void Run(DType in);
  // Ours beside cuBLASLt's: `cublaslt` is a bench of a backend that has no others.
  void FewRows(LinearBench& cublaslt);

 private:
  double Time(int64_t rows, const LinearShape& l, DType in);
  double TimeInGraph(int64_t rows, const LinearShape& l, DType in);

  KernelTimer& timer_;
  uint64_t graphs_ = 0;  // recorded so far
};

}  // namespace entropyserve
