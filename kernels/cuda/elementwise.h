// Launchers of the memory-bound operators. One pass, 16-byte accesses where the shape allows.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace entropyserve::cuda {

void LaunchEmbed(const EmbedParams& p, cudaStream_t stream);
void LaunchRmsNorm(const RmsNormParams& p, cudaStream_t stream);
void LaunchSwiGlu(const SwiGluParams& p, cudaStream_t stream);
void LaunchGatherRows(const GatherRowsParams& p, cudaStream_t stream);
// With rows of kE4M3 and their scales as results (e4m3.cu).
void LaunchQuantize(const QuantizeParams& p, cudaStream_t stream);
void LaunchRmsNormE4M3(const RmsNormParams& p, cudaStream_t stream);
void LaunchSwiGluE4M3(const SwiGluParams& p, cudaStream_t stream);
// See Backend::FillRandom.
void LaunchFillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed,
                      cudaStream_t stream);
// out[i] = bf16(in[i]), n elements.
void LaunchToBf16(const float* in, void* out, int64_t n, cudaStream_t stream);

}  // namespace entropyserve::cuda
