// How much memory this process may still take.
#pragma once

#include <cstddef>

namespace entropyserve::cpu {

// The least of what the machine has available (MemAvailable) and what the process's control group
// leaves (memory.max - memory.current, on every level that is visible). Half the machine's memory
// when neither is known.
size_t AvailableMemory();

}  // namespace entropyserve::cpu
