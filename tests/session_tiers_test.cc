// Idle sessions move between pages, host memory and files, and nobody can tell from the answers:
// the fake model's next token is a hash of everything that was said, and it reports foreign rows.
#include "engine/sessions/session_tiers.h"

#include <gmock/gmock.h>

#include <random>
#include <thread>

#include "tests/session_tiers_testing.h"

namespace entropyserve {
namespace {

struct Move {
  Tier from, to;
  SessionMove why;
  bool operator==(const Move&) const = default;
};

class Moves final : public EngineObserver {
 public:
  void OnSessionMove(Tier from, Tier to, SessionMove why) override {
    list.push_back({from, to, why});
  }
  int Count(const Move& move) const { return int(std::count(list.begin(), list.end(), move)); }
  std::vector<Move> list;
};

// Of a conversation of up to 64 positions: one page in each of 4 heads.
int64_t ShortBytes() { return 4 * PagePool::PageBytes(DType::kF32, FakeConfig().head_dim); }

class TierTest : public testing::TestWithParam<Tier> {};

TEST_P(TierTest, ASessionThatCameBackContinues) {
  TemporaryFolder folder;
  const bool disk = GetParam() == Tier::kDisk;
  auto moves = std::make_shared<Moves>();
  ManualEngine m(OutOfThePool(disk ? 0 : 1 << 20, disk ? folder.path() : ""), kPages, "fake",
                 moves);
  Conversation talk = Begin(m, "ann", Prompt(1, 300), 40);
  m.engine->RunOnce();
  for (int turn = 0; turn < 5; ++turn) {
    EXPECT_EQ(TierOf(m, talk), GetParam());
    const EngineStats stats = m.engine->Stats();
    EXPECT_EQ(stats.pages_used, 0);
    EXPECT_EQ(stats.tier_sessions[int(GetParam())], 1);
    EXPECT_GT(stats.tier_bytes[int(GetParam())], 0);
    EXPECT_EQ(stats.memory.back().bytes, disk ? 0 : stats.tier_bytes[int(Tier::kHost)]);
    EXPECT_EQ(folder.SessionFiles(), disk ? 1 : 0);
    const SessionInfo info = *m.engine->GetSession("ann", talk.id);
    EXPECT_EQ(info.positions, int64_t(talk.history.size()) - 1);
    EXPECT_GT(info.kv_bytes, 0);
    EXPECT_EQ(info.turns, turn + 1);
    EXPECT_TRUE(absl::IsNotFound(m.engine->GetSession("bob", talk.id).status()));
    EXPECT_EQ(m.engine->ListSessions("ann").size(), 1u);
    ASSERT_NO_FATAL_FAILURE(Say(m, &talk, Prompt(turn + 2, 30 + 60 * turn), 5));
    m.engine->RunOnce();
  }
  EXPECT_EQ(moves->Count({Tier::kDevice, Tier::kHost, SessionMove::kLimit}), 6);
  EXPECT_EQ(moves->Count({Tier::kHost, Tier::kDisk, SessionMove::kLimit}), disk ? 6 : 0);
  EXPECT_EQ(moves->Count({GetParam(), Tier::kDevice, SessionMove::kRestored}), 5);
  Delete(m, talk);
  EXPECT_TRUE(absl::IsNotFound(m.engine->GetSession("ann", talk.id).status()));
  EXPECT_EQ(moves->Count({GetParam(), GetParam(), SessionMove::kDeleted}), 1);
  EXPECT_EQ(folder.SessionFiles(), 0) << "deleting removes the file";
  ExpectNothingLeft(m);
}

// Lengths differ per head, and are not the position, after compression.
TEST_P(TierTest, ACompressedSessionComesBackAsItWas) {
  TemporaryFolder folder;
  const bool disk = GetParam() == Tier::kDisk;
  for (const bool moves : {false, true}) {
    EngineOptions options;
    if (moves) options = OutOfThePool(disk ? 0 : 1 << 20, disk ? folder.path() : "");
    ManualEngine m(options, kPages);
    Conversation talk{"ann", m.engine->CreateSession("ann")->id, {}};
    for (int turn = 0; turn < 4; ++turn) {
      EngineRequest r = TurnRequest(talk, Prompt(turn, 400), 30);
      r.kv = *KvPreset("adakv", "test");
      r.kv.params.budget = 100;
      auto sink = Submit(m.engine.get(), std::move(r));
      ASSERT_TRUE(RunToEnd(m, *sink));
      ASSERT_TRUE(sink->end.status.ok()) << sink->end.status;
      EXPECT_EQ(sink->end.receipt.cached_tokens, std::max(0, 430 * turn - 1));
      m.engine->RunOnce();
      const SessionInfo info = *m.engine->GetSession("ann", talk.id);
      EXPECT_EQ(info.tier, moves ? GetParam() : Tier::kDevice);
      EXPECT_LE(info.kept_tokens, 150);
      EXPECT_EQ(info.positions, 430 * (turn + 1) - 1);
      EXPECT_EQ(info.kv_policy, "adakv");
      EXPECT_EQ(m.model->corruptions(), 0);
      // The answers are those of a server that never moved it.
      static std::vector<std::vector<int32_t>> unmoved;
      if (!moves && turn == 0) unmoved.clear();
      if (!moves) unmoved.push_back(sink->ids);
      EXPECT_EQ(sink->ids, unmoved[turn]);
    }
    Delete(m, talk);
  }
}

TEST_P(TierTest, ForksContinueOnTheirOwn) {
  TemporaryFolder folder;
  const bool disk = GetParam() == Tier::kDisk;
  ManualEngine m(OutOfThePool(GetParam() == Tier::kHost ? 1 << 20 : 0, disk ? folder.path() : ""),
                 kPages);
  Conversation talk = Begin(m, "ann", Prompt(1, 150));
  m.engine->RunOnce();
  ASSERT_EQ(TierOf(m, talk), GetParam());
  std::vector<Conversation> forks;
  for (int i = 0; i < 4; ++i) {
    const auto info = m.engine->ForkSession("ann", talk.id);
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(info->positions, 152);
    EXPECT_EQ(info->turns, 1);
    forks.push_back(talk);
    forks.back().id = info->id;
    for (int step = 0; step < 4; ++step) m.engine->RunOnce();
  }
  EXPECT_TRUE(absl::IsNotFound(m.engine->ForkSession("bob", talk.id).status()));
  EXPECT_EQ(m.engine->Stats().pages_used, 0);
  EXPECT_EQ(m.engine->Stats().tier_sessions[int(GetParam())], 5);
  EXPECT_EQ(folder.SessionFiles(), disk ? 5 : 0);
  forks.push_back(talk);
  for (int turn = 0; turn < 3; ++turn) {
    for (size_t i = 0; i < forks.size(); ++i) {
      ASSERT_NO_FATAL_FAILURE(Say(m, &forks[i], Prompt(int(100 * i) + turn, 40)));
    }
  }
  for (const Conversation& fork : forks) Delete(m, fork);
  EXPECT_EQ(folder.SessionFiles(), 0);
  ExpectNothingLeft(m);
}

TEST_P(TierTest, IdleSessionsExpire) {
  TemporaryFolder folder;
  const bool disk = GetParam() == Tier::kDisk;
  EngineOptions options = OutOfThePool(disk ? 0 : 1 << 20, disk ? folder.path() : "");
  if (GetParam() == Tier::kDevice) options.session_device_bytes = 0;
  options.session_ttl_seconds = 60;
  auto moves = std::make_shared<Moves>();
  ManualEngine m(options, kPages, "fake", moves);
  Conversation old = Begin(m, "ann", Prompt(1, 20)), used = Begin(m, "ann", Prompt(2, 20));
  m.engine->RunOnce();
  m.clock->Advance(40);
  ASSERT_NO_FATAL_FAILURE(Say(m, &used, Prompt(3, 10)));
  m.engine->RunOnce();
  EXPECT_EQ(TierOf(m, old), GetParam());
  m.clock->Advance(30);
  m.engine->RunOnce();
  ExpectLost(m, old);
  EXPECT_EQ(TierOf(m, used), GetParam());
  EXPECT_EQ(moves->Count({GetParam(), GetParam(), SessionMove::kExpired}), 1);
  EXPECT_EQ(folder.SessionFiles(), disk ? 1 : 0);
  // A session in use does not expire, however long it takes.
  auto slow = Submit(m.engine.get(), TurnRequest(used, {7}, 5));
  slow->on_token = [&] { m.clock->Advance(100); };
  ASSERT_TRUE(RunToEnd(m, *slow));
  EXPECT_TRUE(slow->end.status.ok());
  m.engine->RunOnce();
  EXPECT_EQ(m.engine->Stats().sessions, 1);
  m.clock->Advance(61);
  m.engine->RunOnce();
  EXPECT_EQ(folder.SessionFiles(), 0);
  ExpectNothingLeft(m);
}

INSTANTIATE_TEST_SUITE_P(Tiers, TierTest, testing::Values(Tier::kHost, Tier::kDisk),
                         [](const auto& info) {
                           return info.param == Tier::kHost ? "Host" : "Disk";
                         });

TEST(SessionTiersTest, TheSessionUsedLongestAgoMovesFirstThroughAllTiers) {
  TemporaryFolder folder;
  EngineOptions options;
  options.session_device_bytes = 2 * ShortBytes();
  options.session_host_bytes = 2 * ShortBytes();
  options.session_dir = folder.path();
  ManualEngine probe(OutOfThePool(0, folder.path()), kPages);
  Conversation one = Begin(probe, "ann", Prompt(1, 10));
  probe.engine->RunOnce();
  const int64_t file_bytes = probe.engine->Stats().tier_bytes[int(Tier::kDisk)];
  Delete(probe, one);
  options.session_dir_bytes = 2 * file_bytes + file_bytes / 2;
  ManualEngine m(options, kPages);
  std::vector<Conversation> talks;
  for (int i = 0; i < 7; ++i) {
    talks.push_back(Begin(m, "ann", Prompt(i, 10)));
    m.engine->RunOnce();
    m.engine->RunOnce();
  }
  ExpectLost(m, talks[0]);
  const auto tiers = [&] {
    std::vector<Tier> all;
    for (size_t i = 1; i < talks.size(); ++i) all.push_back(TierOf(m, talks[i]));
    return all;
  };
  EXPECT_THAT(tiers(), testing::ElementsAre(Tier::kDisk, Tier::kDisk, Tier::kHost, Tier::kHost,
                                            Tier::kDevice, Tier::kDevice));
  // Using the oldest brings it up, and the next oldest of each tier goes down.
  ASSERT_NO_FATAL_FAILURE(Say(m, &talks[1], {9}));
  m.engine->RunOnce();
  m.engine->RunOnce();
  EXPECT_THAT(tiers(), testing::ElementsAre(Tier::kDevice, Tier::kDisk, Tier::kDisk, Tier::kHost,
                                            Tier::kHost, Tier::kDevice));
  for (size_t i = 1; i < talks.size(); ++i) {
    ASSERT_NO_FATAL_FAILURE(Say(m, &talks[i], {int32_t(10 + i)}));
  }
  m.engine->RunOnce();
  const EngineStats stats = m.engine->Stats();
  EXPECT_LE(stats.tier_bytes[int(Tier::kDevice)], options.session_device_bytes);
  EXPECT_LE(stats.tier_bytes[int(Tier::kHost)], options.session_host_bytes);
  EXPECT_LE(stats.tier_bytes[int(Tier::kDisk)], options.session_dir_bytes);
  for (size_t i = 1; i < talks.size(); ++i) Delete(m, talks[i]);
  ExpectNothingLeft(m);
}

TEST(SessionTiersTest, ARequestThatNeedsThePagesMovesIdleSessionsDown) {
  TemporaryFolder folder;
  for (const bool disk : {false, true}) {
    EngineOptions options;
    options.session_host_bytes = disk ? 0 : 16 << 20;
    if (disk) options.session_dir = folder.path();
    auto moves = std::make_shared<Moves>();
    ManualEngine m(options, 313, "fake", moves);
    std::vector<Conversation> talks;
    // Each holds a fifth of the pool when idle: more than fit, so that every turn makes room.
    for (int i = 0; i < 8; ++i) talks.push_back(Begin(m, "ann", Prompt(i, 900)));
    for (int round = 0; round < 3; ++round) {
      for (size_t i = 0; i < talks.size(); ++i) {
        ASSERT_NO_FATAL_FAILURE(Say(m, &talks[i], Prompt(int(i), 20)));
      }
    }
    // A request without a session takes nearly all of it.
    Conversation none{"ann", "", {}};
    auto giant = Submit(m.engine.get(), TurnRequest(none, Prompt(5, 4000), 20));
    ASSERT_TRUE(RunToEnd(m, *giant));
    EXPECT_TRUE(giant->end.status.ok()) << giant->end.status;
    EXPECT_EQ(giant->ids, Expected(&none, Prompt(5, 4000), 20));
    for (Conversation& talk : talks) ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {9}));
    EXPECT_GT(moves->Count({Tier::kDevice, Tier::kHost, SessionMove::kPressure}), 8);
    EXPECT_GT(
        moves->Count({disk ? Tier::kDisk : Tier::kHost, Tier::kDevice, SessionMove::kRestored}), 8);
    for (const Conversation& talk : talks) Delete(m, talk);
    ExpectNothingLeft(m);
  }
}

