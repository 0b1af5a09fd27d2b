// The parts of the drive that gRPC's threads touch: an inbox, the connections, and one call.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "client/bench/record.h"
#include "client/channel.h"
#include "engine/base/mutex.h"
#include "entropyserve/v1/entropyserve.grpc.pb.h"

namespace entropyserve {

// Work for the schedule's thread. Shared, because a poster may still be in Post when the thread
// that took its work is done.
class Inbox {
 public:
  using Work = std::function<void()>;
  void Post(Work work) {
    MutexLock lock(&mutex_);
    work_.push_back(std::move(work));
    wake_.NotifyOne();
  }
  // What has been posted; waits for it up to `timeout`.
  std::vector<Work> Take(std::chrono::nanoseconds timeout) {
    MutexLock lock(&mutex_);
    if (work_.empty() && timeout > std::chrono::nanoseconds(0)) wake_.WaitFor(&mutex_, timeout);
    return std::exchange(work_, {});
  }

 private:
  Mutex mutex_;
  CondVar wake_;
  std::vector<Work> work_ ABSL_GUARDED_BY(mutex_);
};

// One connection and how many calls it carries. The schedule's thread only.
struct Connection {
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::EntropyServe::Stub> stub;
  int calls = 0;
};

// Opens connections as the calls at once ask for them.
class Connections {
 public:
  Connections(ClientOptions options, int calls_per_connection)
      : options_(std::move(options)), calls_per_connection_(calls_per_connection) {}
  // What OpenChannel says.
  absl::Status Open();
  // So that no request waits for a connection that could have been there.
  bool WaitUntilUp(std::chrono::system_clock::time_point deadline);
  // The one with the fewest calls; a new one when all are full. Valid as long as this lives.
  Connection* Pick();
  Connection* first() { return connections_.front().get(); }
  const ClientOptions& options() const { return options_; }
  size_t size() const { return connections_.size(); }

 private:
  const ClientOptions options_;
  const int calls_per_connection_;
  std::vector<std::unique_ptr<Connection>> connections_;
};

// Seconds since a moment that the run chose.
class RunClock {
 public:
  double Now() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// One Generate call. Made, started and deleted on the schedule's thread; events come on gRPC's.
class Call final : public grpc::ClientReadReactor<v1::GenerateEvent> {
 public:
  struct Shared {
    std::shared_ptr<Inbox> inbox;
    const RunClock* clock = nullptr;
    std::atomic<int64_t>* output_tokens = nullptr;
  };
  struct Behaviour {
    int64_t cancel_after_tokens = -1;
    bool slow = false;
    double deadline_seconds = 0;
  };

  Call(Shared shared, RequestRecord planned, Behaviour behaviour, v1::GenerateRequest request)
      : shared_(std::move(shared)),
        behaviour_(behaviour),
        recorder_(std::move(planned)),
        request_(std::move(request)) {}

  // `resume` is posted for a slow reader after every event; it calls Resume when its pause is over.
  // `done` is posted last. The status is then status().
  void Start(Connection* connection, const ClientOptions& options, std::function<void()> resume,
             std::function<void()> done);
  void Resume() { StartRead(&event_); }
  void Cancel() { context_.TryCancel(); }
  RequestRecorder& recorder() { return recorder_; }

  // After `done`.
  const absl::Status& status() const { return status_; }
  double ended() const { return ended_; }
  bool cancelled_as_planned() const { return cancelled_; }
  Connection* connection() const { return connection_; }

 private:
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

  const Shared shared_;
  const Behaviour behaviour_;
  RequestRecorder recorder_;
  v1::GenerateRequest request_;
  v1::GenerateEvent event_;
  grpc::ClientContext context_;
  Connection* connection_ = nullptr;
  std::function<void()> resume_, done_;
  bool cancelled_ = false;
  absl::Status status_;
  double ended_ = 0;
};

}  // namespace entropyserve
