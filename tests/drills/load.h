// Load on a server, and what is made of its times.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "tests/drills/call.h"
#include "tests/drills/server_process.h"

namespace entropyserve {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point begin);

// The q-th part of the sorted values; 0.5 is the median. 0 of nothing.
double Quantile(std::vector<double> values, double q);

// Greedy, exactly max_new tokens.
v1::GenerateRequest LoadRequest(int prompt_bytes, int max_new);

// `callers` threads call for `seconds`, or until the server is gone, each its next call after its
// last.
std::vector<std::unique_ptr<Call>> ClosedLoop(ServerProcess* server, int callers,
                                              const v1::GenerateRequest& request, double seconds);

}  // namespace entropyserve
