#include "tests/drills/load.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <thread>

namespace entropyserve {

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, size_t(q * double(values.size())))];
}

v1::GenerateRequest LoadRequest(int prompt_bytes, int max_new) {
  v1::GenerateRequest r;
  r.set_text(std::string(size_t(prompt_bytes), 'a'));
  r.mutable_sampling()->set_temperature(0);
  r.mutable_sampling()->set_max_new_tokens(max_new);
  r.mutable_sampling()->set_ignore_eos(true);
  return r;
}

std::vector<std::unique_ptr<Call>> ClosedLoop(ServerProcess* server, int callers,
                                              const v1::GenerateRequest& request, double seconds) {
  const auto begin = Clock::now();
  std::mutex mutex;
  std::vector<std::unique_ptr<Call>> all;
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) {
    threads.emplace_back([&] {
      bool up = true;
      while (up && SecondsSince(begin) < seconds) {
        ServerProcess::Stub* stub;
        {
          std::lock_guard lock(mutex);
          stub = &server->stub();
        }
        auto call = std::make_unique<Call>(stub, request);
        call->Wait();
        up = call->status().error_code() != grpc::StatusCode::UNAVAILABLE;
        std::lock_guard lock(mutex);
        all.push_back(std::move(call));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return all;
}

}  // namespace entropyserve
