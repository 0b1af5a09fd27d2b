#include "kernels/cpu/thread_pool.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>

#include "kernels/check.h"

// Debian's oneDNN is built on OpenMP. The setting belongs to the calling thread. Declared here
// because clang does not find gcc's omp.h.
extern "C" void omp_set_num_threads(int);

namespace entropyserve {
namespace {

// How often an idle worker looks for the next job before it sleeps: about 100 us. Between a decode
// step's operators there are microseconds, and waking a sleeper costs up to 50 us.
constexpr int kSpins = 3000;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void UseOneOpenMpThread() {
  thread_local const bool done = [] {
    omp_set_num_threads(1);
    return true;
  }();
  (void)done;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  Check(threads >= 1 && threads < 4096, "a thread pool has 1 to 4095 threads");
  workers_.reserve(size_t(threads) - 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { WorkerLoop(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t n, void* object, Call call) {
  if (n <= 0) return;
  UseOneOpenMpThread();
  if (n == 1 || workers_.empty()) {
    for (int64_t i = 0; i < n; ++i) call(object, i, 0);
    return;
  }
  object_ = object;
  call_ = call;
  n_ = n;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t job = (state_.load(std::memory_order_relaxed) / kJobUnit + 1) * kJobUnit;
  bool wake;
  {
    // Under the mutex, so that a worker about to sleep either sees the job or is counted.
    std::lock_guard lock(mutex_);
    state_.store(job | kOpen, std::memory_order_release);
    wake = sleepers_ > 0;
  }
  if (wake) wake_.notify_all();
  Drain(0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; (state_.load(std::memory_order_acquire) & kJoined) != 0; ++spins) {
    if (spins < kSpins) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::Drain(int thread) {
  for (;;) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= n_) return;
    call_(object_, i, thread);
  }
}

// Returns the state of an open job with a number above `done`, or 0 to stop.
uint64_t ThreadPool::WaitForJob(uint64_t done) {
  const auto is_new = [&](uint64_t state) { return (state & kOpen) && state / kJobUnit > done; };
  for (int spins = 0; spins < kSpins; ++spins) {
    const uint64_t state = state_.load(std::memory_order_acquire);
    if (is_new(state)) return state;
    Pause();
  }
  std::unique_lock lock(mutex_);
  ++sleepers_;
  uint64_t state = 0;
  wake_.wait(lock, [&] {
    state = state_.load(std::memory_order_acquire);
    return stopping_ || is_new(state);
  });
  --sleepers_;
  return is_new(state) ? state : 0;
}

void ThreadPool::WorkerLoop(int thread) {
  UseOneOpenMpThread();
  uint64_t done = 0;
  while (uint64_t state = WaitForJob(done)) {
    if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
    done = state / kJobUnit;
    Drain(thread);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

int UsableCores() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

}  // namespace entropyserve
