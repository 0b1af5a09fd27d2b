// Lives of the engine, drawn from seeds (tests/simulation.h). ENTROPYSERVE_SEED=N replays one,
// ENTROPYSERVE_SEEDS=M runs that many from 1 on, or from N on.
#include "tests/simulation.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace entropyserve {
namespace {

int64_t FromEnvironment(const char* name, int64_t otherwise) {
  const char* const value = std::getenv(name);
  return value ? std::strtoll(value, nullptr, 10) : otherwise;
}

// An empty folder for one life.
std::string FreshFolder() {
  const std::filesystem::path path =
      std::filesystem::path(testing::TempDir()) / ("simulation_" + std::to_string(getpid()));
  std::filesystem::remove_all(path);
  std::filesystem::create_directories(path);
  return path;
}

TEST(SimulationTest, EverySeedKeepsThePromises) {
  const bool one = std::getenv("ENTROPYSERVE_SEED") != nullptr;
  const int64_t first = FromEnvironment("ENTROPYSERVE_SEED", 1);
  const int64_t seeds = FromEnvironment("ENTROPYSERVE_SEEDS", one ? 1 : ES_SIMULATION_SEEDS);
  SimulationCounts n;
  for (int64_t seed = first; seed < first + seeds; ++seed) {
    const std::string wrong = Simulate({.seed = uint64_t(seed), .folder = FreshFolder()}, &n);
    ASSERT_EQ(wrong, "") << "replay with ENTROPYSERVE_SEED=" << seed;
  }
  std::printf(
      "%ld seeds: %ld requests, %ld completed, %ld refused; cancelled unseen %ld, waiting %ld, "
      "prefilling %ld, decoding %ld (%ld of them paused); expired %ld, deleted while busy %ld, "
      "drained %ld, lost %ld; seen in host memory %ld, in files %ld, restarts %ld; %ld tokens "
      "checked, %ld compressions, %ld later turns, %ld forks, %ld failed "
      "allocations\n",
      seeds, n.requests, n.completed, n.refused, n.cancelled_unseen, n.cancelled_waiting,
      n.cancelled_prefilling, n.cancelled_decoding, n.cancelled_paused, n.expired,
      n.deleted_while_busy, n.drained, n.lost, n.host_sessions, n.disk_sessions, n.restarts,
      n.checked_tokens, n.compressions, n.later_turns, n.forks, n.failed_allocations);
  if (one) return;
  // Everything has happened, and often: at least once in ten lives.
  for (int64_t count :
       {n.completed, n.refused, n.cancelled_unseen, n.cancelled_waiting, n.cancelled_prefilling,
        n.cancelled_decoding, n.cancelled_paused, n.expired, n.deleted_while_busy, n.compressions,
        n.later_turns, n.forks, n.failed_allocations}) {
    EXPECT_GE(count, seeds / 10);
  }
  EXPECT_GE(n.cancels(), seeds);
}

TEST(SimulationTest, TheSameSeedIsTheSameLife) {
  for (uint64_t seed : {3, 4, 5, 6, 7}) {
    SimulationCounts first, second;
    EXPECT_EQ(Simulate({.seed = seed, .folder = FreshFolder()}, &first), "");
    EXPECT_EQ(Simulate({.seed = seed, .folder = FreshFolder()}, &second), "");
    EXPECT_EQ(first.completed, second.completed);
    EXPECT_EQ(first.checked_tokens, second.checked_tokens);
    EXPECT_EQ(first.expired, second.expired);
  }
}

TEST(SimulationTest, AnySwappedPageIsSeen) {
  int found = 0;
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SimulationCounts counts;
    bool planted = false;
    const SimulationOptions options{.seed = seed, .folder = FreshFolder(), .swap_pages = true};
    const std::string wrong = Simulate(options, &counts, &planted);
    EXPECT_EQ(!wrong.empty(), planted) << "seed " << seed << ": " << wrong;
    found += planted;
  }
  EXPECT_GE(found, 20);
}

}  // namespace
}  // namespace entropyserve
