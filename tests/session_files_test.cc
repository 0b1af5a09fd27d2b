// Sessions in files: after a restart or a kill, of two servers, damaged, and where none can be
// written.
#include <filesystem>
#include <fstream>
#include <random>

#include "engine/sessions/session_tiers.h"
#include "tests/session_tiers_testing.h"

namespace entropyserve {
namespace {

namespace fs = std::filesystem;

TEST(SessionFilesTest, ARestartedServerContinues) {
  TemporaryFolder folder;
  EngineOptions options;
  options.session_dir = folder.path();
  std::vector<Conversation> talks;
  {
    ManualEngine m(options, kPages);
    for (int i = 0; i < 5; ++i) talks.push_back(Begin(m, i % 2 ? "ann" : "bob", Prompt(i, 100)));
  }
  EXPECT_EQ(folder.SessionFiles(), 5);
  for (int restart = 0; restart < 3; ++restart) {
    ManualEngine m(options, kPages);
    EXPECT_EQ(m.engine->ListSessions("ann").size(), 2u);
    EXPECT_EQ(m.engine->ListSessions("bob").size(), 3u);
    EXPECT_TRUE(m.engine->ListSessions("eve").empty());
    EXPECT_TRUE(absl::IsNotFound(m.engine->GetSession("eve", talks[0].id).status()));
    EXPECT_EQ(m.engine->Stats().tier_sessions[int(Tier::kDisk)], 5);
    for (int i = 0; i < 5; i += 2) ASSERT_NO_FATAL_FAILURE(Say(m, &talks[i], Prompt(i, 70)));
    // A drained server has written them too, and still tells where they are.
    if (restart == 1) {
      m.engine->Drain(std::chrono::steady_clock::now() + std::chrono::hours(1));
      EXPECT_EQ(TierOf(m, talks[0]), Tier::kDisk);
      EXPECT_EQ(m.engine->Stats().pages_used, 0);
    }
  }
  EngineOptions brief = options;
  brief.session_dir_bytes = 1;
  { ManualEngine m(brief, kPages); }
  EXPECT_EQ(folder.SessionFiles(), 5) << "what is there is not touched by a smaller limit";
}

TEST(SessionFilesTest, AnotherModelsSessionsAreNeverContinued) {
  TemporaryFolder folder;
  EngineOptions options;
  options.session_dir = folder.path();
  Conversation talk;
  {
    ManualEngine m(options, kPages, "one model");
    talk = Begin(m, "ann", Prompt(1, 100));
  }
  {
    ManualEngine m(options, kPages, "another model");
    EXPECT_TRUE(m.engine->ListSessions("ann").empty());
    ExpectLost(m, talk);
    EXPECT_TRUE(absl::IsNotFound(m.engine->GetSession("bob", talk.id).status()));
  }
  {
    ManualEngine m(options, kPages, "one model");
    ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {5}));
    ManualEngine other(options, kPages, "another model");
    EXPECT_EQ(Reason(other.engine->DeleteSession("ann", talk.id)), kSessionBusy);
  }
  ManualEngine m(options, kPages, "another model");
  EXPECT_TRUE(absl::IsNotFound(m.engine->DeleteSession("bob", talk.id)));
  EXPECT_EQ(folder.SessionFiles(), 1);
  ASSERT_NO_FATAL_FAILURE(DeleteLost(m, talk));
  EXPECT_EQ(folder.SessionFiles(), 0);
}

