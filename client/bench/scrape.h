// The server's own counters around a run, from its Prometheus endpoint.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace entropyserve {

// Of every counter, and of every histogram's and summary's _sum and _count: its value under its
// name and labels as printed. What does not parse is left out.
std::map<std::string, double> ParseCounters(std::string_view exposition);

// What grew, without what did not. A counter that fell was started anew: its value counts.
std::map<std::string, double> Growth(const std::map<std::string, double>& before,
                                     const std::map<std::string, double>& after);

// GET, http or https. UNAVAILABLE with the reason.
absl::StatusOr<std::string> FetchUrl(const std::string& url);

}  // namespace entropyserve
