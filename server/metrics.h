// What Prometheus reads. Names start with entropyserve_, are in base units, and are explained in
// docs/metrics.md. Labels take few values, fixed here: no client, request or session is ever one.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "engine/engine.h"
#include "server/dense_calibration.h"

namespace entropyserve {

// A moment's values that are read at scrape time.
struct ServerGauges {
  EngineStats engine;
  int64_t open_streams = 0;
  int64_t short_lane_bytes = 0, long_lane_bytes = 0, session_lane_bytes = 0;
  bool ready = false;
};

// Labels of entropyserve_model_info and of entropyserve_kv_cache_info.
struct ModelLabels {
  std::string name, architecture, backend, dtype;
  int64_t kv_blocks = 0;  // whole blocks of kPageTokens tokens over all layers and kv heads
};

// As in labels: "device", "host", "disk".
const char* TierName(SessionTier tier);

// Thread-safe.
class Metrics {
 public:
  explicit Metrics(const std::string& version);
  ~Metrics();

  // Once, when the model is loaded.
  void SetModel(const ModelLabels& model);

  // Once, before the first request: what prefills are compared with. Without it there is no
  // entropyserve_prefill_speedup_ratio.
  void SetDenseCalibration(const DenseCalibration& dense);

  // A finished call: `method` is the RPC's name, `code` the canonical name of its status. A method
  // that the service does not have counts as "other", a code that gRPC does not have as "UNKNOWN".
  void CountRequest(const std::string& method, const std::string& code);
  void ObservePromptTokens(int64_t tokens);
  void ObserveTimeToFirstToken(double seconds, int64_t prompt_tokens);
  void ObserveInterToken(double seconds);
  // A request that the engine accepted has ended.
  void ObserveFinished(FinishReason reason, const Receipt& receipt);

  // For EngineConfig::observer; may outlive this object.
  std::shared_ptr<EngineObserver> observer() const;

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
  std::shared_ptr<Impl> impl_;
};

}  // namespace entropyserve
