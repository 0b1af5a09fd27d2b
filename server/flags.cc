#include "server/flags.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "proto/policy_flags.h"
#include "server/convert.h"
#include "server/dense_calibration.h"

namespace entropyserve {
namespace {

absl::Status Require(bool ok, const char* flag, const char* expected) {
  if (ok) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--", flag, ": ", expected));
}

bool InSeconds(double value, double least) { return value >= least && value <= 1e9; }

absl::Status CheckAddress(const std::string& address, const char* flag, bool may_be_empty) {
  if (may_be_empty && address.empty()) return absl::OkStatus();
  if (absl::StartsWith(address, "unix:")) return absl::OkStatus();
  const size_t colon = address.rfind(':');
  absl::StatusOr<int64_t> port = absl::InvalidArgumentError("");
  if (colon != std::string::npos && colon > 0) port = ParseInt(address.substr(colon + 1));
  return Require(port.ok() && *port >= 0 && *port <= 65535, flag,
                 "expected HOST:PORT, e.g. 127.0.0.1:50051");
}

void AddNetworkFlags(FlagSet* set, ServerFlags* flags) {
  set->Section("Network");
  set->Add("listen", &flags->listen, "address of the gRPC service; port 0 picks a free one");
  set->Add("metrics-listen", &flags->metrics_listen, "address of Prometheus' /metrics; empty: off");
  set->Add("health-listen", &flags->health_listen,
           "a second, plaintext address that serves health checks only; empty: off");
  set->Add("port-file", &flags->port_file, "write the gRPC port into this file once listening");
  set->Add("reflection", &flags->reflection, "serve gRPC reflection");
  set->Add("allow-compare", &flags->allow_compare,
           "serve Compare: one text read under two policies; for evaluation");
  set->Add("allow-remote-without-auth", &flags->allow_remote_without_auth,
           "listen beyond loopback although anyone who connects may use the model");
  set->Add("key-file", &flags->key_file,
           "bearer keys, a line each: NAME SHA256-HEX-OF-KEY; empty: no auth");
  set->Add("tls-cert", &flags->tls_cert, "PEM certificate chain; empty: plaintext");
  set->Add("tls-key", &flags->tls_key, "PEM private key of --tls-cert");
  set->Add("tls-client-ca", &flags->tls_client_ca,
           "PEM roots that client certificates must come from");
  set->AddBytes("max-message-bytes", &flags->max_message_bytes,
                "largest request; a prompt of 1M tokens takes 5 to 16 MiB");
  set->Add("max-streams-per-connection", &flags->max_streams_per_connection,
           "calls that one connection may have open");
  set->Add("max-open-streams", &flags->max_open_streams, "Generate calls open at the same time");
  set->Add("default-deadline-seconds", &flags->default_deadline_seconds,
           "deadline of a Generate call that sets none");
  set->Add("max-deadline-seconds", &flags->max_deadline_seconds,
           "longer deadlines are cut to this");
  set->Add("unread-seconds", &flags->unread_seconds,
           "cut off a call whose reader takes nothing of its finished answer for this time, and a "
           "comparison that has waited for its reader for so long in all");
  set->Add("keepalive-seconds", &flags->keepalive_seconds,
           "ping a silent connection after this time");
  set->Add("keepalive-timeout-seconds", &flags->keepalive_timeout_seconds,
           "drop a connection that does not answer a ping");
  set->Add("min-ping-interval-seconds", &flags->min_ping_interval_seconds,
           "cut off clients that ping more often");
}

void AddQueueFlags(FlagSet* set, ServerFlags* flags) {
  set->Section("Queues");
  set->AddBytes("short-prompt-bytes", &flags->short_prompt_bytes,
                "requests up to this size use the short encode lane");
  set->AddBytes("short-lane-bytes", &flags->short_lane_bytes,
                "requests waiting to be tokenized, short lane");
  set->AddBytes("long-lane-bytes", &flags->long_lane_bytes,
                "requests waiting to be tokenized, long lane");
  set->Add("max-queue-requests", &flags->max_queue_requests, "requests waiting for the engine");
  set->Add("max-queue-tokens", &flags->max_queue_tokens, "prompt tokens waiting for the engine");
  set->Add("max-sequences", &flags->max_sequences, "requests running at the same time");
  set->Add("refuse-late-requests", &flags->refuse_late_requests,
           "refuse at once what will not see its first token before its deadline");
  set->Section("Quotas of one key (or client certificate; without auth all callers are one)");
  set->Add("max-key-requests", &flags->max_key_requests,
           "requests queued and running; 0: no limit of its own");
  set->Add("max-key-queue-tokens", &flags->max_key_queue_tokens,
           "prompt tokens waiting for the engine; 0: the same");
  set->Add("max-key-sessions", &flags->max_key_sessions, "sessions, in all tiers; 0: the same");
  set->AddBytes("max-key-session-bytes", &flags->max_key_session_bytes,
                "KV cache of its sessions; 0: the same");
  set->Add("max-key-streams", &flags->max_key_streams,
           "Generate calls open at the same time; 0: the same");
}

void AddEngineFlags(FlagSet* set, ServerFlags* flags) {
  set->Section("Engine");
  set->AddBytes("kv-bytes", &flags->kv_bytes,
                "memory for the KV cache; 0: what the machine can spare");
  set->Add("max-context", &flags->max_context,
           "tokens of prompt, session and answer; 0: the model's own");
  set->Add("step-tokens", &flags->step_tokens,
           "tokens of one engine step; 0: what takes about a second");
  set->Add("lone-chunk-tokens", &flags->lone_chunk_tokens,
           "chunk of a prompt that is read alone; 0: the same");
  set->Add("max-whole-prompt-tokens", &flags->max_whole_prompt_tokens,
           "longest prompt of prefill policy entropy_paper");
  set->Add(
      "calibrate-dense-tokens", &flags->calibrate_dense_tokens,
      "before requests are taken, time dense prefills of 4096, 8192, ... up to this many tokens "
      "(for five minutes at most), with which entropyserve_prefill_speedup_ratio compares; 0: "
      "no such metric");
}

void AddSessionFlags(FlagSet* set, ServerFlags* flags) {
  set->Section("Idle sessions");
  set->Add("session-ttl-seconds", &flags->session_ttl_seconds,
           "drop a session that nobody has used for this long; 0: never");
  set->AddBytes("session-device-bytes", &flags->session_device_bytes,
                "KV cache that idle sessions may hold; 0: what requests leave free");
  set->AddBytes("session-host-bytes", &flags->session_host_bytes,
                "memory for sessions that had to leave the KV cache; 0: none");
  set->Add("session-dir", &flags->session_dir,
           "folder for sessions that had to leave memory, and for all of them at shutdown; servers "
           "of one model may share it; empty: none");
  set->AddBytes("session-dir-bytes", &flags->session_dir_bytes,
                "bytes of files in --session-dir; 0: no limit");
}

absl::Status ValidateSessions(const ServerFlags& flags) {
  RETURN_IF_ERROR(Require(flags.session_ttl_seconds == 0 || InSeconds(flags.session_ttl_seconds, 1),
                          "session-ttl-seconds", "expected 0, or seconds from 1 on"));
  const std::pair<const char*, int64_t> bytes[] = {
      {"session-device-bytes", flags.session_device_bytes},
      {"session-host-bytes", flags.session_host_bytes},
      {"session-dir-bytes", flags.session_dir_bytes}};
  for (const auto& [flag, value] : bytes) {
    RETURN_IF_ERROR(Require(value >= 0, flag, "expected 0 or more"));
  }
  RETURN_IF_ERROR(Require(flags.session_dir_bytes == 0 || !flags.session_dir.empty(),
                          "session-dir-bytes", "needs --session-dir"));
  if (flags.session_dir.empty()) return absl::OkStatus();
  std::error_code error;
  RETURN_IF_ERROR(Require(std::filesystem::is_directory(flags.session_dir, error), "session-dir",
                          "not a folder; make it first"));
  return Require(access(flags.session_dir.c_str(), R_OK | W_OK | X_OK) == 0, "session-dir",
                 "the server may not write into this folder");
}

absl::Status ValidateNetwork(const ServerFlags& flags) {
  RETURN_IF_ERROR(CheckAddress(flags.listen, "listen", false));
  RETURN_IF_ERROR(CheckAddress(flags.metrics_listen, "metrics-listen", true));
  RETURN_IF_ERROR(CheckAddress(flags.health_listen, "health-listen", true));
  const bool has_auth = !flags.key_file.empty() || !flags.tls_client_ca.empty();
  RETURN_IF_ERROR(Require(IsLoopback(flags.listen) || has_auth || flags.allow_remote_without_auth,
                          "listen",
                          "not a loopback address: give --key-file or --tls-client-ca, or "
                          "--allow-remote-without-auth"));
  RETURN_IF_ERROR(Require(flags.tls_cert.empty() == flags.tls_key.empty(), "tls-key",
                          "--tls-cert and --tls-key come together"));
  return Require(flags.tls_client_ca.empty() || !flags.tls_cert.empty(), "tls-client-ca",
                 "needs --tls-cert and --tls-key");
}

absl::Status ValidateCounts(const ServerFlags& flags) {
  RETURN_IF_ERROR(Require(
      flags.max_message_bytes >= 1024 && flags.max_message_bytes <= std::numeric_limits<int>::max(),
      "max-message-bytes", "expected 1K to 2G"));
  RETURN_IF_ERROR(Require(flags.short_lane_bytes >= flags.short_prompt_bytes, "short-lane-bytes",
                          "expected at least --short-prompt-bytes"));
  RETURN_IF_ERROR(Require(flags.long_lane_bytes >= flags.max_message_bytes, "long-lane-bytes",
                          "expected at least --max-message-bytes"));
  const std::pair<const char*, double> positive[] = {
      {"max-streams-per-connection", flags.max_streams_per_connection},
      {"max-open-streams", flags.max_open_streams},
      {"max-queue-requests", flags.max_queue_requests},
      {"max-queue-tokens", static_cast<double>(flags.max_queue_tokens)},
      {"max-sequences", flags.max_sequences},
      {"max-whole-prompt-tokens", static_cast<double>(flags.max_whole_prompt_tokens)}};
  for (const auto& [flag, value] : positive) {
    RETURN_IF_ERROR(Require(value >= 1, flag, "expected at least 1"));
  }
  const std::pair<const char*, double> not_negative[] = {
      {"step-tokens", static_cast<double>(flags.step_tokens)},
      {"lone-chunk-tokens", static_cast<double>(flags.lone_chunk_tokens)},
      {"kv-bytes", static_cast<double>(flags.kv_bytes)},
      {"max-key-requests", static_cast<double>(flags.max_key_requests)},
      {"max-key-queue-tokens", static_cast<double>(flags.max_key_queue_tokens)},
      {"max-key-sessions", static_cast<double>(flags.max_key_sessions)},
      {"max-key-session-bytes", static_cast<double>(flags.max_key_session_bytes)},
      {"max-key-streams", static_cast<double>(flags.max_key_streams)},
      {"max-context", static_cast<double>(flags.max_context)}};
  for (const auto& [flag, value] : not_negative) {
    RETURN_IF_ERROR(Require(value >= 0, flag, "expected 0 or more"));
  }
  const int64_t calibrate = flags.calibrate_dense_tokens;
  RETURN_IF_ERROR(Require(calibrate == 0 || calibrate >= DenseCalibration::kFewestTokens,
                          "calibrate-dense-tokens", "expected 0, or 4096 and more"));
  RETURN_IF_ERROR(Require(flags.max_sequences <= 4096, "max-sequences", "expected 1 to 4096"));
  return Require(flags.threads >= 0 && flags.threads <= 4096, "threads", "expected 0 to 4096");
}

absl::Status ValidateSeconds(const ServerFlags& flags) {
  const std::pair<const char*, double> seconds[] = {
      {"default-deadline-seconds", flags.default_deadline_seconds},
      {"max-deadline-seconds", flags.max_deadline_seconds},
      {"unread-seconds", flags.unread_seconds},
      {"keepalive-seconds", flags.keepalive_seconds},
      {"keepalive-timeout-seconds", flags.keepalive_timeout_seconds},
      {"min-ping-interval-seconds", flags.min_ping_interval_seconds}};
  for (const auto& [flag, value] : seconds) {
    RETURN_IF_ERROR(Require(InSeconds(value, 0.001), flag, "expected seconds, more than 0"));
  }
  RETURN_IF_ERROR(
      Require(InSeconds(flags.drain_seconds, 0), "drain-seconds", "expected seconds, 0 or more"));
  return Require(flags.default_deadline_seconds <= flags.max_deadline_seconds,
                 "default-deadline-seconds", "longer than --max-deadline-seconds");
}

}  // namespace

bool IsLoopback(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const std::string host = address.substr(0, address.rfind(':'));
  return host == "localhost" || host == "[::1]" || absl::StartsWith(host, "127.");
}

FlagSet MakeServerFlagSet(ServerFlags* flags) {
  FlagSet set(
      "entropyserve --model=PATH [flags]\n"
      "Answers long prompts over gRPC (entropyserve.v1.EntropyServe).\n",
      "ENTROPYSERVE_");
  set.Section("Model");
  set.Add("model", &flags->model,
          "a .gguf file, a folder with config.json and safetensors, or synthetic:SHAPE");
  set.Add("model-name", &flags->model_name, "what GetModel answers; empty: the model's own");
  set.AddChoice("dtype", &flags->dtype, {"auto", "f32", "bf16"},
                "type of weights, activations and KV; auto: bf16 where the machine has it");
  set.AddChoice(
      "linear-dtype", &flags->linear_dtype, {"auto", "bf16", "fp8"},
      "type of the layers' linears; auto: as --dtype; fp8: 8-bit floats, on a Hopper GPU");
  set.AddChoice("backend", &flags->backend, {"auto", "cpu", "cuda"}, "where the model runs");
  set.Add("threads", &flags->threads, "CPU threads of the model; 0: one per core");
  AddNetworkFlags(&set, flags);
  AddQueueFlags(&set, flags);
  AddEngineFlags(&set, flags);
  AddSessionFlags(&set, flags);
  set.Section("Defaults of requests");
  v1::Policy shown;
  PolicyToProto(PrefillPolicy(), KvPolicy(), &shown);
  AddPolicyFlags(&set, &flags->policy, &shown);
  set.Add("seed", &flags->seed, "seed of requests that give none; absent: drawn for each");
  set.Section("Life");
  set.Add("drain-seconds", &flags->drain_seconds,
          "after SIGTERM, time for running requests to finish; a second signal hastens");
  set.AddChoice("log-level", &flags->log_level, {"debug", "info", "warning", "error"},
                "least severe line that is logged");
  set.AddChoice("log-format", &flags->log_format, {"text", "json"},
                "key=value lines or JSON objects, on stderr");
  return set;
}

absl::Status Validate(const ServerFlags& flags) {
  RETURN_IF_ERROR(Require(!flags.model.empty(), "model",
                          "required: a .gguf file, or a folder with config.json and safetensors"));
  RETURN_IF_ERROR(ValidateNetwork(flags));
  RETURN_IF_ERROR(ValidateCounts(flags));
  RETURN_IF_ERROR(ValidateSessions(flags));
  return ValidateSeconds(flags);
}

}  // namespace entropyserve
