#include "server/status.h"

#include <cmath>
#include <optional>
#include <string>

#include "engine/base/status_details.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace entropyserve {

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const bool internal = status.code() == absl::StatusCode::kInternal ||
                        status.code() == absl::StatusCode::kUnknown ||
                        status.code() == absl::StatusCode::kDataLoss;
  const std::string message = internal ? "internal error" : std::string(status.message());
  const auto code = static_cast<grpc::StatusCode>(status.code());  // the same numbers

  google::rpc::Status rich;
  if (const std::optional<double> seconds = RetryAfterSeconds(status)) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(static_cast<int64_t>(*seconds));
    retry.mutable_retry_delay()->set_nanos(
        static_cast<int32_t>((*seconds - std::floor(*seconds)) * 1e9));
    rich.add_details()->PackFrom(retry);
  }
  if (const std::string reason = Reason(status); !reason.empty()) {
    google::rpc::ErrorInfo info;
    info.set_reason(reason);
    info.set_domain("entropyserve");
    rich.add_details()->PackFrom(info);
  }
  if (rich.details().empty()) return {code, message};
  rich.set_code(code);
  rich.set_message(message);
  return {code, message, rich.SerializeAsString()};
}

}  // namespace entropyserve
