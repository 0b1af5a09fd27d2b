// Five times as many calls as the server can answer. What it cannot take it refuses with RetryInfo,
// what it takes it answers, and at the end nothing of all that is left in it.
#include <time.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/drills/call.h"
#include "tests/drills/drills.h"
#include "tests/drills/load.h"

namespace entropyserve {
namespace {

constexpr int kRunning = 4, kQueued = 8, kTimes = 5;

// CPU time of server and drill. Both run on this machine, perhaps beside others: what they take
// from the server is no fault of the server's.
class BusyCores {
 public:
  explicit BusyCores(const ServerProcess& server) : server_(server) {}
  // The server's.
  double Report(const std::string& when, Drill* drill) const {
    const double seconds = SecondsSince(begin_);
    const double cores = (server_.CpuSeconds() - server_begin_) / seconds;
    drill->Report("cores busy with the server, " + when, cores, "");
    drill->Report("cores busy with this program, " + when, (OwnSeconds() - own_begin_) / seconds,
                  "");
    return cores;
  }

 private:
  static double OwnSeconds() {
    timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  const ServerProcess& server_;
  const Clock::time_point begin_ = Clock::now();
  const double server_begin_ = server_.CpuSeconds(), own_begin_ = OwnSeconds();
};

class OverloadDrill {
 public:
  OverloadDrill(const DrillOptions& o, Drill* drill)
      : drill_(*drill),
        seconds_(o.seconds),
        server_(o.server, o.folder,
                {"--max-sequences=" + std::to_string(kRunning),
                 "--max-queue-requests=" + std::to_string(kQueued), "--kv-bytes=256M"}) {}

  void Run() {
    const int64_t pages = server_.State().memory().pages_used();
    Saturate();
    Flood();
    Judge();
    v1::GetServerResponse state;
    const bool idle = WaitUntil([&] {
      state = server_.State();
      return state.load().running() == 0 && state.load().waiting() == 0 &&
             state.memory().pages_used() == pages;
    });
    drill_.Expect(idle, "the KV cache is as before");
    drill_.Expect(state.load().completed() == closed_ + good_ && state.load().failed() == 0,
                  "what the server has completed is what was answered");
  }

 private:
  // The most that it can answer: more callers than it runs at once, fewer than it refuses.
  void Saturate() {
    const auto begin = Clock::now();
    const BusyCores cpu(server_);
    const auto calls = ClosedLoop(&server_, kRunning + kQueued / 2, request_, seconds_ / 2);
    peak_ = double(calls.size()) / SecondsSince(begin);
    closed_ = int64_t(calls.size());
    for (const auto& call : calls) drill_.Expect(call->complete(), "a closed loop is served whole");
    drill_.Report("goodput, closed loop", peak_, "calls/s");
    peak_cores_ = cpu.Report("closed loop", &drill_);
  }

  void Flood() {
    const BusyCores cpu(server_);
    start_ = Clock::now();
    const double rate = kTimes * peak_;
    for (double at = 0; at < seconds_; at += 1 / rate) {
      std::this_thread::sleep_until(
          start_ + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(at)));
      calls_.push_back(std::make_unique<Call>(&server_.stub(), request_));
    }
    end_ = Clock::now();
    drill_.Report("offered, five times that", double(calls_.size()) / SecondsSince(start_),
                  "calls/s");
    cores_ = cpu.Report("overload", &drill_);
    const bool ended = WaitUntil([&] {
      return std::all_of(calls_.begin(), calls_.end(),
                         [](const auto& call) { return call->ended(); });
    });
    drill_.Expect(ended, "every call ends");
    for (const auto& call : calls_) {
      if (!call->ended()) call->Cancel();
      call->Wait();
    }
  }

  void Judge() {
    int64_t in_time = 0;
    std::vector<double> sheds;
    for (const auto& call : calls_) {
      if (call->complete()) {
        ++good_;
        in_time += call->end() <= end_;
        continue;
      }
      drill_.Expect(call->shed(), "a refusal is RESOURCE_EXHAUSTED with RetryInfo, not " +
                                      std::to_string(call->status().error_code()) + " " +
                                      call->status().error_message());
      if (call->shed()) sheds.push_back(call->seconds());
    }
    drill_.Expect(good_ > 0 && !sheds.empty(), "some calls are answered and some refused");
    const double goodput = double(in_time) / std::chrono::duration<double>(end_ - start_).count();
    drill_.Report("goodput, overload", goodput, "calls/s");
    drill_.Report("of the closed loop's", 100 * goodput / peak_, "%");
    drill_.Report("the same, per core second of the server",
                  100 * goodput / peak_ * peak_cores_ / cores_, "%");
    drill_.Report("answered whole", double(good_), "calls");
    drill_.Report("refused, each with RetryInfo", double(sheds.size()), "calls");
    drill_.Report("refused within, median", 1000 * Quantile(sheds, 0.5), "ms");
    drill_.Report("refused within, 99 of 100", 1000 * Quantile(sheds, 0.99), "ms");
    drill_.Report("refused within, longest", 1000 * Quantile(sheds, 1), "ms");
  }

  Drill& drill_;
  const double seconds_;
  ServerProcess server_;
  const v1::GenerateRequest request_ = LoadRequest(400, 16);
  double peak_ = 0;                    // calls/s
  double peak_cores_ = 0, cores_ = 0;  // of the server, in the closed loop and in the flood
  int64_t closed_ = 0, good_ = 0;
  Clock::time_point start_, end_;  // of the flood
  std::vector<std::unique_ptr<Call>> calls_;
};

}  // namespace

void Overload(const DrillOptions& options, Drill* drill) { OverloadDrill(options, drill).Run(); }

}  // namespace entropyserve
