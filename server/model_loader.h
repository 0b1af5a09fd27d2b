// From flags to a model that can be served.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/flags.h"
#include "server/served_model.h"

namespace entropyserve {

// Fills in what requests get that do not say. INVALID_ARGUMENT names the policy flag.
absl::Status SetRequestDefaults(const ServerFlags& flags, ServedModel* model);

// Opens the checkpoint and closes it again: finds a missing or foreign file before anything else is
// started.
absl::Status CheckModelFiles(const ServerFlags& flags);

// Loads the checkpoint and makes its engine; the first forward pass is the caller's. Takes as long
// as the weights take to read. Errors are SetRequestDefaults' and LoadEngine's.
// on_device_error: see MakeBackend.
absl::StatusOr<std::unique_ptr<ServedModel>> LoadServedModel(
    const ServerFlags& flags, std::shared_ptr<EngineObserver> observer,
    std::function<void(const std::string&)> on_device_error);

}  // namespace entropyserve
