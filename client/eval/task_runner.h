// Asks a server the tasks' prompts under every policy and scores the answers.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/eval/policy_spec.h"
#include "client/eval/record.h"
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

struct TaskRun {
  std::vector<TaskJob> jobs;
  std::vector<PolicySpec> policies;
  uint64_t seed = 1;
  int prompts = 20;  // of every job
  const Haystack* haystack = nullptr;
  bool chat = true;      // with the model's chat template
  int answer_limit = 0;  // most scored tokens of an answer; 0: the task's own
  int concurrency = 1;
  std::string server;  // ServerName()
  v1::GetModelResponse model;
  CallOptions call;
  std::function<bool()> out_of_time;                 // asked before every prompt; empty: never
  std::function<void(int done, int all)> on_prompt;  // after every prompt, one call at a time
};

// Runs what `records` does not hold yet, prompt by prompt over all jobs, so that an end before the
// last one leaves all jobs about equally far. Returns the first failure; what was measured until
// then is in `records`. INVALID_ARGUMENT: a length that no prompt of a task fits.
absl::Status RunTasks(Client* client, const TaskRun& run, RecordFile* records);

}  // namespace entropyserve