// A large session leaves the pool a page a step, while others run; used meanwhile, it stays.
TEST(SessionTiersTest, ASessionLeavesThePoolOverManySteps) {
  EngineOptions options = OutOfThePool(1 << 20, "");
  options.session_step_bytes = 1;
  auto moves = std::make_shared<Moves>();
  ManualEngine m(options, kPages, "fake", moves);
  Conversation talk = Begin(m, "ann", Prompt(1, 600));  // 40 pages
  const auto moved = [&] {
    return moves->Count({Tier::kDevice, Tier::kHost, SessionMove::kLimit});
  };
  for (int i = 0; i < 20; ++i) m.engine->RunOnce();
  EXPECT_EQ(moved(), 0);
  EXPECT_EQ(TierOf(m, talk), Tier::kDevice);
  EXPECT_EQ(m.engine->Stats().pages_used, 40) << "none of them is free before all are copied";
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {5}));
  EXPECT_EQ(moves->Count({Tier::kHost, Tier::kDevice, SessionMove::kRestored}), 0);
  auto beside = Submit(m.engine.get(), TurnRequest({"ann", "", {}}, {7}, 100));
  for (int i = 0; i < 50; ++i) m.engine->RunOnce();
  EXPECT_GE(beside->ids.size(), 40u) << "what runs goes on";
  EXPECT_EQ(moved(), 1);
  EXPECT_EQ(TierOf(m, talk), Tier::kHost);
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {6}));
  m.engine->RunOnce();
  Delete(m, talk);  // on its way again
  ASSERT_TRUE(RunToEnd(m, *beside));
  ExpectNothingLeft(m);
}