TEST(SessionFilesTest, TwoServersOnOneFolderPassASessionToAndFro) {
  TemporaryFolder folder;
  ManualEngine a(OutOfThePool(0, folder.path()), kPages), b(OutOfThePool(0, folder.path()), kPages);
  Conversation talk = Begin(a, "ann", Prompt(1, 100));
  a.engine->RunOnce();
  for (int i = 0; i < 4; ++i) {
    ManualEngine& here = i % 2 ? a : b;
    ManualEngine& there = i % 2 ? b : a;
    EXPECT_TRUE(absl::IsNotFound(here.engine->GetSession("bob", talk.id).status()));
    EXPECT_EQ(here.engine->GetSession("ann", talk.id)->positions, int64_t(talk.history.size()) - 1);
    // While one continues it, the other may not, whatever it asks for.
    auto sink = Submit(here.engine.get(), TurnRequest(talk, Prompt(i, 20), 3));
    sink->on_token = [&, n = 0]() mutable {
      if (n++ > 0) return;
      EXPECT_EQ(Reason(there.engine->GetSession("ann", talk.id).status()), kSessionBusy);
      EXPECT_EQ(Reason(there.engine->ForkSession("ann", talk.id).status()), kSessionBusy);
      EXPECT_EQ(Reason(there.engine->DeleteSession("ann", talk.id)), kSessionBusy);
      EXPECT_TRUE(absl::IsNotFound(there.engine->GetSession("bob", talk.id).status()));
      auto refused = Submit(there.engine.get(), TurnRequest(talk, {5}, 1));
      ASSERT_TRUE(RunToEnd(there, *refused));
      EXPECT_EQ(Reason(refused->end.status), kSessionBusy) << refused->end.status;
    };
    ASSERT_TRUE(RunToEnd(here, *sink));
    EXPECT_EQ(sink->ids, Expected(&talk, Prompt(i, 20), 3));
    here.engine->RunOnce();
  }
  EXPECT_TRUE(b.engine->DeleteSession("ann", talk.id).ok());
  ExpectLost(a, talk);
  EXPECT_EQ(folder.SessionFiles(), 0);
  ExpectNothingLeft(b);
}

// kill -9 at any moment of a turn: what comes back is the conversation before the turn, or nothing.
TEST(SessionFilesTest, AKilledServersSessionsComeBackOnlyAsTheyWereLast) {
  TemporaryFolder folder, killed;
  const auto kill = [&](const std::string& name) {
    const std::string copy = killed.path() + "/" + name;  // a copy has no locks
    fs::copy(folder.path(), copy, fs::copy_options::recursive);
    return copy;
  };
  EngineOptions options = OutOfThePool(0, folder.path());
  ManualEngine m(options, kPages);
  Conversation talk = Begin(m, "ann", Prompt(1, 100));
  m.engine->RunOnce();
  const Conversation before = talk;
  std::vector<std::pair<std::string, bool>> cases = {{kill("idle"), true}};
  {
    auto sink = Submit(m.engine.get(), TurnRequest(talk, Prompt(2, 300), 3));
    m.engine->RunOnce();
    m.engine->RunOnce();
    cases.emplace_back(kill("prefill"), true);
    sink->on_token = [&] {
      cases.emplace_back(kill("token" + std::to_string(sink->ids.size())), true);
    };
    // No idle session may leave the pool: the finished turn is in memory only.
    ASSERT_TRUE(RunToEnd(m, *sink));
    EXPECT_EQ(sink->ids, Expected(&talk, Prompt(2, 300), 3));
  }
  m.engine->RunOnce();
  const std::string after = kill("after");
  for (auto& [copy, whole] : cases) {
    options.session_dir = copy;
    ManualEngine next(options, kPages);
    Conversation again = before;
    ASSERT_NO_FATAL_FAILURE(Say(next, &again, Prompt(3, 20))) << copy;
  }
  options.session_dir = after;
  {
    ManualEngine next(options, kPages);
    Conversation again = talk;
    ASSERT_NO_FATAL_FAILURE(Say(next, &again, Prompt(3, 20)));
  }
  // A finished turn that was not written: lost, and its owner is told so.
  EngineOptions keeps = options;
  keeps.session_dir = folder.path();
  keeps.session_device_bytes = 0;
  ManualEngine keeper(keeps, kPages);
  ASSERT_NO_FATAL_FAILURE(Say(keeper, &talk, {5}));
  keeps.session_dir = kill("unwritten");
  ManualEngine next(keeps, kPages);
  ExpectLost(next, talk);
  EXPECT_TRUE(absl::IsNotFound(next.engine->GetSession("bob", talk.id).status()));
}

