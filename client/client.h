// A client of entropyserve.v1: typed calls with deadlines, retries and cancellation. Errors carry
// the server's code and message; engine/base/status_details.h reads retry advice and reasons from
// them.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

struct ClientOptions {
  std::string server = "127.0.0.1:50051";
  std::string api_key;  // sent as a bearer key; empty: none
  // Sent with every call as entropyserve-affinity: a balancer in front of several servers keeps
  // calls of one value on one server (deploy/envoy). Chosen before a session is created; empty:
  // none.
  std::string affinity;
  std::string tls_ca;                // PEM file of roots; empty: plaintext
  std::string tls_cert, tls_key;     // PEM files of a client certificate, for mTLS
  int max_message_bytes = 64 << 20;  // of answers; traces of long prompts are large
  // Attempts of a call in all. Tried again: RESOURCE_EXHAUSTED with retry advice, and UNAVAILABLE,
  // as long as nothing of the answer has arrived.
  int max_attempts = 5;
};

// Ends the calls it was given to. Thread-safe.
class CancelToken {
 public:
  CancelToken();
  ~CancelToken();
  void Cancel();
  bool cancelled() const;

 private:
  friend class GrpcClient;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct CallOptions {
  double deadline_seconds = 0;    // of all attempts together; 0: none
  CancelToken* cancel = nullptr;  // outlives the call
};

// Thread-safe; calls block.
class Client {
 public:
  // Does not wait for a connection. NOT_FOUND: a TLS file. INVALID_ARGUMENT: half a client
  // certificate.
  static absl::StatusOr<std::unique_ptr<Client>> Create(const ClientOptions& options);
  virtual ~Client() = default;

  // Calls `on_event` for every event, on this thread; the last one is `finished`.
  virtual absl::Status Generate(const v1::GenerateRequest& request,
                                const std::function<void(const v1::GenerateEvent&)>& on_event,
                                const CallOptions& options = {}) = 0;
  virtual absl::Status Compare(const v1::CompareRequest& request,
                               const std::function<void(const v1::CompareEvent&)>& on_event,
                               const CallOptions& options = {}) = 0;

  virtual absl::StatusOr<v1::Session> CreateSession(const CallOptions& options = {}) = 0;
  virtual absl::StatusOr<v1::Session> GetSession(const std::string& id,
                                                 const CallOptions& options = {}) = 0;
  virtual absl::StatusOr<v1::ListSessionsResponse> ListSessions(
      const CallOptions& options = {}) = 0;
  virtual absl::StatusOr<v1::Session> ForkSession(const std::string& id,
                                                  const CallOptions& options = {}) = 0;
  virtual absl::Status DeleteSession(const std::string& id, const CallOptions& options = {}) = 0;

  virtual absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request,
                                                        const CallOptions& options = {}) = 0;
  virtual absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request,
                                                            const CallOptions& options = {}) = 0;
  virtual absl::StatusOr<v1::GetModelResponse> GetModel(const CallOptions& options = {}) = 0;
  virtual absl::StatusOr<v1::GetServerResponse> GetServer(const CallOptions& options = {}) = 0;
};

}  // namespace entropyserve
