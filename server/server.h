// The listening side: ports, transport limits, TLS, health and reflection around the service.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace entropyserve {

class HealthState;
class Log;
class ServiceCore;

struct ServerOptions {
  std::string listen = "127.0.0.1:0";
  std::string health_listen;  // empty: none
  bool reflection = false;
  int max_message_bytes = 32 << 20;
  int max_streams_per_connection = 256;
  double keepalive_seconds = 60;
  double keepalive_timeout_seconds = 20;
  double min_ping_interval_seconds = 10;
  std::string tls_cert, tls_key, tls_client_ca;  // paths; empty: plaintext
};

// Sends gRPC's and protobuf's own messages to `log`, which outlives the process' last call; they go
// to stderr otherwise. For main.
void RouteLibraryLogs(Log* log);

class Server {
 public:
  // `core` and `health` outlive the server. UNAVAILABLE: an address cannot be bound, or a unix:
  // socket is in use. NOT_FOUND: a TLS file.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       ServiceCore* core, HealthState* health);
  virtual ~Server() = default;

  virtual int port() const = 0;         // of the service; 0 for a unix socket
  virtual int health_port() const = 0;  // 0: no separate one

  // Refuses new connections, cancels the calls that are left after `grace_seconds`, returns when
  // none is.
  virtual void Shutdown(double grace_seconds) = 0;
};

}  // namespace entropyserve
