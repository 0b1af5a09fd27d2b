// Token ids to ask with. Prompts do not repeat, so that nothing a server may remember helps it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"

namespace entropyserve {

class PromptSource {
 public:
  // Ids drawn at random from `vocabulary`.
  static PromptSource Random(std::vector<int32_t> vocabulary);
  // A window of `text` at a random place; it goes on at the text's start.
  static PromptSource Windows(std::vector<int32_t> text);

  // The same for the same seed.
  std::vector<int32_t> Make(uint64_t seed, int64_t tokens) const;

 private:
  bool windows_ = false;
  std::vector<int32_t> ids_;  // never empty
};

// Every id of the served vocabulary that is plain text: without control tokens, found by what
// Detokenize leaves out, and without the model's end and BOS. The server's error.
absl::StatusOr<std::vector<int32_t>> OrdinaryIds(const v1::GetModelResponse& model, Client* client);

}  // namespace entropyserve
