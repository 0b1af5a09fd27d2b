// Check(): for programmer errors only. Nothing a user sends, and no file, may reach a failing Check;
// those return absl::Status (see engine/base/status_macros.h).
#pragma once

#include <cstdio>
#include <cstdlib>

namespace entropyserve {

[[noreturn]] inline void CheckFailed(const char* what, const char* file, int line) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, what);
  std::abort();
}

// Aborts with the caller's file and line unless `ok`. On in every build type. (The builtins stand in
// for std::source_location, which clang 14 does not have.)
inline void Check(bool ok, const char* what, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  if (!ok) [[unlikely]]
    CheckFailed(what, file, line);
}

}  // namespace entropyserve
