// Drills: the server program in trouble. `drills NAME` runs one, --seconds and --times make it
// longer. It exits with 1 when a promise is broken; times are printed and never judged, because a
// busy machine is no error.
#include <signal.h>
#include <stdlib.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "engine/base/flag_set.h"
#include "tests/drills/call.h"
#include "tests/drills/drills.h"
#include "tests/drills/load.h"

namespace entropyserve {
namespace {

// Readers that never read hold their own sequences only.
void StalledReaders(const DrillOptions& o, Drill* drill) {
  constexpr int kStalled = 100, kGood = 32;
  ServerProcess server(o.server, o.folder, {"--max-sequences=160", "--kv-bytes=1G", "--dtype=f32"});
  const v1::GenerateRequest request = LoadRequest(100, 16);
  auto measure = [&] {
    const auto begin = Clock::now();
    const auto calls = ClosedLoop(&server, kGood, request, o.seconds / 3);
    for (const auto& call : calls)
      drill->Expect(call->complete(), "a reader gets its whole answer");
    return double(calls.size()) / SecondsSince(begin);
  };
  const double alone = measure();

  // Large answers: more than all buffers on the way hold.
  v1::GenerateRequest large = LoadRequest(64, 1200);
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
  constexpr double kUntilGone = std::numeric_limits<double>::infinity();
  int64_t admitted = 0, refused = 0;
  std::vector<double> drains;
  for (int round = 0; round < o.times; ++round) {
    ServerProcess server(o.server, o.folder,
                         {"--max-sequences=6", "--kv-bytes=256M", "--drain-seconds=120"});
    const v1::GenerateRequest request = LoadRequest(100 + 300 * (round % 3), 30);
    std::vector<std::unique_ptr<Call>> calls;
    std::thread load([&] { calls = ClosedLoop(&server, 16, request, kUntilGone); });
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
  options.server = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "entropyserve";
  FlagSet flags("drills overload|stalled|terminate|kill [flags]\n", "ENTROPYSERVE_DRILLS_");
  flags.Section("Flags");
  flags.Add("server", &options.server, "the server program; the one beside this by default");
  flags.Add("seconds", &options.seconds,
            "of load: overload for so long, then two times a third of it for stalled");
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
