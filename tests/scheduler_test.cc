#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

namespace entropyserve {
namespace {

using Work = StepPlan::Work;
constexpr int64_t kPlenty = int64_t{1} << 40;

SchedulerOptions Options() {
  return {.step_tokens = 1024,
          .lone_chunk_tokens = 4096,
          .max_sequences = 4,
          .ageing_tokens = 64,
          .patience_steps = 3};
}

TEST(SchedulerTest, ALonePromptGetsLargeChunksThenDecodes) {
  Scheduler scheduler(Options());
  scheduler.Enqueue({.id = 1, .prompt = 9000});
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 4096, true}}));
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 4096, true}}));
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 808, true}}));
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 1, false}}));
}

TEST(SchedulerTest, DecodesComeFirstAndPrefillIsCutAtSegments) {
  Scheduler scheduler(Options());
  scheduler.Enqueue({.id = 1, .prompt = 100});
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 100, true}}));
  scheduler.Enqueue({.id = 2, .prompt = 5000, .segment = 512});
  // 1023 tokens are left after the decode: one segment of 512.
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 1, false}, {2, 512, true}}));
}

TEST(SchedulerTest, ShortestRemainingFirst) {
  Scheduler scheduler(Options());
  scheduler.Enqueue({.id = 1, .prompt = 50000});
  scheduler.Next(kPlenty);
  scheduler.Enqueue({.id = 2, .prompt = 100});
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{2, 100, true}, {1, 512, true}}));
}

TEST(SchedulerTest, PrefillKeepsASegmentHoweverManyDecode) {
  SchedulerOptions options = Options();
  options.max_sequences = 3000;
  options.step_tokens = 1024;
  Scheduler scheduler(options);
  for (uint64_t id = 1; id <= 1500; ++id) scheduler.Enqueue({.id = id, .prompt = 1});
  while (scheduler.prefill_backlog() + scheduler.waiting() > 0) scheduler.Next(kPlenty);
  scheduler.Enqueue({.id = 9000, .prompt = 2000});
  const StepPlan plan = scheduler.Next(kPlenty);
  EXPECT_EQ(plan.work.back(), (Work{9000, 512, true}));
}

TEST(SchedulerTest, AWaitingGiantIsNotOvertakenForEver) {
  Scheduler scheduler(Options());
  scheduler.Enqueue({.id = 1, .prompt = 1000, .pages = 100});
  int overtakers = 0;
  uint64_t next = 2;
  // Only 60 pages are ever free while small ones keep coming; once patience ends, nobody passes.
  for (int step = 0; step < 400; ++step) {
    scheduler.Enqueue({.id = next++, .prompt = 10, .pages = 10});
    for (uint64_t id : scheduler.Next(60).admit) {
      ++overtakers;
      scheduler.Remove(id);
    }
  }
  EXPECT_LT(overtakers, 40);
  EXPECT_EQ(scheduler.Next(100).admit, (std::vector<uint64_t>{1}));
}

TEST(SchedulerTest, NeverPlansMoreThanIsThereAndStarvesNobody) {
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    SchedulerOptions options = Options();
    options.max_sequences = 1 + int(random() % 6);
    Scheduler scheduler(options);
    std::map<uint64_t, SchedulerRequest> waiting, running;
    std::map<uint64_t, int64_t> left, answers;
    int64_t free_pages = 200;
    uint64_t next = 1;
    int idle = 0;
    for (int step = 0; step < 3000 && (step < 100 || !waiting.empty() || !running.empty());
         ++step) {
      if (step < 100 && random() % 3 == 0) {
        const SchedulerRequest r{.id = next++,
                                 .prompt = 1 + int64_t(random() % 6000),
                                 .pages = 1 + int64_t(random() % 150),
                                 .segment = 128 << (random() % 4),
                                 .exclusive = random() % 10 == 0};
        scheduler.Enqueue(r);
        waiting[r.id] = r;
        left[r.id] = r.prompt;
        answers[r.id] = int64_t(random() % 20);
      }
      const StepPlan plan = scheduler.Next(free_pages);
      for (uint64_t id : plan.admit) {
        ASSERT_TRUE(waiting.count(id));
        free_pages -= waiting[id].pages;
        ASSERT_GE(free_pages, 0);
        running[id] = waiting[id];
        waiting.erase(id);
      }
      ASSERT_LE(int64_t(running.size()), options.max_sequences);
      idle = plan.work.empty() && !running.empty() ? idle + 1 : 0;
      ASSERT_EQ(idle, 0) << "something runs and nothing is planned";
      int64_t tokens = 0;
      bool exclusive = false;
      for (const Work& work : plan.work) {
        ASSERT_TRUE(running.count(work.id));
        tokens += work.tokens;
        if (!work.prefill) {
          ASSERT_EQ(left[work.id], 0);
          if (--answers[work.id] < 0) {
            scheduler.Remove(work.id);
            free_pages += running[work.id].pages;
            running.erase(work.id);
          }
          continue;
        }
        const int64_t done = running[work.id].prompt - left[work.id];
        ASSERT_EQ(done % running[work.id].segment, 0)
            << "chunks start at a multiple of the segment";
        exclusive = exclusive || running[work.id].exclusive;
        if (running[work.id].exclusive) ASSERT_EQ(work.tokens, running[work.id].prompt);
        left[work.id] -= work.tokens;
        ASSERT_GE(left[work.id], 0);
      }
      if (exclusive) {
        ASSERT_EQ(plan.work.size(), 1u);
      } else {
        ASSERT_LE(tokens, std::max<int64_t>(options.lone_chunk_tokens, options.step_tokens + 1024));
      }
    }
    ASSERT_TRUE(waiting.empty() && running.empty()) << "round " << round << ": somebody starved";
  }
}

TEST(SchedulerTest, PausedSequencesDoNotRunAndOthersDo) {
  Scheduler scheduler(Options());
  scheduler.Enqueue({.id = 1, .prompt = 10});
  scheduler.Enqueue({.id = 2, .prompt = 10});
  scheduler.Next(kPlenty);
  scheduler.SetPaused(1, true);
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{2, 1, false}}));
  scheduler.SetPaused(1, false);
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 1, false}, {2, 1, false}}));
}

TEST(SchedulerTest, HeldRequestsKeepTheirPlaceAndRunWhenReleased) {
  Scheduler scheduler({.step_tokens = 256, .lone_chunk_tokens = 1024});
  scheduler.Enqueue({.id = 1, .prompt = 100});
  scheduler.Enqueue({.id = 2, .prompt = 4096, .segment = 128});
  ASSERT_EQ(scheduler.Next(kPlenty).admit.size(), 2u);
  scheduler.Hold(1);
  EXPECT_EQ(scheduler.running(), 2);
  // The other is not alone: somebody waits for its step to end.
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{2, 256, true}}));
  scheduler.Release(1);
  EXPECT_EQ(scheduler.Next(kPlenty).work, (std::vector<Work>{{1, 100, true}, {2, 128, true}}));
}

TEST(SchedulerTest, RequeuedRequestsWaitInTheirOldPlace) {
  Scheduler scheduler(Options());
  scheduler.Enqueue({.id = 1, .prompt = 10});
  ASSERT_EQ(scheduler.Next(kPlenty).admit.size(), 1u);
  scheduler.Requeue(1);
  EXPECT_EQ(scheduler.waiting(), 1);
  const StepPlan plan = scheduler.Next(kPlenty);
  EXPECT_EQ(plan.admit, (std::vector<uint64_t>{1}));
  EXPECT_EQ(plan.work, (std::vector<Work>{{1, 10, true}}));
}

}  // namespace
}  // namespace entropyserve
