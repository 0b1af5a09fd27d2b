// CUDA graphs of steps that repeat: about ten launches a layer become one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>

namespace entropyserve::cuda {

class StepGraphs {
 public:
  StepGraphs() = default;
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // See Backend::Replay. A key's first step runs as it is (what is set up at first use happens
  // then), the second is recorded, later ones replay the record.
  void Run(uint64_t key, const std::function<void()>& step, cudaStream_t stream);

 private:
  // Batch sizes up to this many, each with few sets of buffers. Beyond it, everything starts over.
  static constexpr size_t kMaxGraphs = 256;

  void Clear();

  std::unordered_map<uint64_t, cudaGraphExec_t> graphs_;  // null: seen once
};

}  // namespace entropyserve::cuda
