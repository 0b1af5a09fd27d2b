#include "kernels/cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <array>

#include "kernels/policy_params.h"

namespace entropyserve::sm90 {
namespace {

constexpr uint64_t kElementBytes = 2;
constexpr uint64_t kSpan = 64;  // elements under one 128-byte swizzle
constexpr uint64_t kGroupTokens = 8;
constexpr size_t kMaxRank = 5;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time so that nothing links against libcuda.
EncodeTiled FindEncoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kCudaVersion = 12000;
  const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                         kCudaVersion, cudaEnableDefault, &found);
  return e == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<EncodeTiled>(function)
             : nullptr;
}

}  // namespace

bool EncodeMap(CUtensorMap* map, const void* base, std::span<const uint64_t> dims,
               std::span<const uint64_t> strides_bytes, std::span<const uint32_t> box) {
  static const EncodeTiled encode = FindEncoder();
  if (encode == nullptr || dims.size() > kMaxRank || strides_bytes.size() + 1 != dims.size() ||
      box.size() != dims.size())
    return false;
  std::array<cuuint64_t, kMaxRank> sizes = {}, strides = {};
  std::array<cuuint32_t, kMaxRank> boxes = {}, steps = {};
  for (size_t i = 0; i < dims.size(); ++i) {
    sizes[i] = dims[i];
    boxes[i] = box[i];
    steps[i] = 1;
    if (i > 0) strides[i - 1] = strides_bytes[i - 1];
  }
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(dims.size()),
                const_cast<void*>(base), sizes.data(), strides.data(), boxes.data(), steps.data(),
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool EncodePages(CUtensorMap* map, const void* pool, int32_t head_dim, int64_t pages,
                 int32_t box_groups) {
  const uint64_t row = uint64_t(head_dim) * kElementBytes, spans = uint64_t(head_dim) / kSpan;
  const uint64_t groups = uint64_t(pages) * (kPageTokens / kGroupTokens);
  return EncodeMap(
      map, pool, {{kSpan, kGroupTokens, spans, groups}},
      {{row, kSpan * kElementBytes, row * kGroupTokens}},
      {{uint32_t(kSpan), uint32_t(kGroupTokens), uint32_t(spans), uint32_t(box_groups)}});
}

}  // namespace entropyserve::sm90
