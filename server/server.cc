#include "server/server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/impl/service_type.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/read_file.h"
#include "engine/base/status_macros.h"
#include "server/health.h"
#include "server/log.h"
#include "server/service.h"
#include "server/service_core.h"

namespace entropyserve {
namespace {

int Milliseconds(double seconds) { return static_cast<int>(std::min(seconds * 1000, 2e9)); }

absl::StatusOr<std::string> ReadPem(const std::string& path, const char* flag) {
  absl::StatusOr<std::string> text = ReadFile(path);
  if (text.ok()) return text;
  return absl::NotFoundError(absl::StrCat("--", flag, ": ", text.status().message()));
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> Credentials(const ServerOptions& options) {
  if (options.tls_cert.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions ssl;
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  ASSIGN_OR_RETURN(pair.cert_chain, ReadPem(options.tls_cert, "tls-cert"));
  ASSIGN_OR_RETURN(pair.private_key, ReadPem(options.tls_key, "tls-key"));
  ssl.pem_key_cert_pairs.push_back(std::move(pair));
  if (!options.tls_client_ca.empty()) {
    ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPem(options.tls_client_ca, "tls-client-ca"));
    ssl.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(ssl);
}

void ConfigureTransport(const ServerOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(options.max_message_bytes);
  // Two servers on one port would share its connections; a busy port is an error here.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_streams_per_connection);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, Milliseconds(options.keepalive_seconds));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                              Milliseconds(options.keepalive_timeout_seconds));
  // A long prefill sends nothing for minutes: pings without data are welcome, in both directions.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              Milliseconds(options.min_ping_interval_seconds));
}

// gRPC removes the file of a unix: address before it binds, whoever listens there.
absl::Status CheckSocketIsFree(const std::string& address, const char* flag) {
  constexpr char kScheme[] = "unix:";
  if (!absl::StartsWith(address, kScheme)) return absl::OkStatus();
  std::string path = address.substr(std::strlen(kScheme));
  if (absl::StartsWith(path, "//")) path = path.substr(2);
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.size() >= sizeof(name.sun_path)) return absl::OkStatus();  // gRPC refuses it
  std::memcpy(name.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return absl::OkStatus();
  const bool refused = connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) != 0 &&
                       errno != EAGAIN;  // EAGAIN: it listens, and its queue is full
  close(fd);
  if (refused) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("--", flag, ": another process listens on ", address));
}

class GrpcServer final : public Server {
 public:
  GrpcServer(ServiceCore* core, HealthState* health)
      : service_(MakeService(core)),
        health_service_(MakeHealthService(health)),
        probe_service_(MakeHealthService(health)) {}

  ~GrpcServer() override { Shutdown(0); }

  absl::Status Listen(const ServerOptions& options) {
    ASSIGN_OR_RETURN(const auto credentials, Credentials(options));
    RETURN_IF_ERROR(CheckSocketIsFree(options.listen, "listen"));
    RETURN_IF_ERROR(CheckSocketIsFree(options.health_listen, "health-listen"));
    {
      grpc::ServerBuilder builder;
      ConfigureTransport(options, &builder);
      builder.AddListeningPort(options.listen, credentials, &port_);
      builder.RegisterService(service_.get());
      builder.RegisterService(health_service_.get());
      server_ = Build(&builder, options.reflection);
    }
    if (server_ == nullptr) {
      return absl::UnavailableError(absl::StrCat("--listen: cannot listen on ", options.listen));
    }
    if (options.health_listen.empty()) return absl::OkStatus();
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddListeningPort(options.health_listen, grpc::InsecureServerCredentials(),
                             &health_port_);
    builder.RegisterService(probe_service_.get());
    health_server_ = Build(&builder, false);
    if (health_server_ == nullptr) {
      return absl::UnavailableError(
          absl::StrCat("--health-listen: cannot listen on ", options.health_listen));
    }
    return absl::OkStatus();
  }

  int port() const override { return port_; }
  int health_port() const override { return health_port_; }

  void Shutdown(double grace_seconds) override {
    const auto deadline =
        std::chrono::system_clock::now() + std::chrono::milliseconds(Milliseconds(grace_seconds));
    for (std::unique_ptr<grpc::Server>* server : {&server_, &health_server_}) {
      if (*server == nullptr) continue;
      (*server)->Shutdown(deadline);
      (*server)->Wait();
      server->reset();
    }
  }

 private:
  // Linking the reflection library adds its plugin to every builder of the process; this decides.
  class ReflectionOption final : public grpc::ServerBuilderOption {
   public:
    explicit ReflectionOption(bool enabled) : enabled_(enabled) {}
    void UpdateArguments(grpc::ChannelArguments*) override {}
    void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
      grpc::reflection::ProtoServerReflectionPlugin ours;
      std::erase_if(*plugins, [&](const auto& plugin) { return plugin->name() == ours.name(); });
      if (!enabled_) return;
      plugins->push_back(std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>());
    }

   private:
    const bool enabled_;
  };

  static std::unique_ptr<grpc::Server> Build(grpc::ServerBuilder* builder, bool reflection) {
    builder->SetOption(std::make_unique<ReflectionOption>(reflection));
    return builder->BuildAndStart();
  }

  const std::unique_ptr<grpc::Service> service_, health_service_, probe_service_;
  std::unique_ptr<grpc::Server> server_, health_server_;
  int port_ = 0, health_port_ = 0;
};

// The libraries take plain functions, so what they call has to be reachable without an argument.
Log* library_log = nullptr;

void GrpcLog(gpr_log_func_args* args) { library_log->Debug("grpc", {{"message", args->message}}); }

void ProtobufLog(google::protobuf::LogLevel, const char*, int, const std::string& message) {
  library_log->Debug("protobuf", {{"message", message}});
}

}  // namespace

void RouteLibraryLogs(Log* log) {
  library_log = log;
  gpr_set_log_function(GrpcLog);
  google::protobuf::SetLogHandler(ProtobufLog);
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      ServiceCore* core, HealthState* health) {
  auto server = std::make_unique<GrpcServer>(core, health);
  RETURN_IF_ERROR(server->Listen(options));
  return std::unique_ptr<Server>(std::move(server));
}

}  // namespace entropyserve
