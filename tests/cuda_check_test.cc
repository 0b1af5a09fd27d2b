// A CUDA error ends the process with its own exit status, whatever the handler does; cuBLASLt is
// loaded without taking the stacks of small threads. Needs no GPU.
#include "kernels/cuda/cuda_check.h"

#include <gtest/gtest.h>

#include <pthread.h>

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

TEST(CublasLtLibrary, LeavesSmallThreadsTheirStacks) {
  std::string error;
  const auto lt = LoadCublasLt(kCublasLtName, &error);
  ASSERT_NE(lt, nullptr) << error;
  pthread_attr_t small;
  ASSERT_EQ(pthread_attr_init(&small), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&small, 100 << 10), 0);  // the metrics listener's
  pthread_t thread;
  ASSERT_EQ(pthread_create(
                &thread, &small, [](void*) -> void* { return nullptr; }, nullptr),
            0);
  EXPECT_EQ(pthread_join(thread, nullptr), 0);
  EXPECT_EQ(pthread_attr_destroy(&small), 0);
}

TEST(CublasLtLibrary, SaysWhatIsMissing) {
  std::string error;
  EXPECT_EQ(LoadCublasLt("libcublasLt.so.none", &error), nullptr);
  EXPECT_NE(error.find("libcublasLt.so.none"), std::string::npos) << error;
  EXPECT_NE(error.find("LD_LIBRARY_PATH"), std::string::npos) << error;
  EXPECT_EQ(LoadCublasLt("libc.so.6", &error), nullptr);
  EXPECT_NE(error.find("lacks a function"), std::string::npos) << error;
}

}  // namespace
}  // namespace entropyserve::cuda
