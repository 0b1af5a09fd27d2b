#include "kernels/cuda/linear.h"

#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/linear_few_rows.h"

namespace entropyserve::cuda {
namespace {

cudaDataType_t CudaType(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return CUDA_R_32F;
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kE4M3:
      return CUDA_R_8F_E4M3;
  }
  return CUDA_R_32F;
}

// cuBLASLt wants the bias in the output's type, beside 8-bit floats always in bf16.
DType BiasType(const LinearParams& p) {
  return p.w.dtype == DType::kE4M3 ? DType::kBF16 : p.out_dtype;
}

}  // namespace

size_t LinearRunner::KeyHash::operator()(const Key& key) const {
  uint64_t h = uint64_t(key.rows) * 0x9e3779b97f4a7c15ull;
  for (uint64_t part : {uint64_t(key.n), uint64_t(key.k), uint64_t(key.flags)}) {
    h = (h ^ (h >> 29) ^ part) * 0xbf58476d1ce4e5b9ull;
  }
  return size_t(h ^ (h >> 32));
}

LinearRunner::LinearRunner(const CublasLt* lt, bool cublaslt_only)
    : lt_(*lt), cublaslt_only_(cublaslt_only) {
  CUDA_CHECK(lt_.Create(&handle_));
}

LinearRunner::~LinearRunner() {
  Clear();
  CUDA_CHECK(lt_.Destroy(handle_));
}

template <typename T>
void LinearRunner::Set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                       T value) const {
  CUDA_CHECK(lt_.MatmulDescSetAttribute(desc, attribute, &value, sizeof(value)));
}

void LinearRunner::Destroy(const Plan& plan) const {
  CUDA_CHECK(lt_.MatmulDescDestroy(plan.desc));
  for (cublasLtMatrixLayout_t layout : {plan.a, plan.b, plan.c}) {
    CUDA_CHECK(lt_.MatrixLayoutDestroy(layout));
  }
}

void LinearRunner::Clear() {
  for (auto& [key, plan] : plans_) Destroy(plan);
  plans_.clear();
}

// cuBLAS is column-major: out^T [w.rows, rows] = w (stored [cols, w.rows] there, transposed) * x^T.
// Of 8-bit floats, output (i, j) is multiplied by w's i-th and x's j-th scale. Their sums keep
// fewer bits ("fast accumulation": errors of about 2^-13, against 2^-4 of the 8 bits themselves).
bool LinearRunner::MakePlan(const LinearParams& p, Plan* plan) const {
  const cudaDataType_t in = CudaType(p.w.dtype), out = CudaType(p.out_dtype);
  CUDA_CHECK(lt_.MatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  Set(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (p.w.dtype == DType::kE4M3) {
    Set(plan->desc, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
    Set(plan->desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
    Set(plan->desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
    SetPointers(p, p.bias, plan);
  }
  if (p.bias) {
    Set(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    if (BiasType(p) != p.out_dtype) {
      Set(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CudaType(BiasType(p)));
    }
  }
  CUDA_CHECK(lt_.MatrixLayoutCreate(&plan->a, in, p.w.cols, p.w.rows, p.w.cols));
  CUDA_CHECK(lt_.MatrixLayoutCreate(&plan->b, in, p.w.cols, p.rows, p.w.cols));
  CUDA_CHECK(lt_.MatrixLayoutCreate(&plan->c, out, p.w.rows, p.rows, p.w.rows));

  cublasLtMatmulPreference_t preference;
  CUDA_CHECK(lt_.MatmulPreferenceCreate(&preference));
  CUDA_CHECK(lt_.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &kWorkspaceBytes, sizeof(kWorkspaceBytes)));
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  const cublasStatus_t status = lt_.MatmulAlgoGetHeuristic(
      handle_, plan->desc, plan->a, plan->b, plan->c, plan->c, preference, 1, &result, &found);
  CUDA_CHECK(lt_.MatmulPreferenceDestroy(preference));
  // Types that no kernel of this device has are one or the other.
  if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE) {
    CUDA_CHECK(status);
  }
  plan->algo = result.algo;
  return status == CUBLAS_STATUS_SUCCESS && found == 1;
}

void LinearRunner::SetPointers(const LinearParams& p, const void* bias, Plan* plan) const {
  if (p.bias) Set(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  if (p.w.dtype != DType::kE4M3) return;
  Set(plan->desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(p.w.scales));
  Set(plan->desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(p.x_scales));
}

bool LinearRunner::SupportsE4M3() const {
  // Nothing is read or written: the search for a kernel looks at shapes and types.
  alignas(16) static constexpr float kScales[128] = {};
  LinearParams p;
  p.w = {nullptr, DType::kE4M3, 128, 128, kScales};
  p.x_scales = kScales;
  p.rows = 16;
  bool supported = true;
  for (const DType out : {DType::kBF16, DType::kF32}) {
    p.out_dtype = out;
    p.accumulate = out == DType::kF32;
    Plan plan;
    supported = MakePlan(p, &plan) && supported;
    Destroy(plan);
  }
  return supported;
}

void LinearRunner::Run(const LinearParams& p, void* workspace, void* bias16, cudaStream_t stream) {
  if (p.rows == 0) return;
  Check(!p.accumulate || p.out_dtype == DType::kF32, "Linear accumulates into f32 only");
  if (!cublaslt_only_ && IsFewRowsLinear(p)) return LaunchLinearFewRows(p, stream);
  const Key key{p.rows, p.w.rows, p.w.cols,
                uint32_t(p.w.dtype) | uint32_t(p.out_dtype) << 2 |
                    uint32_t(p.bias != nullptr) << 4 | uint32_t(p.accumulate) << 5};
  auto it = plans_.find(key);
  if (it == plans_.end()) {
    if (plans_.size() >= kMaxPlans) Clear();
    Plan made;
    Check(MakePlan(p, &made), "cuBLASLt has no kernel for this linear");
    it = plans_.emplace(key, made).first;
  }
  Plan& plan = it->second;
  const void* bias = p.bias;
  if (p.bias && BiasType(p) == DType::kBF16) {
    LaunchToBf16(p.bias, bias16, p.w.rows, stream);
    bias = bias16;
  }
  SetPointers(p, bias, &plan);
  const float alpha = 1.0f, beta = p.accumulate ? 1.0f : 0.0f;
  CUDA_CHECK(lt_.Matmul(handle_, plan.desc, &alpha, p.w.data, plan.a, p.x, plan.b, &beta, p.out,
                        plan.c, p.out, plan.c, &plan.algo, workspace, kWorkspaceBytes, stream));
}

}  // namespace entropyserve::cuda
