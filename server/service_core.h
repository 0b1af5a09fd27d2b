// What the calls of the service share: the model, the encode lanes, the limits, the calls that are
// open. No gRPC here.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/mutex.h"
#include "server/auth.h"
#include "server/encode_lanes.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/served_model.h"

namespace entropyserve {

struct ServiceLimits {
  int64_t max_message_bytes = int64_t{32} << 20;
  int64_t max_open_streams = 4096;
  int64_t max_owner_streams = 0;  // of one caller; 0: no limit
  double default_deadline_seconds = 3600;
  double max_deadline_seconds = 24 * 3600;
  double unread_seconds = 60;  // a finished answer, or a comparison, may wait for its reader
  int64_t short_prompt_bytes = 64 << 10;
  int64_t short_lane_bytes = int64_t{16} << 20;
  int64_t long_lane_bytes = int64_t{128} << 20;
  bool allow_compare = false;  // Compare is served
  // What may wait for one reader before its sequence is paused, bytes.
  int64_t outbox_bytes = 64 << 10;
};

// A streaming call, as a drain sees it.
class OpenCall {
 public:
  virtual ~OpenCall() = default;
  // Ends the call soon, with `why`. Thread-safe.
  virtual void Abort(const absl::Status& why) = 0;
  // Its reader took nothing of a finished answer for too long: ends the connection's stream.
  // Thread-safe; must not call the core.
  virtual void CutOff() = 0;
};

// Thread-safe.
class ServiceCore {
 public:
  ServiceCore(ServiceLimits limits, Authenticator authenticator, Metrics* metrics, Log* log);
  ~ServiceCore();
  ServiceCore(const ServiceCore&) = delete;
  ServiceCore& operator=(const ServiceCore&) = delete;

  // From now on requests are answered; `model` outlives the core's last call.
  void Attach(const ServedModel* model) { model_.store(model); }
  // UNAVAILABLE before Attach.
  absl::StatusOr<const ServedModel*> Model() const;

  // New requests are UNAVAILABLE from now on.
  void BeginDrain() { draining_.store(true); }
  bool draining() const { return draining_.load(); }
  // OK while new requests are taken.
  absl::Status CheckAccepting() const;

  // UNAVAILABLE: draining. RESOURCE_EXHAUSTED with retry advice: too many are open, or too many of
  // `owner`.
  absl::Status Open(OpenCall* call, const std::string& owner);
  void Close(OpenCall* call);
  // The answer of an open call is finished and waits for its reader: unless this is called again
  // (the reader took something) or the call closes, it is cut off after unread_seconds. Not with a
  // lock that CutOff takes.
  void ExpectReader(OpenCall* call);
  int64_t open_calls() const;
  void AbortAll(const absl::Status& why);

  // Nothing is left to do: no call is open, no request queued or running.
  bool Idle() const;

  // The moment when a Generate call ends at the latest; `asked` is the caller's deadline.
  std::chrono::steady_clock::time_point Deadline(std::chrono::system_clock::time_point asked) const;

  ServerGauges Gauges() const;

  const ServiceLimits& limits() const { return limits_; }
  const Authenticator& authenticator() const { return authenticator_; }
  EncodeLanes& lanes() { return lanes_; }
  Metrics& metrics() { return *metrics_; }
  Log& log() { return *log_; }
  double uptime_seconds() const;

 private:
  void WatchUnread();

  const ServiceLimits limits_;
  const Authenticator authenticator_;
  Metrics* const metrics_;
  Log* const log_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::atomic<const ServedModel*> model_ = nullptr;
  std::atomic<bool> draining_ = false;

  mutable Mutex mutex_;
  std::map<OpenCall*, std::string> calls_ ABSL_GUARDED_BY(mutex_);  // and their owners
  std::map<std::string, int64_t> owner_calls_ ABSL_GUARDED_BY(mutex_);

  CondVar reader_expected_;
  std::map<OpenCall*, std::chrono::steady_clock::time_point> unread_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread watchdog_;

  EncodeLanes lanes_;  // last: its jobs use the rest
};

}  // namespace entropyserve