// A large session comes back a page a step, while others decode. It may turn back halfway.
TEST_P(TierTest, ASessionComesBackOverManySteps) {
  TemporaryFolder folder;
  const bool disk = GetParam() == Tier::kDisk;
  EngineOptions options = OutOfThePool(disk ? 0 : 1 << 20, disk ? folder.path() : "");
  options.session_step_bytes = 1;
  auto moves = std::make_shared<Moves>();
  ManualEngine m(options, kPages, "fake", moves);
  const Move back{GetParam(), Tier::kDevice, SessionMove::kRestored};
  Conversation talk = Begin(m, "ann", Prompt(1, 600));  // 40 pages
  auto beside = Submit(m.engine.get(), TurnRequest({"bob", "", {}}, {7}, 300));
  for (int i = 0; i < 70; ++i) m.engine->RunOnce();  // its next pages begin after 128
  ASSERT_EQ(TierOf(m, talk), GetParam());
  const int64_t others = m.engine->Stats().pages_used;

  auto left = std::make_shared<TurnSink>();
  const auto id = m.engine->Submit(TurnRequest(talk, {5}, 3), left);
  const size_t before = beside->ids.size();
  for (int i = 0; i < 30; ++i) m.engine->RunOnce();
  EXPECT_EQ(beside->ids.size(), before + 30) << "what runs goes on";
  EXPECT_TRUE(left->ids.empty());
  EXPECT_EQ(TierOf(m, talk), GetParam());
  EXPECT_GE(m.engine->Stats().pages_used, others + 40) << "all its pages are its own";
  m.engine->Cancel(*id, absl::CancelledError("left"));
  m.engine->RunOnce();
  EXPECT_TRUE(left->done);
  EXPECT_EQ(m.engine->Stats().pages_used, others) << "and all come back";
  EXPECT_EQ(TierOf(m, talk), GetParam());
  EXPECT_EQ(moves->Count(back), 0);

  const std::vector<int32_t> prompt = Prompt(2, 200);
  auto again = Submit(m.engine.get(), TurnRequest(talk, prompt, 3));
  int steps = 0;
  for (; moves->Count(back) == 0 && steps < 100; ++steps) m.engine->RunOnce();
  EXPECT_GE(steps, 40) << "a page a step";
  EXPECT_LE(steps, 42);
  EXPECT_FALSE(again->done);
  ASSERT_TRUE(RunToEnd(m, *again));
  EXPECT_EQ(again->ids, Expected(&talk, prompt, 3));
  Conversation alone{"bob", "", {}};
  ASSERT_TRUE(RunToEnd(m, *beside));
  EXPECT_EQ(beside->ids, Expected(&alone, {7}, 300));
  for (int i = 0; i < 60; ++i) m.engine->RunOnce();
  ASSERT_EQ(TierOf(m, talk), GetParam());
  auto deleted = Submit(m.engine.get(), TurnRequest(talk, {6}, 3));
  for (int i = 0; i < 5; ++i) m.engine->RunOnce();
  Delete(m, talk);  // on its way again
  EXPECT_TRUE(deleted->done);
  ExpectNothingLeft(m);
}

