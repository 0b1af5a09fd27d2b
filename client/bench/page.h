// A bench's results as one self-contained HTML page, under the same rules as trace_page.h: no
// script, font or image from elsewhere, and a content security policy that forbids to fetch any.
#pragma once

#include <string>

#include "client/bench/report.h"

namespace entropyserve {

// Whatever the report holds is escaped.
std::string BenchPage(const BenchReport& report);

}  // namespace entropyserve
