#include "server/health.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <string>

#include "grpc/health/v1/health.grpc.pb.h"

namespace entropyserve {
namespace {

namespace health = grpc::health::v1;

// Names that the service knows: the server as a whole, and its one public service.
bool IsKnown(const std::string& service) {
  return service.empty() || service == "entropyserve.v1.EntropyServe";
}

health::HealthCheckResponse Response(bool serving) {
  health::HealthCheckResponse response;
  response.set_status(serving ? health::HealthCheckResponse::SERVING
                              : health::HealthCheckResponse::NOT_SERVING);
  return response;
}

// One Watch call: writes the state and every later one, until it is cancelled. Only the latest of
// several changes is written when the reader is slow.
class Watch final : public grpc::ServerWriteReactor<health::HealthCheckResponse>,
                    public HealthWatcher {
 public:
  Watch(HealthState* state, bool known) : state_(state), known_(known) {
    if (known_) {
      state_->Add(this);
      return;
    }
    MutexLock lock(&mutex_);
    writing_.set_status(health::HealthCheckResponse::SERVICE_UNKNOWN);
    in_flight_ = true;
    StartWrite(&writing_);
  }

  void OnChange(bool serving) override {
    MutexLock lock(&mutex_);
    wanted_ = serving;
    has_wanted_ = true;
    Pump();
  }

  void OnWriteDone(bool ok) override {
    MutexLock lock(&mutex_);
    in_flight_ = false;
    if (!ok) cancelled_ = true;
    Pump();
  }

  void OnCancel() override {
    MutexLock lock(&mutex_);
    cancelled_ = true;
    Pump();
  }

  void OnDone() override {
    if (known_) state_->Remove(this);
    delete this;
  }

 private:
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (in_flight_ || finished_) return;
    if (cancelled_) {
      finished_ = true;
      Finish(grpc::Status(grpc::StatusCode::CANCELLED, "cancelled"));
    } else if (has_wanted_) {
      has_wanted_ = false;
      writing_ = Response(wanted_);
      in_flight_ = true;
      StartWrite(&writing_);
    }
  }

  HealthState* const state_;
  const bool known_;
  Mutex mutex_;
  health::HealthCheckResponse writing_;  // belongs to gRPC while in_flight_
  bool wanted_ ABSL_GUARDED_BY(mutex_) = false;
  bool has_wanted_ ABSL_GUARDED_BY(mutex_) = false;
  bool in_flight_ ABSL_GUARDED_BY(mutex_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

class HealthService final : public health::Health::CallbackService {
 public:
  explicit HealthService(HealthState* state) : state_(state) {}

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const health::HealthCheckRequest* request,
                                  health::HealthCheckResponse* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (!IsKnown(request->service())) {
      reactor->Finish(grpc::Status(grpc::StatusCode::NOT_FOUND, "service: unknown"));
      return reactor;
    }
    *response = Response(state_->serving());
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  grpc::ServerWriteReactor<health::HealthCheckResponse>* Watch(
      grpc::CallbackServerContext*, const health::HealthCheckRequest* request) override {
    return new entropyserve::Watch(state_, IsKnown(request->service()));
  }

 private:
  HealthState* const state_;
};

}  // namespace

void HealthState::Set(bool serving) {
  MutexLock lock(&mutex_);
  if (serving == serving_) return;
  serving_ = serving;
  for (HealthWatcher* watcher : watchers_) watcher->OnChange(serving);
}

bool HealthState::serving() const {
  MutexLock lock(&mutex_);
  return serving_;
}

void HealthState::Add(HealthWatcher* watcher) {
  MutexLock lock(&mutex_);
  watchers_.insert(watcher);
  watcher->OnChange(serving_);
}

void HealthState::Remove(HealthWatcher* watcher) {
  MutexLock lock(&mutex_);
  watchers_.erase(watcher);
}

std::unique_ptr<grpc::Service> MakeHealthService(HealthState* state) {
  return std::make_unique<HealthService>(state);
}

}  // namespace entropyserve
