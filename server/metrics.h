// What Prometheus reads. Names start with entropyserve_ and carry their unit.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"

namespace entropyserve {

// A moment's values that are read at scrape time.
struct ServerGauges {
  EngineStats engine;
  int64_t open_streams = 0;
  int64_t short_lane_bytes = 0, long_lane_bytes = 0, session_lane_bytes = 0;
  bool ready = false;
};

// Thread-safe.
class Metrics {
 public:
  explicit Metrics(const std::string& version);
  ~Metrics();

  // Once, when the model is loaded: labels of entropyserve_model_info.
  void SetModel(const std::string& name, const std::string& architecture,
                const std::string& backend, const std::string& dtype);

  // A finished call: `method` is the RPC's name, `code` the canonical name of its status.
  void CountRequest(const std::string& method, const std::string& code);
  void ObserveTimeToFirstToken(double seconds);
  void ObserveInterToken(double seconds);
  void ObservePromptTokens(double tokens);

  // Serves /metrics on `address` ("127.0.0.1:9464") until destruction; `gauges` is called on every
  // scrape, from other threads. UNAVAILABLE: the address cannot be bound.
  absl::Status Listen(const std::string& address, std::function<ServerGauges()> gauges);
  // Returns when no scrape runs any more.
  void StopListening();
  // The bound port, also when 0 was asked for; 0: not listening.
  int port() const;

  // The text that /metrics answers.
  std::string Render(const ServerGauges& gauges) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace entropyserve
