// out (+)= x * w^T (+ bias): few rows by our own kernel, more through cuBLASLt, with one heuristic
// search per shape.
#pragma once

#include <cstddef>
#include <unordered_map>

#include "kernels/backend.h"
#include "kernels/cuda/cublaslt_library.h"

namespace entropyserve::cuda {

class LinearRunner {
 public:
  // `workspace` is device memory that only this runner uses.
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // cuBLAS' own choice for Hopper

  // lt outlives the runner. cublaslt_only: few rows too.
  LinearRunner(const CublasLt* lt, bool cublaslt_only);
  ~LinearRunner();
  LinearRunner(const LinearRunner&) = delete;
  LinearRunner& operator=(const LinearRunner&) = delete;

  // Whether cuBLASLt multiplies kE4M3 with a scale per row here (compute capability 9.0 does).
  bool SupportsE4M3() const;

  // bias16: scratch for the bias in bf16, [w.rows].
  void Run(const LinearParams& p, void* workspace, void* bias16, cudaStream_t stream);

 private:
  struct Key {
    int64_t rows, n, k;
    uint32_t flags;  // dtypes, bias, accumulate
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Plan {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
    cublasLtMatmulAlgo_t algo;
  };
  // Ragged batches bring ever new row counts; the cache starts over when it holds this many.
  static constexpr size_t kMaxPlans = 8192;

  // False: cuBLASLt has no kernel for it. The plan is to be destroyed either way.
  bool MakePlan(const LinearParams& p, Plan* plan) const;
  // What a plan holds of one call: bias and scales.
  void SetPointers(const LinearParams& p, const void* bias, Plan* plan) const;
  template <typename T>
  void Set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, T value) const;
  void Destroy(const Plan& plan) const;
  void Clear();

  const CublasLt& lt_;
  const bool cublaslt_only_;
  cublasLtHandle_t handle_ = nullptr;
  std::unordered_map<Key, Plan, KeyHash> plans_;
};

}  // namespace entropyserve::cuda
