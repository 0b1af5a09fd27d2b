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
#include "client/eval/task_job.h"

namespace entropyserve {

struct TaskRun {
  std::vector<TaskJob> jobs;
  std::vector<PolicySpec> policies;
  uint64_t seed = 1;
  int prompts = 20;  // of every job
  const Haystack* haystack = nullptr;
  bool chat = true;           // with the model's chat template
  bool give_answers = false;  // the right ones, token by token, and ask how likely they were
  int answer_limit = 0;       // most scored tokens of an answer; 0: the task's own
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