// Sessions that never left a server's memory: after kill -9 they are lost, not unknown.
TEST(SessionFilesTest, AKilledServersUnwrittenSessionsAreLostNotUnknown) {
  TemporaryFolder folder, killed;
  EngineOptions options;
  options.session_dir = folder.path();
  ManualEngine m(options, kPages), neighbour(options, kPages);
  const Conversation empty{"ann", m.engine->CreateSession("ann")->id, {}};
  Conversation talk = Begin(m, "ann", Prompt(1, 100)), fork = talk;
  fork.id = m.engine->ForkSession("ann", talk.id)->id;
  const Conversation gone = Begin(m, "ann", Prompt(2, 20));
  Delete(m, gone);
  EXPECT_EQ(folder.SessionFiles(), 3) << "one marker each, none of the deleted one";
  EXPECT_EQ(Reason(neighbour.engine->GetSession("ann", talk.id).status()), kSessionBusy);
  fs::copy(folder.path(), killed.path(), fs::copy_options::recursive);  // a copy has no locks
  {
    options.session_dir = killed.path();
    ManualEngine next(options, kPages);
    for (const Conversation& lost : {empty, talk, fork}) {
      ASSERT_NO_FATAL_FAILURE(ExpectLost(next, lost));
      EXPECT_TRUE(absl::IsNotFound(next.engine->GetSession("bob", lost.id).status()));
    }
    EXPECT_TRUE(absl::IsNotFound(next.engine->GetSession("ann", gone.id).status()));
    EXPECT_EQ(next.engine->Stats().sessions, 0);
    EXPECT_TRUE(absl::IsNotFound(next.engine->DeleteSession("bob", talk.id)));
    for (const Conversation& lost : {empty, talk, fork}) DeleteLost(next, lost);
  }
  EXPECT_EQ(killed.SessionFiles(), 0) << "what has been told is not kept";
  // A marker changes nothing for who goes on here, and goes with its session.
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, Prompt(3, 30)));
  for (const Conversation& c : {empty, talk, fork}) Delete(m, c);
  EXPECT_EQ(folder.SessionFiles(), 0);
  ExpectNothingLeft(m);
}

// The caller's thread writes a marker: the session may be deleted, or in a file, by then.
TEST(SessionFilesTest, AMarkerThatComesTooLateIsRemoved) {
  TemporaryFolder folder;
  FlakyBackend backend;
  FakeModel model(&backend);
  auto pool = *PagePool::Create(&backend, DType::kF32, FakeConfig().head_dim, 100);
  const FakeClock clock;
  const EngineOptions options;
  EngineObserver observer;
  SessionStore store(&clock, 10);
  SessionTiers tiers({.options = &options,
                      .clock = &clock,
                      .backend = &backend,
                      .pool = pool.get(),
                      .model = &model,
                      .model_identity = "fake",
                      .observer = &observer,
                      .store = &store,
                      .dir = *SessionDir::Open(folder.path()),
                      .post = [](std::function<void()>) {},
                      .inline_io = true});
  for (const bool deleted : {true, false}) {
    auto cache = std::make_unique<SequenceCache>(&backend, pool.get(), model.shape());
    Session* const session = *store.Create("ann", std::move(cache));
    const std::string id = session->id;
    const SessionMarker marker = *tiers.MarkerOf(*session);
    if (deleted) {
      ASSERT_TRUE(tiers.Remove(session).ok());
    } else {
      tiers.WriteAll();
    }
    ASSERT_TRUE(WriteSessionMarker(marker.path, marker.record).ok());
    tiers.Marked(id, true);
    EXPECT_EQ(folder.SessionFiles(), deleted ? 0 : 1);
    EXPECT_EQ(tiers.Find("ann", id).ok(), !deleted);
  }
}

