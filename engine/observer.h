// What the engine tells whoever measures it, as it happens; moments' values are in EngineStats.
#pragma once

#include <cstdint>
#include <span>

#include "engine/receipt.h"

namespace entropyserve {

// Where an idle session's cache is.
enum class SessionTier : uint8_t { kDevice, kHost, kDisk };
inline constexpr int kSessionTiers = 3;

// Why a session left a tier.
enum class SessionMove : uint8_t {
  kPressure,  // a request needed its pages
  kLimit,     // its tier, or its owner, had more bytes than allowed
  kRestored,  // it was used again
  kExpired,   // idle for too long: dropped
  kLost,      // damaged, or no tier could take it: dropped
  kDeleted,   // by its owner
};

struct StepInfo {
  double seconds = 0;
  int64_t prefill_tokens = 0;
  int64_t decodes = 0;   // sequences that decode a token
  int64_t prefills = 0;  // sequences that prefill
};

struct PrefillInfo {
  const Receipt* receipt = nullptr;  // prefill's part is filled in
  // Entropy of the last full segment of each (layer, kv head) that judged one, nats.
  // Empty when another rule than `entropy` chose.
  std::span<const float> entropy;
  double step_seconds = 0;  // of the steps that read the prompt; the time between them is not in it
  bool alone = false;       // those steps did nothing else
};

// Called on the engine thread; must not block nor call the engine.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepInfo& /*step*/) {}
  virtual void OnPrefill(const PrefillInfo& /*prefill*/) {}
  virtual void OnCompress(double /*seconds*/, int64_t /*bytes_before*/, int64_t /*bytes_after*/) {}
  // `to` equals `from` when it was dropped.
  virtual void OnSessionMove(SessionTier /*from*/, SessionTier /*to*/, SessionMove /*why*/) {}
};

}  // namespace entropyserve