TEST(SessionTiersTest, RequestsOfManySessionsThatDoNotFitTogetherAllGetThere) {
  TemporaryFolder folder;
  EngineOptions options;
  options.session_dir = folder.path();
  ManualEngine m(options, 313);
  std::vector<Conversation> talks;
  for (int i = 0; i < 8; ++i) talks.push_back(Begin(m, "ann", Prompt(i, 900)));
  std::vector<std::shared_ptr<TurnSink>> sinks;
  for (size_t i = 0; i < talks.size(); ++i) {
    sinks.push_back(Submit(m.engine.get(), TurnRequest(talks[i], {int32_t(i + 2)}, 4)));
  }
  for (size_t i = 0; i < talks.size(); ++i) {
    ASSERT_TRUE(RunToEnd(m, *sinks[i]));
    ASSERT_TRUE(sinks[i]->end.status.ok()) << sinks[i]->end.status;
    EXPECT_EQ(sinks[i]->ids, Expected(&talks[i], {int32_t(i + 2)}, 4));
  }
  EXPECT_EQ(m.model->corruptions(), 0);
}

TEST(SessionTiersTest, WithoutOtherTiersSessionsAreDroppedOnlyWhereThatHelps) {
  ManualEngine m({}, 313);
  Conversation a = Begin(m, "ann", Prompt(1, 1400)), b = Begin(m, "ann", Prompt(2, 1400));
  // b's next turn is too large beside b itself and a request that runs, whatever a gives.
  auto running = Submit(m.engine.get(), TurnRequest({"ann", "", {}}, Prompt(3, 1000), 40));
  for (int i = 0; i < 8; ++i) m.engine->RunOnce();
  auto waiting = Submit(m.engine.get(), TurnRequest(b, Prompt(4, 500), 2));
  m.engine->RunOnce();
  EXPECT_FALSE(running->done);
  EXPECT_EQ(TierOf(m, a), Tier::kDevice) << "something still runs";
  ASSERT_TRUE(RunToEnd(m, *waiting));
  EXPECT_TRUE(waiting->end.status.ok()) << waiting->end.status;
  EXPECT_EQ(waiting->ids, Expected(&b, Prompt(4, 500), 2));
  ASSERT_NO_FATAL_FAILURE(Say(m, &a, {3}));
  auto giant = Submit(m.engine.get(), TurnRequest({"ann", "", {}}, Prompt(5, 2500), 2));
  ASSERT_TRUE(RunToEnd(m, *giant));
  EXPECT_TRUE(giant->end.status.ok()) << giant->end.status;
  ExpectLost(m, b);  // used before a
  Delete(m, a);
  ExpectNothingLeft(m);
}

