// Flags for the prompt of a Generate request.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/base/flag_set.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

struct PromptFlags {
  std::string file, system, token_ids;
  bool raw = false;
  std::optional<bool> thinking;
};

// Adds --file, --raw and so on; `prompt` and `request` outlive `flags`.
void AddPromptFlags(FlagSet* flags, PromptFlags* prompt, v1::GenerateRequest* request);

// Sets the request's input from the flags and at most one argument: the prompt, or the question
// about --file; without either, standard input. NOT_FOUND: no such file. INVALID_ARGUMENT:
// --token-ids, or text that is not UTF-8.
absl::Status FillPrompt(const PromptFlags& prompt, const std::vector<std::string>& positional,
                        v1::GenerateRequest* request);

}  // namespace entropyserve
