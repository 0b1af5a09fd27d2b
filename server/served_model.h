// The model behind the service: what a request needs, constant once it is served.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/policy/policy.h"
#include "engine/text/chat_template.h"
#include "engine/text/tokenizer.h"
#include "engine/weights/model_config.h"

namespace entropyserve {

struct ServedModel {
  std::string name;
  ModelConfig config;
  std::string dtype;         // "f32", "bf16"
  std::string linear_dtype;  // the same, or "fp8"
  std::string backend;       // "cpu", "cuda"
  std::string gpu_unused;    // see BackendChoice
  int64_t parameters = 0;
  int64_t context_tokens = 0;  // served; at most config.context
  EngineOptions options;

  std::shared_ptr<Tokenizer> tokenizer;
  // Not OK: `messages` is refused with this status, `text` works.
  absl::StatusOr<ChatTemplate> chat = absl::FailedPreconditionError("no chat template");

  // Defaults of requests.
  PrefillPolicy prefill;
  KvPolicy kv;
  std::optional<uint64_t> seed;

  std::unique_ptr<Engine> engine;  // last: it uses the rest

  // Ids that a request may name.
  int32_t vocab_size() const { return config.vocab; }
};

}  // namespace entropyserve
