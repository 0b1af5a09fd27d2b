#include "kernels/cuda/step_graphs.h"

#include "kernels/cuda/cuda_check.h"

namespace entropyserve::cuda {

StepGraphs::~StepGraphs() { Clear(); }

void StepGraphs::Clear() {
  for (auto& [key, graph] : graphs_) {
    if (graph) CUDA_CHECK(cudaGraphExecDestroy(graph));
  }
  graphs_.clear();
}

void StepGraphs::Run(uint64_t key, const std::function<void()>& step, cudaStream_t stream) {
  auto it = graphs_.find(key);
  if (it == graphs_.end()) {
    if (graphs_.size() >= kMaxGraphs) {
      CUDA_CHECK(cudaStreamSynchronize(stream));  // none of them runs any more
      Clear();
    }
    graphs_.emplace(key, nullptr);
    step();
    return;
  }
  if (!it->second) {
    cudaGraph_t graph = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    step();
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&it->second, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
  CUDA_CHECK(cudaGraphLaunch(it->second, stream));
}

}  // namespace entropyserve::cuda