TEST(SessionFilesTest, DamagedFilesAreLostSessions) {
  TemporaryFolder folder;
  std::mt19937 random(5);
  for (int round = 0; round < 60; ++round) {
    ManualEngine m(OutOfThePool(0, folder.path()), kPages);
    Conversation talk = Begin(m, "ann", Prompt(round, 70));
    m.engine->RunOnce();
    const std::string path = folder.path() + "/" + talk.id + ".session";
    const int64_t size = int64_t(fs::file_size(path));
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    const int64_t at = round < 20 ? round : random() % size;
    file.seekg(at);
    const char byte = char(file.get());
    file.seekp(at);
    file.put(char(byte ^ (1 << (random() % 8))));
    file.close();
    if (round % 3 == 0) fs::resize_file(path, random() % size);
    auto sink = Submit(m.engine.get(), TurnRequest(talk, {5}, 2));
    ASSERT_TRUE(RunToEnd(m, *sink));
    EXPECT_EQ(Reason(sink->end.status), kSessionLost) << sink->end.status << " at " << at;
    EXPECT_TRUE(sink->ids.empty());
    EXPECT_EQ(m.engine->Stats().pages_used, 0);
    ASSERT_NO_FATAL_FAILURE(ExpectLost(m, talk));
    DeleteLost(m, talk);
    EXPECT_EQ(folder.SessionFiles(), 0) << "also one of another layout version";
  }
}

TEST(SessionFilesTest, AFullDiskLosesTheSessionAndSaysSo) {
  TemporaryFolder folder;
  ManualEngine m(OutOfThePool(0, folder.path()), kPages);
  Conversation talk = Begin(m, "ann", Prompt(1, 20));
  m.engine->RunOnce();
  Conversation other = Begin(m, "ann", Prompt(2, 20), 1);
  for (const auto& entry : fs::directory_iterator(folder.path())) {
    if (entry.is_directory()) fs::remove_all(entry.path());  // no file can be written from now on
  }
  EXPECT_EQ(TierOf(m, talk), Tier::kDisk);
  auto sink = Submit(m.engine.get(), TurnRequest(talk, {5}, 2));
  ASSERT_TRUE(RunToEnd(m, *sink));
  EXPECT_FALSE(sink->end.status.ok());
  EXPECT_TRUE(sink->ids.empty());
  Conversation third{"ann", m.engine->CreateSession("ann")->id, {}};
  ASSERT_NO_FATAL_FAILURE(Say(m, &third, {8}));
  for (int i = 0; i < 3; ++i) m.engine->RunOnce();
  ExpectLost(m, third);
  EXPECT_EQ(m.engine->Stats().pages_used, 0);
}

TEST(SessionFilesTest, CancelledAndDeletedWhileItsFileIsRead) {
  TemporaryFolder folder;
  ManualEngine m(OutOfThePool(0, folder.path()), kPages);
  Conversation talk = Begin(m, "ann", Prompt(1, 100));
  m.engine->RunOnce();
  for (int i = 0; i < 5; ++i) {
    // Both are in the inbox before the file has been read.
    auto sink = std::make_shared<TurnSink>();
    const RequestId id = *m.engine->Submit(TurnRequest(talk, {5}, 2), sink);
    m.engine->Cancel(id, absl::CancelledError("test"));
    ASSERT_TRUE(RunToEnd(m, *sink));
    EXPECT_EQ(sink->end.reason, FinishReason::kCancelled);
    m.engine->RunOnce();
    EXPECT_EQ(TierOf(m, talk), Tier::kDisk);
    EXPECT_EQ(m.engine->Stats().memory.back().bytes, 0);
  }
  ASSERT_NO_FATAL_FAILURE(Say(m, &talk, {6}));
  m.engine->RunOnce();
  auto sink = std::make_shared<TurnSink>();
  ASSERT_TRUE(m.engine->Submit(TurnRequest(talk, {5}, 2), sink).ok());
  EXPECT_TRUE(m.engine->DeleteSession("ann", talk.id).ok());
  ASSERT_TRUE(RunToEnd(m, *sink));
  m.engine->RunOnce();
  EXPECT_EQ(folder.SessionFiles(), 0);
  ExpectNothingLeft(m);
}

}  // namespace
}  // namespace entropyserve
