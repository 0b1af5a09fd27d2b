#include "kernels/cuda/cublaslt_library.h"

#include <dlfcn.h>

#include <initializer_list>

namespace entropyserve::cuda {
namespace {

// Null, with the loader's words for the first path in *error.
void* Open(const std::string& name, std::string* error) {
  for (const std::string& path : {name, ES_CUDA_LIBRARY_DIR "/" + name}) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    if (error->empty()) *error = dlerror();
  }
  return nullptr;
}

}  // namespace

#define ES_QUOTE(x) #x
#define ES_QUOTE_VALUE(x) ES_QUOTE(x)
const char* const kCublasLtName = "libcublasLt.so." ES_QUOTE_VALUE(CUBLAS_VER_MAJOR);
#undef ES_QUOTE_VALUE
#undef ES_QUOTE

std::unique_ptr<const CublasLt> LoadCublasLt(const std::string& name, std::string* error) {
  error->clear();
  void* const library = Open(name, error);
  if (!library) {
    *error = "cuBLAS " + std::to_string(CUBLAS_VER_MAJOR) + " is needed: " + *error +
             "; install it or name its folder in LD_LIBRARY_PATH";
    return nullptr;
  }
  auto lt = std::make_unique<CublasLt>();
  bool complete = true;
  auto find = [&]<typename F>(const char* name, F* function) {
    *function = reinterpret_cast<F>(dlsym(library, name));
    complete = complete && *function != nullptr;
  };
  find("cublasLtCreate", &lt->Create);
  find("cublasLtDestroy", &lt->Destroy);
  find("cublasLtMatmul", &lt->Matmul);
  find("cublasLtMatmulAlgoGetHeuristic", &lt->MatmulAlgoGetHeuristic);
  find("cublasLtMatmulDescCreate", &lt->MatmulDescCreate);
  find("cublasLtMatmulDescDestroy", &lt->MatmulDescDestroy);
  find("cublasLtMatmulDescSetAttribute", &lt->MatmulDescSetAttribute);
  find("cublasLtMatmulPreferenceCreate", &lt->MatmulPreferenceCreate);
  find("cublasLtMatmulPreferenceDestroy", &lt->MatmulPreferenceDestroy);
  find("cublasLtMatmulPreferenceSetAttribute", &lt->MatmulPreferenceSetAttribute);
  find("cublasLtMatrixLayoutCreate", &lt->MatrixLayoutCreate);
  find("cublasLtMatrixLayoutDestroy", &lt->MatrixLayoutDestroy);
  if (!complete) {
    *error = name + " lacks a function that this build uses";
    return nullptr;
  }
  return lt;
}

const char* CublasStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_MAPPING_ERROR:
      return "CUBLAS_STATUS_MAPPING_ERROR";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_LICENSE_ERROR:
      return "CUBLAS_STATUS_LICENSE_ERROR";
  }
  return "unknown cuBLAS status";
}

}  // namespace entropyserve::cuda
