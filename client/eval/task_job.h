// Which tasks are asked, in which form and at which length.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "client/eval/task.h"

namespace entropyserve {

// How a task's parts reach the model.
enum class Variant {
  kPlain,   // one prompt
  kHidden,  // text first, read and compressed in a session; the question in its next turn
  kForked,  // the same, read once per prefill policy with the whole cache kept and forked for every
            // KV policy, which compresses in the question's turn
  kTurns,   // one prompt and further questions in the same session; those are scored
};

struct TaskJob {
  const Task* task = nullptr;
  Variant variant = Variant::kPlain;
  int64_t length = 0;  // prompt, answer's beginning and answer, tokens

  std::string name() const;  // "vt", "vt/hidden"
};

// "niah_single_1,vt/hidden,ruler": tasks, "ruler" (its eleven) or "all", each with "/hidden",
// "/forked" or "/turns" or without. INVALID_ARGUMENT: an unknown name, or /turns of a task that has
// one question.
absl::StatusOr<std::vector<TaskJob>> ParseTasks(std::string_view text,
                                                const std::vector<int64_t>& lengths);

}  // namespace entropyserve
