#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/vec.cuh"

namespace entropyserve::cuda {
namespace {

template <typename T>
__global__ void FillRandomKernel(T* p, int64_t n, float range, uint64_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride) {
    p[i] = FromFloat<T>(RandomUniform(seed, uint64_t(i), range));
  }
}

}  // namespace

void LaunchFillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed,
                      cudaStream_t stream) {
  constexpr int kThreads = 256, kBlocks = 4096;
  if (dtype == DType::kF32) {
    FillRandomKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<float*>(p), n, range, seed);
  } else {
    FillRandomKernel<<<kBlocks, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(p), n, range,
                                                       seed);
  }
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace entropyserve::cuda
