#include "client/channel.h"

#include <google/protobuf/any.pb.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/read_file.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace entropyserve {
namespace {

// An absent file is an empty text: gRPC's own default.
absl::StatusOr<std::string> ReadPem(const char* flag, const std::string& path) {
  if (path.empty()) return std::string();
  absl::StatusOr<std::string> text = ReadFile(path);
  if (text.ok()) return text;
  return absl::NotFoundError(absl::StrCat(flag, ": ", text.status().message()));
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> Credentials(
    const ClientOptions& options) {
  if (options.tls_cert.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls-cert and --tls-key: a client certificate needs both");
  }
  if (options.tls_ca.empty() && options.tls_cert.empty()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions ssl;
  ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPem("--tls-ca", options.tls_ca));
  ASSIGN_OR_RETURN(ssl.pem_cert_chain, ReadPem("--tls-cert", options.tls_cert));
  ASSIGN_OR_RETURN(ssl.pem_private_key, ReadPem("--tls-key", options.tls_key));
  return grpc::SslCredentials(ssl);
}

// A key file made with `echo` ends in a newline, on which gRPC would abort.
absl::Status CheckHeader(const char* flag, const std::string& value) {
  if (std::all_of(value.begin(), value.end(), [](char c) { return c >= 0x20 && c <= 0x7e; }))
    return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(flag, ": it holds a character that a header cannot carry, such as a newline"));
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ClientOptions& options,
                                                           grpc::ChannelArguments arguments) {
  RETURN_IF_ERROR(CheckHeader("--api-key", options.api_key));
  RETURN_IF_ERROR(CheckHeader("--affinity", options.affinity));
  ASSIGN_OR_RETURN(const auto credentials, Credentials(options));
  arguments.SetMaxReceiveMessageSize(options.max_message_bytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);  // a long prefill is silent for minutes
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);         // retries are ours: they follow RetryInfo
  return grpc::CreateCustomChannel(options.server, credentials, arguments);
}

void AddHeaders(const ClientOptions& options, grpc::ClientContext* context) {
  if (!options.api_key.empty())
    context->AddMetadata("authorization", absl::StrCat("Bearer ", options.api_key));
  if (!options.affinity.empty()) context->AddMetadata("entropyserve-affinity", options.affinity);
}

absl::Status ToAbsl(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return result;
  for (const google::protobuf::Any& detail : rich.details()) {
    google::rpc::RetryInfo retry;
    google::rpc::ErrorInfo info;
    if (detail.UnpackTo(&retry)) {
      result = WithRetryAfter(result, static_cast<double>(retry.retry_delay().seconds()) +
                                          retry.retry_delay().nanos() * 1e-9);
    } else if (detail.UnpackTo(&info)) {
      result = WithReason(result, info.reason().c_str());
    }
  }
  return result;
}

}  // namespace entropyserve
