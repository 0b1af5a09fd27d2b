#include "kernels/cuda/cuda_check.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <utility>

namespace entropyserve::cuda {
namespace {

struct ErrorHandler {
  std::mutex mutex;
  std::function<void(const std::string&)> call;
};

ErrorHandler& Handler() {
  static ErrorHandler* handler = new ErrorHandler;  // never destroyed: a failure may come at exit
  return *handler;
}

}  // namespace

void SetCudaErrorHandler(std::function<void(const std::string&)> handler) {
  std::lock_guard<std::mutex> lock(Handler().mutex);
  Handler().call = std::move(handler);
}

void CudaFailed(const char* what, const char* error, const char* file, int line) {
  static std::atomic<bool> failed{false};
  if (failed.exchange(true)) {  // another thread is already ending the process
    for (;;) std::this_thread::sleep_for(std::chrono::seconds(1));
  }
  std::thread([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(1900));
    std::_Exit(kCudaErrorExit);
  }).detach();
  const std::string message =
      std::string(file) + ":" + std::to_string(line) + ": " + what + ": " + error;
  std::fprintf(stderr, "CUDA error, ending the process: %s\n", message.c_str());
  std::function<void(const std::string&)> handler;
  {
    std::lock_guard<std::mutex> lock(Handler().mutex);
    handler = Handler().call;
  }
  if (handler) handler(message);
  std::_Exit(kCudaErrorExit);
}

}  // namespace entropyserve::cuda
