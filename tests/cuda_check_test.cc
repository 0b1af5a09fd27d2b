// A CUDA error ends the process with its own exit status, whatever the handler does. Needs no GPU.
#include "kernels/cuda/cuda_check.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <thread>

namespace entropyserve::cuda {
namespace {

TEST(CudaCheckDeathTest, TellsTheHandlerAndExits) {
  EXPECT_EXIT(
      {
        SetCudaErrorHandler(
            [](const std::string& what) { std::fprintf(stderr, "handler: %s\n", what.c_str()); });
        CUDA_CHECK(cudaErrorIllegalAddress);
      },
      testing::ExitedWithCode(kCudaErrorExit),
      "handler: .*cuda_check_test.cc.*cudaErrorIllegalAddress");
}

TEST(CudaCheckDeathTest, ExitsWithoutAHandler) {
  EXPECT_EXIT(CUDA_CHECK(CUBLAS_STATUS_EXECUTION_FAILED), testing::ExitedWithCode(kCudaErrorExit),
              "CUBLAS_STATUS_EXECUTION_FAILED");
}

TEST(CudaCheckDeathTest, DoesNotWaitForAHandlerThatHangs) {
  EXPECT_EXIT(
      {
        SetCudaErrorHandler([](const std::string&) {
          for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        });
        CUDA_CHECK(cudaErrorLaunchFailure);
      },
      testing::ExitedWithCode(kCudaErrorExit), "cudaErrorLaunchFailure");
}

TEST(CudaCheck, LetsSuccessPass) {
  CUDA_CHECK(cudaSuccess);
  CUDA_CHECK(CUBLAS_STATUS_SUCCESS);
}

}  // namespace
}  // namespace entropyserve::cuda
