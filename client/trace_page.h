// What a traced request read and kept, as one self-contained HTML page: no script, font or image
// from elsewhere, and a content security policy that forbids the browser to fetch any.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

struct TraceReport {
  std::vector<v1::LayerTrace> layers;  // layer 0, 1, ...; empty: the request had no trace
  v1::Finished finished;
  std::string prompt, answer;  // shown where not empty
};

// Adds what an event of Generate says; events without a trace, text or receipt change nothing.
// INVALID_ARGUMENT: a layer out of order.
absl::Status AddEvent(const v1::GenerateEvent& event, TraceReport* report);

// INVALID_ARGUMENT: layers are missing, or have another shape than they claim or layer 0 has.
absl::Status CheckComplete(const TraceReport& report);

// For each layer and kv head, in order: whether all its entropies stayed under the policy's e_t, as
// the receipt's rigid_share counts it; false where none is judged. `judged`: how many were.
std::vector<bool> RigidHeads(const TraceReport& report, int* judged);

// The page. Whatever the report holds is escaped. The report is complete.
std::string TracePage(const TraceReport& report);

}  // namespace entropyserve
