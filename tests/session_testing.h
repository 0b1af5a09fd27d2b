// Conversations on the fake model that know what must come next, for tests of session tiers.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/base/status_details.h"
#include "tests/manual_engine.h"

namespace entropyserve {

// An empty folder, removed with everything in it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = testing::TempDir() + "/sessions.XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }
  // Files of any server or of none, in all.
  int SessionFiles() const {
    int n = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path_)) {
      const std::string extension = entry.path().extension();
      n += extension == ".session" || extension == ".tmp";
    }
    return n;
  }

 private:
  std::string path_;
};

class TurnSink final : public EventSink {
 public:
  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent event) override {
    ids.insert(ids.end(), event.ids.begin(), event.ids.end());
    if (on_token) on_token();
  }
  void OnFinished(FinishedEvent event) override {
    end = std::move(event);
    done = true;
  }
  std::vector<int32_t> ids;
  FinishedEvent end;
  std::atomic<bool> done{false};
  std::function<void()> on_token;
};

// A session and what has been said in it.
struct Conversation {
  std::string owner, id;
  std::vector<int32_t> history;
};

inline EngineRequest TurnRequest(const Conversation& talk, std::vector<int32_t> prompt,
                                 int64_t max_new) {
  EngineRequest r;
  r.prompt = std::move(prompt);
  r.session_id = talk.id;
  r.owner = talk.owner;
  r.sampling.temperature = 0;
  r.sampling.max_new_tokens = max_new;
  r.prefill = *PrefillPreset("full", "test");
  r.prefill.params.segment = 128;
  r.kv = *KvPreset("full", "test");
  return r;
}

inline std::shared_ptr<TurnSink> Submit(Engine* engine, EngineRequest request) {
  auto sink = std::make_shared<TurnSink>();
  const auto id = engine->Submit(std::move(request), sink);
  EXPECT_TRUE(id.ok()) << id.status();
  return sink;
}

// Steps until the request has ended. False: it never does.
inline bool RunToEnd(ManualEngine& m, const TurnSink& sink) {
  constexpr int kMostSteps = 20000;
  for (int i = 0; i < kMostSteps && !sink.done; ++i) m.engine->RunOnce();
  return sink.done;
}

// The tokens that must follow, given everything said; they are appended to the history.
inline std::vector<int32_t> Expected(Conversation* talk, const std::vector<int32_t>& prompt,
                                     int64_t n) {
  talk->history.insert(talk->history.end(), prompt.begin(), prompt.end());
  std::vector<int32_t> expected;
  for (int64_t i = 0; i < n; ++i) {
    expected.push_back(NextFakeToken(talk->history));
    talk->history.push_back(expected.back());
  }
  return expected;
}

// One turn, whose answer must be the one that the whole conversation calls for.
inline void Say(ManualEngine& m, Conversation* talk, std::vector<int32_t> prompt, int64_t n = 3) {
  auto sink = Submit(m.engine.get(), TurnRequest(*talk, prompt, n));
  ASSERT_TRUE(RunToEnd(m, *sink));
  ASSERT_TRUE(sink->end.status.ok()) << sink->end.status;
  ASSERT_EQ(sink->ids, Expected(talk, prompt, n));
  ASSERT_EQ(m.model->corruptions(), 0);
}

inline Conversation Begin(ManualEngine& m, const std::string& owner, std::vector<int32_t> prompt,
                          int64_t n = 3) {
  const auto info = m.engine->CreateSession(owner);
  EXPECT_TRUE(info.ok()) << info.status();
  Conversation talk{owner, info.ok() ? info->id : "", {}};
  Say(m, &talk, std::move(prompt), n);
  return talk;
}

inline SessionTier TierOf(ManualEngine& m, const Conversation& talk) {
  const auto info = m.engine->GetSession(talk.owner, talk.id);
  EXPECT_TRUE(info.ok()) << info.status();
  return info.ok() ? info->tier : SessionTier::kDevice;
}

inline void ExpectLost(ManualEngine& m, const Conversation& talk) {
  const absl::Status status = m.engine->GetSession(talk.owner, talk.id).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(Reason(status), kSessionLost);
  auto sink = Submit(m.engine.get(), TurnRequest(talk, {5}, 1));
  ASSERT_TRUE(RunToEnd(m, *sink));
  EXPECT_EQ(Reason(sink->end.status), kSessionLost) << sink->end.status;
  EXPECT_TRUE(sink->ids.empty());
}

}  // namespace entropyserve
