// Drills: the server program in trouble. `drills NAME` runs one, --seconds and --times make it
// longer. It exits with 1 when a promise is broken; times are printed and never judged, because a
// busy machine is no error.
#include <signal.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/base/flag_set.h"
#include "tests/drills/call.h"
#include "tests/drills/drills.h"

namespace entropyserve {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, size_t(q * double(values.size())))];
}

v1::GenerateRequest Request(int prompt_bytes, int max_new) {
  v1::GenerateRequest r;
  r.set_text(std::string(size_t(prompt_bytes), 'a'));
  r.mutable_sampling()->set_temperature(0);
  r.mutable_sampling()->set_max_new_tokens(max_new);
  r.mutable_sampling()->set_ignore_eos(true);
  return r;
}

// `callers` threads call until `stop`, each its next call after its last.
std::vector<std::unique_ptr<Call>> ClosedLoop(ServerProcess* server, int callers,
                                              const v1::GenerateRequest& request,
                                              const std::atomic<bool>& stop) {
  std::mutex mutex;
  std::vector<std::unique_ptr<Call>> all;
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) {
    threads.emplace_back([&] {
      bool up = true;
      while (up && !stop.load()) {
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

// Five times as many calls as the server can answer. What it cannot take it refuses with RetryInfo,
// and what it takes it answers.
void Overload(const DrillOptions& o, Drill* drill) {
  constexpr int kRunning = 4, kQueued = 8, kTimes = 5;
  ServerProcess server(o.server, o.folder,
                       {"--max-sequences=" + std::to_string(kRunning),
                        "--max-queue-requests=" + std::to_string(kQueued), "--kv-bytes=256M"});
  const v1::GenerateRequest request = Request(400, 16);

  std::atomic<bool> stop = false;
  const auto begin = Clock::now();
  std::thread timer([&] {
    std::this_thread::sleep_for(std::chrono::duration<double>(o.seconds / 3));
    stop.store(true);
  });
  const auto closed = ClosedLoop(&server, kRunning + kQueued / 2, request, stop);
  timer.join();
  const double peak = double(closed.size()) / SecondsSince(begin);
  for (const auto& call : closed) drill->Expect(call->complete(), "a closed loop is served whole");

  const auto start = Clock::now();
  const double rate = kTimes * peak;
  std::vector<std::unique_ptr<Call>> open;
  const double seconds = o.seconds * 2 / 3;
  for (double at = 0; at < seconds; at += 1 / rate) {
    std::this_thread::sleep_until(
        start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(at)));
    open.push_back(std::make_unique<Call>(&server.stub(), request));
  }
  const auto offered_until = Clock::now();
  // A quarter of the time to get going.
  const auto counted_from = start + (offered_until - start) / 4;
  int64_t good = 0, in_time = 0;
  std::vector<double> sheds;
  for (const auto& call : open) {
    call->Wait();
    if (call->complete()) {
      ++good;
      in_time += call->end() > counted_from && call->end() <= offered_until;
      continue;
    }
    drill->Expect(call->shed(), "a refusal is RESOURCE_EXHAUSTED with RetryInfo, not " +
                                    std::to_string(call->status().error_code()) + " " +
                                    call->status().error_message());
    sheds.push_back(call->seconds());
  }
  drill->Expect(good > 0 && !sheds.empty(), "some calls are answered and some refused");
  const double goodput =
      double(in_time) / std::chrono::duration<double>(offered_until - counted_from).count();
  drill->Report("goodput, closed loop", peak, "calls/s");
  drill->Report("offered", double(open.size()) / seconds, "calls/s");
  drill->Report("goodput, offered five times that", goodput, "calls/s");
  drill->Report("of the closed loop's", 100 * goodput / peak, "%");
  drill->Report("refused", double(sheds.size()), "calls");
  drill->Report("refused within, median", 1000 * Quantile(sheds, 0.5), "ms");
  drill->Report("refused within, 99 of 100", 1000 * Quantile(sheds, 0.99), "ms");
}

// Readers that never read hold their own sequences only.
void StalledReaders(const DrillOptions& o, Drill* drill) {
  constexpr int kStalled = 100, kGood = 32;
  ServerProcess server(o.server, o.folder, {"--max-sequences=160", "--kv-bytes=1G", "--dtype=f32"});
  const v1::GenerateRequest request = Request(100, 16);
  auto measure = [&] {
    std::atomic<bool> stop = false;
    const auto begin = Clock::now();
    std::thread timer([&] {
      std::this_thread::sleep_for(std::chrono::duration<double>(o.seconds / 3));
      stop.store(true);
    });
    const auto calls = ClosedLoop(&server, kGood, request, stop);
    timer.join();
    for (const auto& call : calls)
      drill->Expect(call->complete(), "a reader gets its whole answer");
    return double(calls.size()) / SecondsSince(begin);
  };
  const double alone = measure();

  // Large answers: more than all buffers on the way hold.
  v1::GenerateRequest large = Request(64, 1200);
  large.mutable_sampling()->set_logprobs(20);
  std::vector<std::unique_ptr<Call>> stalled;
  for (int i = 0; i < kStalled; ++i)
    stalled.push_back(std::make_unique<Call>(&server.stub(), large, false));
  drill->Expect(WaitUntil([&] { return server.State().load().running() == kStalled; }),
                "all stalled readers are running");
  int64_t generated = -1;
  const bool paused = WaitUntil([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    return std::exchange(generated, server.State().load().generated_tokens()) == generated;
  });
  drill->Expect(paused, "sequences of stalled readers stop");
  const double beside = measure();
  drill->Expect(server.State().load().running() == kStalled, "stalled readers are still there");

  for (const auto& call : stalled) call->Cancel();
  for (const auto& call : stalled) call->Wait();
  const bool free = WaitUntil([&] {
    const v1::GetServerResponse state = server.State();
    return state.load().running() == 0 && state.memory().pages_used() == 0;
  });
  drill->Expect(free, "every page returns when they are cancelled");
  drill->Report("32 readers alone", alone, "calls/s");
  drill->Report("32 readers beside 100 that do not read", beside, "calls/s");
  drill->Report("tokens generated for one that does not read", double(generated) / double(kStalled),
                "tokens");
}

// SIGTERM under load: who was told that it is admitted gets its whole answer.
void Terminate(const DrillOptions& o, Drill* drill) {
  int64_t admitted = 0, refused = 0;
  std::vector<double> drains;
  for (int round = 0; round < o.times; ++round) {
    ServerProcess server(o.server, o.folder,
                         {"--max-sequences=6", "--kv-bytes=256M", "--drain-seconds=120"});
    const v1::GenerateRequest request = Request(100 + 300 * (round % 3), 30);
    std::atomic<bool> stop = false;
    std::vector<std::unique_ptr<Call>> calls;
    std::thread load([&] { calls = ClosedLoop(&server, 16, request, stop); });
    drill->Expect(WaitUntil([&] { return server.State().load().completed() >= 5 + round; }),
                  "the server answers");
    const auto begin = Clock::now();
    server.Signal(SIGTERM);
    load.join();  // until the server refuses
    drill->Expect(server.Wait() == 0, "the server leaves with 0");
    drains.push_back(SecondsSince(begin));
    for (const auto& call : calls) {
      admitted += call->accepted();
      refused += !call->accepted();
      if (call->accepted()) {
        drill->Expect(call->complete(), "an admitted call ends whole, not with " +
                                            std::to_string(call->status().error_code()) + " " +
                                            call->status().error_message());
      } else {
        drill->Expect(
            call->complete() || call->status().error_code() == grpc::StatusCode::UNAVAILABLE,
            "a call that is not admitted is UNAVAILABLE");
      }
    }
  }
  drill->Report("times", o.times, "");
  drill->Report("admitted, all answered whole", double(admitted), "calls");
  drill->Report("refused while draining", double(refused), "calls");
  drill->Report("from the signal to the end, longest", Quantile(drains, 1), "s");
}

int Main(int argc, char** argv) {
  DrillOptions options;
  FlagSet flags("drills overload|stalled|terminate|kill [flags]\n", "ENTROPYSERVE_DRILLS_");
  flags.Section("Flags");
  flags.Add("server", &options.server, "the server program");
  flags.Add("seconds", &options.seconds, "of load, for overload and stalled");
  flags.Add("times", &options.times, "how often the server is ended");
  const auto names = flags.Parse(std::vector<std::string>(argv + 1, argv + argc));
  if (flags.help_requested()) {
    std::fputs(flags.Help().c_str(), stdout);
    return 0;
  }
  const std::pair<const char*, void (*)(const DrillOptions&, Drill*)> drills[] = {
      {"overload", Overload},
      {"stalled", StalledReaders},
      {"terminate", Terminate},
      {"kill", Kill}};
  for (const auto& [name, run] : drills) {
    if (!names.ok() || names->size() != 1 || names->front() != name) continue;
    char folder[] = "/tmp/entropyserve_drill_XXXXXX";
    options.folder = mkdtemp(folder);
    Drill drill(name);
    run(options, &drill);
    if (drill.failed()) {
      std::printf("FAILED; the server's log is %s/server.log\n", folder);
      return 1;
    }
    std::filesystem::remove_all(folder);
    return 0;
  }
  std::fprintf(stderr, "drills: %s\n",
               names.ok() ? "expected one name; --help lists them"
                          : std::string(names.status().message()).c_str());
  return 2;
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) { return entropyserve::Main(argc, argv); }
