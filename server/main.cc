// The server program: flags, wiring, signals. Exit codes: 0 drained, 1 could not serve, 2 wrong
// flags.
#include <signal.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "engine/base/status_macros.h"
#include "server/auth.h"
#include "server/connections.h"
#include "server/dense_calibration.h"
#include "server/flags.h"
#include "server/health.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/model_loader.h"
#include "server/server.h"
#include "server/service_core.h"

namespace entropyserve {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kExitError = 1, kExitUsage = 2;

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "entropyserve: %s\n", std::string(status.message()).c_str());
  return code;
}

sigset_t StopSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

// True when a stop signal came within `seconds`.
bool WaitForSignal(double seconds) {
  const sigset_t set = StopSignals();
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(seconds);
  timeout.tv_nsec = static_cast<long>((seconds - static_cast<double>(timeout.tv_sec)) * 1e9);
  return sigtimedwait(&set, nullptr, &timeout) > 0;
}

ServiceLimits Limits(const ServerFlags& flags) {
  ServiceLimits limits;
  limits.max_message_bytes = flags.max_message_bytes;
  limits.max_open_streams = flags.max_open_streams;
  limits.max_owner_streams = flags.max_key_streams;
  limits.default_deadline_seconds = flags.default_deadline_seconds;
  limits.max_deadline_seconds = flags.max_deadline_seconds;
  limits.allow_compare = flags.allow_compare;
  limits.unread_seconds = flags.unread_seconds;
  limits.short_prompt_bytes = flags.short_prompt_bytes;
  limits.short_lane_bytes = flags.short_lane_bytes;
  limits.long_lane_bytes = flags.long_lane_bytes;
  return limits;
}

ServerOptions Options(const ServerFlags& flags) {
  ServerOptions options;
  options.listen = flags.listen;
  options.health_listen = flags.health_listen;
  options.reflection = flags.reflection;
  options.max_message_bytes = static_cast<int>(flags.max_message_bytes);
  options.max_streams_per_connection = flags.max_streams_per_connection;
  options.keepalive_seconds = flags.keepalive_seconds;
  options.keepalive_timeout_seconds = flags.keepalive_timeout_seconds;
  options.min_ping_interval_seconds = flags.min_ping_interval_seconds;
  options.tls_cert = flags.tls_cert;
  options.tls_key = flags.tls_key;
  options.tls_client_ca = flags.tls_client_ca;
  return options;
}

// "127.0.0.1:0" with the port that was picked.
std::string Bound(const std::string& asked, int port) {
  if (port == 0) return asked;
  return asked.substr(0, asked.rfind(':') + 1) + std::to_string(port);
}

// Listens and loads; the order finds a busy port before minutes of reading weights.
class Program {
 public:
  explicit Program(const ServerFlags& flags)
      : flags_(flags),
        log_(flags.log_level, flags.log_format == "json"),
        metrics_(ENTROPYSERVE_VERSION) {}
  ~Program() { metrics_.StopListening(); }  // a scrape reads core_ and model_

  int Run() {
    RouteLibraryLogs(&log_);
    RaiseFileLimit();
    if (const absl::Status status = Listen(); !status.ok()) return Fail(status, kExitError);
    absl::Status loaded;
    std::atomic<bool> load_done = false;
    std::thread loader([&] {
      loaded = Load();
      load_done.store(true);
    });
    bool stop = false;
    while (!stop && !load_done.load()) stop = WaitForSignal(0.05);
    if (stop && !load_done.load()) {
      log_.Info("stopped", {{"while", "loading"}});
      std::_Exit(0);  // nothing was served yet, and reading weights cannot be interrupted
    }
    loader.join();
    if (!loaded.ok()) {
      server_->Shutdown(0);
      return Fail(loaded, kExitError);
    }
    while (!stop) {
      stop = WaitForSignal(60);
      TellOfRefusedConnections();
    }
    Drain();
    return 0;
  }

 private:
  absl::Status Listen() {
    Authenticator authenticator;
    if (!flags_.key_file.empty()) {
      ASSIGN_OR_RETURN(authenticator, Authenticator::FromFile(flags_.key_file));
    }
    core_ = std::make_unique<ServiceCore>(Limits(flags_), authenticator, &metrics_, &log_);
    ASSIGN_OR_RETURN(server_, Server::Start(Options(flags_), core_.get(), &health_));
    if (!flags_.metrics_listen.empty()) {
      const absl::Status status =
          metrics_.Listen(flags_.metrics_listen, [this] { return core_->Gauges(); });
      if (!status.ok()) {
        return absl::UnavailableError("--metrics-listen: " + std::string(status.message()));
      }
      log_.Info("metrics", {{"address", Bound(flags_.metrics_listen, metrics_.port())}});
    }
    if (!flags_.health_listen.empty()) {
      log_.Info("health", {{"address", Bound(flags_.health_listen, server_->health_port())}});
    }
    log_.Info("listening", {{"address", Bound(flags_.listen, server_->port())},
                            {"version", ENTROPYSERVE_VERSION}});
    if (flags_.port_file.empty()) return absl::OkStatus();
    std::ofstream file(flags_.port_file);
    file << server_->port() << "\n";
    file.close();
    if (file) return absl::OkStatus();
    return absl::PermissionDeniedError("--port-file: cannot write " + flags_.port_file);
  }

