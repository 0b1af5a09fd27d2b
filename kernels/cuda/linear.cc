#include "kernels/cuda/linear.h"

#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/elementwise.h"

namespace entropyserve::cuda {
namespace {

cudaDataType_t CudaType(DType dtype) { return dtype == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

}  // namespace

size_t LinearRunner::KeyHash::operator()(const Key& key) const {
  uint64_t h = uint64_t(key.rows) * 0x9e3779b97f4a7c15ull;
  for (uint64_t part : {uint64_t(key.n), uint64_t(key.k), uint64_t(key.flags)}) {
    h = (h ^ (h >> 29) ^ part) * 0xbf58476d1ce4e5b9ull;
  }
  return size_t(h ^ (h >> 32));
}

LinearRunner::LinearRunner(const CublasLt* lt) : lt_(*lt) { CUDA_CHECK(lt_.Create(&handle_)); }

LinearRunner::~LinearRunner() {
  Clear();
  CUDA_CHECK(lt_.Destroy(handle_));
}

template <typename T>
void LinearRunner::Set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                       T value) const {
  CUDA_CHECK(lt_.MatmulDescSetAttribute(desc, attribute, &value, sizeof(value)));
}

void LinearRunner::Destroy(Plan& plan) {
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
LinearRunner::Plan LinearRunner::MakePlan(const LinearParams& p) const {
  const cudaDataType_t in = CudaType(p.w.dtype), out = CudaType(p.out_dtype);
  Plan plan;
  CUDA_CHECK(lt_.MatmulDescCreate(&plan.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  Set(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (p.bias) Set(plan.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  CUDA_CHECK(lt_.MatrixLayoutCreate(&plan.a, in, p.w.cols, p.w.rows, p.w.cols));
  CUDA_CHECK(lt_.MatrixLayoutCreate(&plan.b, in, p.w.cols, p.rows, p.w.cols));
  CUDA_CHECK(lt_.MatrixLayoutCreate(&plan.c, out, p.w.rows, p.rows, p.w.rows));

  cublasLtMatmulPreference_t preference;
  CUDA_CHECK(lt_.MatmulPreferenceCreate(&preference));
  CUDA_CHECK(lt_.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                              &kWorkspaceBytes, sizeof(kWorkspaceBytes)));
  cublasLtMatmulHeuristicResult_t result;
  int found = 0;
  CUDA_CHECK(lt_.MatmulAlgoGetHeuristic(handle_, plan.desc, plan.a, plan.b, plan.c, plan.c,
                                        preference, 1, &result, &found));
  CUDA_CHECK(lt_.MatmulPreferenceDestroy(preference));
  Check(found == 1, "cuBLASLt has no kernel for this linear");
  plan.algo = result.algo;
  return plan;
}

void LinearRunner::Run(const LinearParams& p, void* workspace, void* bias16, cudaStream_t stream) {
  if (p.rows == 0) return;
  Check(!p.accumulate || p.out_dtype == DType::kF32, "Linear accumulates into f32 only");
  const Key key{p.rows, p.w.rows, p.w.cols,
                uint32_t(p.w.dtype) | uint32_t(p.out_dtype) << 2 |
                    uint32_t(p.bias != nullptr) << 4 | uint32_t(p.accumulate) << 5};
  auto it = plans_.find(key);
  if (it == plans_.end()) {
    if (plans_.size() >= kMaxPlans) Clear();
    it = plans_.emplace(key, MakePlan(p)).first;
  }
  Plan& plan = it->second;
  if (p.bias) {  // cuBLASLt wants the bias in the output's type
    const void* bias = p.bias;
    if (p.out_dtype == DType::kBF16) {
      LaunchToBf16(p.bias, bias16, p.w.rows, stream);
      bias = bias16;
    }
    Set(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  const float alpha = 1.0f, beta = p.accumulate ? 1.0f : 0.0f;
  CUDA_CHECK(lt_.Matmul(handle_, plan.desc, &alpha, p.w.data, plan.a, p.x, plan.b, &beta, p.out,
                        plan.c, p.out, plan.c, &plan.algo, workspace, kWorkspaceBytes, stream));
}

}  // namespace entropyserve::cuda
