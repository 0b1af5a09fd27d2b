// What the tests of session tiers share: options that move idle sessions at once, and what is left.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/session_testing.h"

namespace entropyserve {

using Tier = SessionTier;

inline std::vector<int32_t> Prompt(int first, int n) {
  std::vector<int32_t> prompt(n);
  for (int i = 0; i < n; ++i) prompt[i] = 2 + (first * 37 + i * 11) % 900;
  return prompt;
}

inline constexpr int64_t kPages = 2000;

// Everything idle leaves the pool at once.
inline EngineOptions OutOfThePool(int64_t host_bytes, const std::string& dir) {
  EngineOptions options;
  options.session_device_bytes = 1;
  options.session_host_bytes = host_bytes;
  options.session_dir = dir;
  return options;
}

inline void ExpectNothingLeft(ManualEngine& m) {
  const EngineStats stats = m.engine->Stats();
  EXPECT_EQ(stats.sessions, 0);
  EXPECT_EQ(stats.pages_used, 0) << "every page returns";
  EXPECT_EQ(m.pool->reserved(), 0);
  EXPECT_EQ(m.model->corruptions(), 0);
  for (int tier = 0; tier < kSessionTiers; ++tier) {
    EXPECT_EQ(stats.tier_sessions[tier], 0);
    EXPECT_EQ(stats.tier_bytes[tier], 0);
  }
  EXPECT_EQ(stats.memory.back().name, "session_host");
  EXPECT_EQ(stats.memory.back().bytes, 0);
}

inline void Delete(ManualEngine& m, const Conversation& talk) {
  const absl::Status status = m.engine->DeleteSession(talk.owner, talk.id);
  EXPECT_TRUE(status.ok()) << status;
  m.engine->RunOnce();
}

// Its owner's cleaning up succeeds, and then there never was such a session.
inline void DeleteLost(ManualEngine& m, const Conversation& talk) {
  ExpectLost(m, talk);
  Delete(m, talk);
  for (const absl::Status& status : {m.engine->GetSession(talk.owner, talk.id).status(),
                                     m.engine->DeleteSession(talk.owner, talk.id)}) {
    EXPECT_TRUE(absl::IsNotFound(status)) << status;
  }
}

}  // namespace entropyserve
