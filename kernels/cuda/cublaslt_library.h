// cuBLASLt, loaded at run time. Linked, it would take 94 kB of static TLS out of every thread's
// stack, and threads with small stacks (the metrics listener's) could not start; a library loaded
// later gets its thread-local storage from the heap. A server on the CPU does not need it at all.
#pragma once

#include <cublasLt.h>

#include <memory>
#include <string>

namespace entropyserve::cuda {

// The functions used, under their names without "cublasLt". The library stays loaded until the
// process ends.
struct CublasLt {
  decltype(&cublasLtCreate) Create = nullptr;
  decltype(&cublasLtDestroy) Destroy = nullptr;
  decltype(&cublasLtMatmul) Matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) MatmulDescCreate = nullptr;
  decltype(&cublasLtMatmulDescDestroy) MatmulDescDestroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) MatmulPreferenceCreate = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) MatmulPreferenceDestroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) MatrixLayoutCreate = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) MatrixLayoutDestroy = nullptr;
};

// libcublasLt.so of the headers' major version.
extern const char* const kCublasLtName;

// Looks where the loader looks (LD_LIBRARY_PATH, ldconfig), then where the toolkit of the build
// was. Null, with a reason in *error, when the library is not there or lacks a function.
std::unique_ptr<const CublasLt> LoadCublasLt(const std::string& name, std::string* error);

// "CUBLAS_STATUS_...", without the library.
const char* CublasStatusName(cublasStatus_t status);

}  // namespace entropyserve::cuda
