// The two macros for errors that come from input, files or capacity. The third macro of the
// project, CUDA_CHECK, lives in kernels/cuda.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expr)                                                                    \
  do {                                                                                           \
    if (absl::Status status_from_expr = (expr); !status_from_expr.ok()) return status_from_expr; \
  } while (false)

#define ENTROPYSERVE_CONCAT_INNER(a, b) a##b
#define ENTROPYSERVE_CONCAT(a, b) ENTROPYSERVE_CONCAT_INNER(a, b)
#define ENTROPYSERVE_ASSIGN_OR_RETURN(tmp, lhs, expr) \
  auto tmp = (expr);                                  \
  if (!tmp.ok()) return tmp.status();                 \
  lhs = *std::move(tmp)

// ASSIGN_OR_RETURN(auto x, F());  declares or assigns x from a StatusOr, or returns its status.
#define ASSIGN_OR_RETURN(lhs, expr) \
  ENTROPYSERVE_ASSIGN_OR_RETURN(ENTROPYSERVE_CONCAT(status_or_, __LINE__), lhs, expr)
