// Sessions as a person reads them.
#pragma once

#include <string>
#include <vector>

#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

// A heading and a line per session, columns aligned, ending with a newline. Ids are printed whole:
// they are what the next command needs.
std::string FormatSessions(const std::vector<v1::Session>& sessions);

}  // namespace entropyserve
