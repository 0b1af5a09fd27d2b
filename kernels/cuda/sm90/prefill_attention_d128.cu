#include "kernels/cuda/sm90/prefill_attention.cuh"

namespace entropyserve::sm90 {

template cudaError_t LaunchAttentionKernel<128, false>(const AttentionKernelParams&, int,
                                                       cudaStream_t);
template cudaError_t LaunchAttentionKernel<128, true>(const AttentionKernelParams&, int,
                                                      cudaStream_t);

}  // namespace entropyserve::sm90