TEST(SessionTiersTest, SharedPagesAreFreeWhenTheLastForkHasMoved) {
  EngineOptions options;
  options.session_host_bytes = 16 << 20;
  ManualEngine m(options, 100);
  Conversation talk = Begin(m, "ann", Prompt(1, 640));  // 44 pages
  Conversation fork = talk;
  fork.id = m.engine->ForkSession("ann", talk.id)->id;
  EXPECT_EQ(m.engine->Stats().pages_used, 44);
  auto big = Submit(m.engine.get(), TurnRequest({"ann", "", {}}, Prompt(2, 1200), 2));
  ASSERT_TRUE(RunToEnd(m, *big));
  EXPECT_TRUE(big->end.status.ok()) << big->end.status;
  EXPECT_EQ(TierOf(m, talk), Tier::kHost);
  EXPECT_EQ(TierOf(m, fork), Tier::kHost);
  EXPECT_EQ(m.engine->Stats().pages_used, 0);
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {5}));
  ASSERT_NO_FATAL_FAILURE(Say(m, &fork, {6}));
  Delete(m, talk);
  ASSERT_NO_FATAL_FAILURE(Say(m, &fork, {7}));
  Delete(m, fork);
  ExpectNothingLeft(m);
}

TEST(SessionTiersTest, WhatCanNeverFitIsRefusedInEveryTier) {
  TemporaryFolder folder;
  // The first turn takes up to 288 pages, of which 188 stay; the next one 114 beside them.
  ManualEngine m(OutOfThePool(0, folder.path()), 300);
  Conversation talk = Begin(m, "ann", Prompt(1, 3000), 1);
  m.engine->RunOnce();
  ASSERT_EQ(TierOf(m, talk), Tier::kDisk);
  auto never = Submit(m.engine.get(), TurnRequest(talk, Prompt(4, 1090), 5));
  ASSERT_TRUE(RunToEnd(m, *never));
  EXPECT_TRUE(absl::IsResourceExhausted(never->end.status)) << never->end.status;
  EXPECT_FALSE(IsRetryable(never->end.status));
  m.engine->RunOnce();
  EXPECT_EQ(TierOf(m, talk), Tier::kDisk) << "it went back";
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {5}));
}

