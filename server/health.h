// grpc.health.v1: NOT_SERVING until the model has run once, SERVING, NOT_SERVING again while
// draining. Our own rather than gRPC's default service, which says SERVING from the first moment
// on.
#pragma once

#include <memory>
#include <set>

#include "engine/base/mutex.h"

namespace grpc {
class Service;
}

namespace entropyserve {

// Told of every change; called with the state's lock held, so it must not call back.
class HealthWatcher {
 public:
  virtual ~HealthWatcher() = default;
  virtual void OnChange(bool serving) = 0;
};

// The one truth behind any number of servers. Thread-safe.
class HealthState {
 public:
  void Set(bool serving);
  bool serving() const;
  // `watcher` is told the present state at once.
  void Add(HealthWatcher* watcher);
  void Remove(HealthWatcher* watcher);

 private:
  mutable Mutex mutex_;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<HealthWatcher*> watchers_ ABSL_GUARDED_BY(mutex_);
};

// A service for one grpc::Server; `state` outlives it.
std::unique_ptr<grpc::Service> MakeHealthService(HealthState* state);

}  // namespace entropyserve
