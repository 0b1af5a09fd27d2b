// A server whose file descriptors run out refuses connections, and takes them again later.
#pragma once

#include <cstdint>

namespace entropyserve {

// Lets the process open as many files as the system allows it: shells and systemd start with 1024.
void RaiseFileLimit();

// Connections that were closed at once, for want of a file descriptor, since this was last asked.
int64_t TakeRefusedConnections();

}  // namespace entropyserve