TEST(SessionTiersTest, MemoryForTablesMayFailAndTheSessionStays) {
  EngineOptions options = OutOfThePool(1 << 20, "");
  ManualEngine m(options, kPages);
  Conversation talk = Begin(m, "ann", Prompt(1, 100));
  int left = 2;
  m.backend->fails = [&] { return left-- > 0; };
  auto sink = Submit(m.engine.get(), TurnRequest(talk, {5}, 2));
  ASSERT_TRUE(RunToEnd(m, *sink));
  EXPECT_TRUE(absl::IsResourceExhausted(sink->end.status)) << sink->end.status;
  EXPECT_EQ(TierOf(m, talk), Tier::kHost);
  EXPECT_EQ(m.engine->Stats().pages_used, 0);
  m.backend->fails = nullptr;
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {6}));
  Delete(m, talk);
  ExpectNothingLeft(m);
}

// A thousand sessions with a secret each, in a pool that holds twenty, in every tier.
TEST(SessionTiersTest, NoSessionEverSeesAnothersSecret) {
  TemporaryFolder folder;
  EngineOptions options;
  options.session_host_bytes = 800 * ShortBytes();
  options.session_dir = folder.path();
  auto moves = std::make_shared<Moves>();
  ManualEngine m(options, 220, "fake", moves);
  std::mt19937 random(11);
  constexpr int kSessions = 1000, kTurns = 700;
  std::vector<Conversation> talks;
  // The first token is the fake's tag: every row of a conversation carries it.
  for (int i = 0; i < kSessions; ++i) {
    talks.push_back(Begin(m, i % 3 ? "ann" : "bob",
                          {2 + i % 990, int32_t(2 + random() % 900), int32_t(2 + i / 10)}, 2));
  }
  for (int i = 0; i < kTurns; ++i) {
    Conversation& talk = talks[random() % talks.size()];
    if (random() % 10 > 0) {
      ASSERT_NO_FATAL_FAILURE(Say(m, &talk, Prompt(i, 1 + int(random() % 20)), 2)) << i;
    } else {
      const auto fork = m.engine->ForkSession(talk.owner, talk.id);
      ASSERT_TRUE(fork.ok()) << fork.status();
      EXPECT_TRUE(m.engine->DeleteSession(talk.owner, talk.id).ok());
      talk.id = fork->id;
    }
  }
  const EngineStats stats = m.engine->Stats();
  for (int tier = 0; tier < kSessionTiers; ++tier) EXPECT_GT(stats.tier_sessions[tier], 0);
  EXPECT_EQ(stats.sessions, kSessions);
  EXPECT_GT(moves->Count({Tier::kDisk, Tier::kDevice, SessionMove::kRestored}), 50);
  EXPECT_EQ(moves->Count({Tier::kDisk, Tier::kDisk, SessionMove::kLost}), 0);
  for (const Conversation& talk : talks) {
    EXPECT_EQ(m.engine->GetSession(talk.owner, talk.id)->positions,
              int64_t(talk.history.size()) - 1);
    Delete(m, talk);
  }
  ExpectNothingLeft(m);
  EXPECT_EQ(folder.SessionFiles(), 0);
}

