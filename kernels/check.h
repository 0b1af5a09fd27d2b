// Check(): for programmer errors only. Nothing a user sends, and no file, may reach a failing Check;
// those return absl::Status (see engine/base/status_macros.h).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <source_location>

namespace entropyserve {

[[noreturn]] inline void CheckFailed(const char* what, const std::source_location& where) {
  std::fprintf(stderr, "%s:%u: check failed: %s\n", where.file_name(), unsigned(where.line()), what);
  std::abort();
}

// Aborts with the caller's file and line unless `ok`. On in every build type.
inline void Check(bool ok, const char* what,
                  const std::source_location& where = std::source_location::current()) {
  if (!ok) [[unlikely]]
    CheckFailed(what, where);
}

}  // namespace entropyserve
