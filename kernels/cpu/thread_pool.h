// A pool of threads for data-parallel loops. We parallelise over rows, heads and tiles ourselves
// and call the maths library from single threads, so that how work is split never depends on it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace entropyserve {

// One thread at a time may call ParallelFor; it works along as thread 0. Calls must not nest.
class ThreadPool {
 public:
  // threads: in all, the caller's included; at least 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // Runs fn(i, thread) for every i in [0, n), thread in [0, threads()), and returns when all are
  // done. Items are handed out in ascending order to whoever is free (put the longest first); an
  // item's result must not depend on its thread.
  template <typename Fn>
  void ParallelFor(int64_t n, Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    Run(n, const_cast<void*>(static_cast<const void*>(&fn)),
        [](void* object, int64_t i, int thread) { (*static_cast<F*>(object))(i, thread); });
  }

 private:
  using Call = void (*)(void* object, int64_t i, int thread);

  void Run(int64_t n, void* object, Call call);
  void WorkerLoop(int thread);
  void Drain(int thread);
  uint64_t WaitForJob(uint64_t done);

  // A job is open while workers may join it. state_ = job number * kJobUnit + kOpen + joined
  // workers. The caller waits for those who joined, never for those still asleep.
  static constexpr uint64_t kOpen = uint64_t{1} << 31;
  static constexpr uint64_t kJobUnit = uint64_t{1} << 32;
  static constexpr uint64_t kJoined = kOpen - 1;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};

  // The job; written before state_ is published, read only by those who joined.
  alignas(64) void* object_ = nullptr;
  Call call_ = nullptr;
  int64_t n_ = 0;

  std::mutex mutex_;  // for sleeping only
  std::condition_variable wake_;
  int sleepers_ = 0;       // under mutex_
  bool stopping_ = false;  // under mutex_

  std::vector<std::thread> workers_;
};

// Cores this process may run on (its affinity mask), at least 1.
int UsableCores();

}  // namespace entropyserve