// The same with the engine's own threads, and callers at the same time.
class SharedClock final : public Clock {
 public:
  TimePoint Now() const override { return TimePoint(std::chrono::nanoseconds(++now)); }
  mutable std::atomic<int64_t> now{int64_t{1} << 40};
};

TEST(SessionTiersTest, ThreadsTooAndTheIdleEngineExpires) {
  TemporaryFolder folder;
  auto clock = std::make_shared<SharedClock>();
  EngineParts parts;
  parts.backend = MakeCpuBackend(1);
  auto owned_model = std::make_unique<FakeModel>(parts.backend.get());
  FakeModel* const model = owned_model.get();
  parts.model = std::move(owned_model);
  parts.tokenizer = std::make_shared<FakeTokenizer>();
  parts.clock = clock;
  parts.options = OutOfThePool(3 * ShortBytes(), folder.path());
  parts.options.step_tokens = 256;
  parts.options.lone_chunk_tokens = 512;
  parts.options.session_ttl_seconds = 3600;
  parts.pages = 200;
  std::unique_ptr<Engine> engine = *MakeEngine(std::move(parts));
  constexpr int kThreads = 4, kEach = 5, kTurns = 12;
  std::vector<std::thread> callers;
  for (int t = 0; t < kThreads; ++t) {
    callers.emplace_back([&, t] {
      std::vector<Conversation> talks;
      for (int i = 0; i < kEach; ++i) {
        talks.push_back({"owner" + std::to_string(t), "", {}});
        talks.back().id = engine->CreateSession(talks.back().owner)->id;
      }
      for (int turn = 0; turn < kTurns; ++turn) {
        for (int i = 0; i < kEach; ++i) {
          const std::vector<int32_t> prompt = Prompt(t * 100 + i * 10 + turn, 5);
          auto sink = Submit(engine.get(), TurnRequest(talks[i], prompt, 2));
          while (!sink->done) std::this_thread::yield();
          ASSERT_TRUE(sink->end.status.ok()) << sink->end.status;
          ASSERT_EQ(sink->ids, Expected(&talks[i], prompt, 2));
        }
        const auto fork = engine->ForkSession(talks[0].owner, talks[0].id);
        ASSERT_TRUE(fork.ok()) << fork.status();
        ASSERT_TRUE(engine->DeleteSession(talks[0].owner, fork->id).ok());
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(model->corruptions(), 0);
  EXPECT_EQ(engine->Stats().sessions, kThreads * kEach);
  // Nobody calls any more: the engine finds out by itself.
  clock->now += int64_t{3601} * 1'000'000'000;
  while (engine->Stats().sessions > 0) std::this_thread::yield();
  EXPECT_EQ(engine->Stats().pages_used, 0);
  engine.reset();  // a file that was being written meanwhile is gone then
  EXPECT_EQ(folder.SessionFiles(), 0);
}

}  // namespace
}  // namespace entropyserve
