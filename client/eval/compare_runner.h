// Compares policies with dense attention on a text, prediction by prediction, through Compare.
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

namespace entropyserve {

struct CompareRun {
  std::string text;  // name
  std::vector<std::vector<int32_t>> windows;
  std::vector<PolicySpec> policies;  // the reference among them is left out: it is in every call
  int64_t score = 0;                 // positions compared before the decoded ones
  int64_t decode = 0;                // last tokens, fed one at a time as if they were the answer
  std::string server;                // ServerName()
  CallOptions call;
  std::function<bool()> out_of_time;  // asked before every comparison; empty: never
  std::function<void(int done, int all)> on_window;
};

// Windows of `length` tokens that do not overlap, spread over the text, at most `most` of them.
// `bos`, where the text begins with it, begins every window. INVALID_ARGUMENT: the text is shorter
// than one window.
absl::StatusOr<std::vector<std::vector<int32_t>>> CutWindows(const std::vector<int32_t>& ids,
                                                             int32_t bos, int64_t length,
                                                             int64_t most);

// Runs what `records` does not hold yet, window by window over all policies. Returns the first
// failure; what was measured until then is in `records`.
absl::Status RunCompare(Client* client, const CompareRun& run, RecordFile* records);

}  // namespace entropyserve
