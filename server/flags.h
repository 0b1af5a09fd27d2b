// The server's flags. --help prints them; each also comes from the environment and from a file.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/base/flag_set.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

struct ServerFlags {
  // Model.
  std::string model;
  std::string model_name;
  std::string dtype = "auto";
  std::string linear_dtype = "auto";
  std::string backend = "auto";
  int threads = 0;

  // Network.
  std::string listen = "127.0.0.1:50051";
  std::string metrics_listen = "127.0.0.1:9464";
  std::string health_listen;
  std::string port_file;
  bool reflection = false;
  bool allow_compare = false;
  bool allow_remote_without_auth = false;
  std::string key_file;
  std::string tls_cert, tls_key, tls_client_ca;

  // Limits of a call. A prompt of 1M tokens takes about 5 MiB as text or as packed ids, up to 16
  // MiB in scripts whose tokens are long.
  int64_t max_message_bytes = int64_t{32} << 20;
  int max_streams_per_connection = 256;
  int max_open_streams = 4096;
  double default_deadline_seconds = 3600;  // a 1M-token prompt on a slow machine
  double max_deadline_seconds = 24 * 3600;
  double unread_seconds = 60;
  double keepalive_seconds = 60;  // finds dead readers behind NATs, which forget after minutes
  double keepalive_timeout_seconds = 20;
  double min_ping_interval_seconds = 10;  // clients that ping faster are cut off

  // Queues.
  int64_t short_prompt_bytes = 64 << 10;
  int64_t short_lane_bytes = int64_t{16} << 20;
  int64_t long_lane_bytes = int64_t{128} << 20;
  int max_queue_requests = 1024;
  int64_t max_queue_tokens = 8 << 20;
  int max_sequences = 64;
  int64_t max_key_requests = 0;
  int64_t max_key_queue_tokens = 0;
  int64_t max_key_sessions = 0;
  int64_t max_key_session_bytes = 0;
  int64_t max_key_streams = 0;
  bool refuse_late_requests = false;

  // Engine.
  int64_t kv_bytes = 0;
  int64_t max_context = 0;
  int64_t step_tokens = 0;
  int64_t lone_chunk_tokens = 0;
  int64_t max_whole_prompt_tokens = 32768;
  int64_t calibrate_dense_tokens = 0;

  // Idle sessions.
  double session_ttl_seconds = 0;
  int64_t session_device_bytes = 0;
  int64_t session_host_bytes = int64_t{1} << 30;  // a few conversations of a large model
  std::string session_dir;
  int64_t session_dir_bytes = 0;

  // Defaults of requests.
  v1::Policy policy;
  std::optional<int64_t> seed;

  // Life.
  double drain_seconds = 30;  // Kubernetes' own grace by default
  std::string log_level = "info";
  std::string log_format = "text";
};

// A table over `flags`, which outlives it.
FlagSet MakeServerFlagSet(ServerFlags* flags);

// INVALID_ARGUMENT names the flag: --model missing, a number out of range, a public address without
// auth, a --session-dir that cannot be written to.
absl::Status Validate(const ServerFlags& flags);

// True when only this machine can reach `address` ("127.0.0.1:50051", "[::1]:1", "localhost:1",
// "unix:/path").
bool IsLoopback(const std::string& address);

}  // namespace entropyserve