  // Weights, the first forward pass, then readiness.
  absl::Status Load() {
    const Clock::time_point start = Clock::now();
    ASSIGN_OR_RETURN(model_,
                     LoadServedModel(flags_, metrics_.observer(),
                                     [this](const std::string& what) { LoseDevice(what); }));
    if (!model_->gpu_unused.empty()) {
      log_.Warning("gpu_not_used", {{"message", model_->gpu_unused}});
    }
    if (!model_->chat.ok()) {
      log_.Warning("no_chat_template", {{"message", std::string(model_->chat.status().message())}});
    }
    RETURN_IF_ERROR(model_->engine->WarmUp());
    RETURN_IF_ERROR(CalibrateDense());
    const int64_t heads = int64_t{model_->config.layers} * model_->config.kv_heads;
    metrics_.SetModel({.name = model_->name,
                       .architecture = model_->config.family,
                       .backend = model_->backend,
                       .dtype = model_->dtype,
                       .kv_blocks = model_->engine->Stats().pages_total / heads});
    core_->Attach(model_.get());
    health_.Set(true);
    log_.Info("ready", {{"model", model_->name},
                        {"architecture", model_->config.family},
                        {"backend", model_->backend},
                        {"dtype", model_->dtype},
                        {"linear_dtype", model_->linear_dtype},
                        {"context_tokens", model_->context_tokens},
                        {"seconds", std::chrono::duration<double>(Clock::now() - start).count()}});
    return absl::OkStatus();
  }

  absl::Status CalibrateDense() {
    if (flags_.calibrate_dense_tokens == 0) return absl::OkStatus();
    const Clock::time_point start = Clock::now();
    ASSIGN_OR_RETURN(const DenseCalibration dense,
                     DenseCalibration::Measure(model_->engine.get(), flags_.calibrate_dense_tokens,
                                               model_->context_tokens));
    metrics_.SetDenseCalibration(dense);
    log_.Info("dense_calibrated",
              {{"up_to_tokens", dense.points().empty() ? 0 : dense.points().back().tokens},
               {"seconds", std::chrono::duration<double>(Clock::now() - start).count()}});
    return absl::OkStatus();
  }

  void TellOfRefusedConnections() {
    const int64_t count = TakeRefusedConnections();
    if (count == 0) return;
    log_.Warning("connections_refused",
                 {{"count", count}, {"message", "no file descriptor was free; raise ulimit -n"}});
  }

  // The process ends when this returns; watchers of the health service are told before.
  void LoseDevice(const std::string& what) {
    health_.Set(false);
    log_.Error("device_failed", {{"message", what}});
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
  }

  // Health first, so that balancers look elsewhere; then what runs may finish; then the rest is
  // cancelled.
  void Drain() {
    health_.Set(false);
    core_->BeginDrain();
    log_.Info("draining", {{"open_calls", core_->open_calls()}, {"seconds", flags_.drain_seconds}});
    const auto deadline = Clock::now() + std::chrono::duration<double>(flags_.drain_seconds);
    bool hasten = false;
    while (!core_->Idle() && !hasten && Clock::now() < deadline) hasten = WaitForSignal(0.02);
    if (!core_->Idle()) {
      log_.Warning("drain_cancels", {{"open_calls", core_->open_calls()}, {"hastened", hasten}});
    }
    core_->AbortAll(absl::UnavailableError("the server shut down before the answer was complete"));
    model_->engine->Drain(Clock::now() + std::chrono::seconds(1));
    server_->Shutdown(1);
    TellOfRefusedConnections();
    log_.Info("stopped");
  }

  const ServerFlags& flags_;
  Log log_;
  HealthState health_;
  std::unique_ptr<ServedModel> model_;
  Metrics metrics_;
  std::unique_ptr<ServiceCore> core_;
  std::unique_ptr<Server> server_;
};

int Main(const std::vector<std::string>& args) {
  ServerFlags flags;
  FlagSet set = MakeServerFlagSet(&flags);
  const absl::StatusOr<std::vector<std::string>> positional = set.Parse(args);
  if (set.help_requested()) {
    std::fputs(set.Help().c_str(), stdout);
    return 0;
  }
  if (!positional.ok()) return Fail(positional.status(), kExitUsage);
  if (!positional->empty()) {
    return Fail(absl::InvalidArgumentError("unexpected argument \"" + positional->front() +
                                           "\"; --help lists the flags"),
                kExitUsage);
  }
  if (const absl::Status status = Validate(flags); !status.ok()) return Fail(status, kExitUsage);
  ServedModel defaults;
  if (const absl::Status status = SetRequestDefaults(flags, &defaults); !status.ok()) {
    return Fail(status, kExitUsage);
  }
  if (const absl::Status status = CheckModelFiles(flags); !status.ok()) {
    return Fail(status, kExitError);
  }

  // Before any thread starts, so that all of them inherit it: only WaitForSignal sees these
  // signals.
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  Program program(flags);
  return program.Run();
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  return entropyserve::Main(std::vector<std::string>(argv + 1, argv + argc));
}
