#include "client/client.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <set>
#include <utility>

#include "client/channel.h"
#include "engine/base/mutex.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "entropyserve/v1/entropyserve.grpc.pb.h"

namespace entropyserve {

struct CancelToken::Impl {
  mutable Mutex mutex;
  CondVar wake;
  bool cancelled ABSL_GUARDED_BY(mutex) = false;
  std::set<grpc::ClientContext*> contexts ABSL_GUARDED_BY(mutex);
};

CancelToken::CancelToken() : impl_(std::make_unique<Impl>()) {}
CancelToken::~CancelToken() = default;

void CancelToken::Cancel() {
  MutexLock lock(&impl_->mutex);
  impl_->cancelled = true;
  for (grpc::ClientContext* context : impl_->contexts) context->TryCancel();
  impl_->wake.NotifyAll();
}

bool CancelToken::cancelled() const {
  MutexLock lock(&impl_->mutex);
  return impl_->cancelled;
}

namespace {

using Clock = std::chrono::system_clock;

// Between attempts when the server gives no advice: 0.2 s, doubled up to 5 s.
constexpr double kFirstRetrySeconds = 0.2, kMaxRetrySeconds = 5;

}  // namespace

class GrpcClient final : public Client {
 public:
  GrpcClient(const ClientOptions& options, const std::shared_ptr<grpc::Channel>& channel)
      : options_(options), stub_(v1::EntropyServe::NewStub(channel)) {}

  absl::Status Generate(const v1::GenerateRequest& request,
                        const std::function<void(const v1::GenerateEvent&)>& on_event,
                        const CallOptions& options) override {
    return Stream<v1::GenerateEvent>(options, on_event, [&](grpc::ClientContext* context) {
      return stub_->Generate(context, request);
    });
  }

  absl::Status Compare(const v1::CompareRequest& request,
                       const std::function<void(const v1::CompareEvent&)>& on_event,
                       const CallOptions& options) override {
    return Stream<v1::CompareEvent>(options, on_event, [&](grpc::ClientContext* context) {
      return stub_->Compare(context, request);
    });
  }

  absl::StatusOr<v1::Session> CreateSession(const CallOptions& options) override {
    return Unary<v1::Session>(options, v1::CreateSessionRequest(), &Stub::CreateSession);
  }
  absl::StatusOr<v1::Session> GetSession(const std::string& id,
                                         const CallOptions& options) override {
    v1::GetSessionRequest request;
    request.set_session_id(id);
    return Unary<v1::Session>(options, request, &Stub::GetSession);
  }
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(const CallOptions& options) override {
    return Unary<v1::ListSessionsResponse>(options, v1::ListSessionsRequest(), &Stub::ListSessions);
  }
  absl::StatusOr<v1::Session> ForkSession(const std::string& id,
                                          const CallOptions& options) override {
    v1::ForkSessionRequest request;
    request.set_session_id(id);
    return Unary<v1::Session>(options, request, &Stub::ForkSession);
  }
  absl::Status DeleteSession(const std::string& id, const CallOptions& options) override {
    v1::DeleteSessionRequest request;
    request.set_session_id(id);
    return Unary<v1::DeleteSessionResponse>(options, request, &Stub::DeleteSession).status();
  }
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request,
                                                const CallOptions& options) override {
    return Unary<v1::TokenizeResponse>(options, request, &Stub::Tokenize);
  }
  absl::StatusOr<v1::DetokenizeResponse> Detokenize(const v1::DetokenizeRequest& request,
                                                    const CallOptions& options) override {
    return Unary<v1::DetokenizeResponse>(options, request, &Stub::Detokenize);
  }
  absl::StatusOr<v1::GetModelResponse> GetModel(const CallOptions& options) override {
    return Unary<v1::GetModelResponse>(options, v1::GetModelRequest(), &Stub::GetModel);
  }
  absl::StatusOr<v1::GetServerResponse> GetServer(const CallOptions& options) override {
    return Unary<v1::GetServerResponse>(options, v1::GetServerRequest(), &Stub::GetServer);
  }

 private:
  using Stub = v1::EntropyServe::StubInterface;

  // One call, known to its cancel token while it lives.
  class Attempt {
   public:
    Attempt(const ClientOptions& client, const CallOptions& call,
            std::optional<Clock::time_point> deadline)
        : cancel_(call.cancel == nullptr ? nullptr : call.cancel->impl_.get()) {
      if (deadline.has_value()) context_.set_deadline(*deadline);
      AddHeaders(client, &context_);
      if (cancel_ == nullptr) return;
      MutexLock lock(&cancel_->mutex);
      cancel_->contexts.insert(&context_);
      if (cancel_->cancelled) context_.TryCancel();
    }
    ~Attempt() {
      if (cancel_ == nullptr) return;
      MutexLock lock(&cancel_->mutex);
      cancel_->contexts.erase(&context_);
    }
    grpc::ClientContext* context() { return &context_; }

   private:
    grpc::ClientContext context_;
    CancelToken::Impl* const cancel_;
  };

  static std::optional<Clock::time_point> Deadline(const CallOptions& options) {
    if (options.deadline_seconds <= 0) return std::nullopt;
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                              std::chrono::duration<double>(options.deadline_seconds));
  }

  // Waits before the next attempt; false: the call is over.
  bool WaitToRetry(const absl::Status& status, int attempt, const CallOptions& options,
                   std::optional<Clock::time_point> deadline) const {
    const bool advised = IsRetryable(status);
    if (!advised && status.code() != absl::StatusCode::kUnavailable) return false;
    if (attempt + 1 >= options_.max_attempts) return false;
    double seconds = RetryAfterSeconds(status).value_or(0);
    seconds = std::max(
        seconds, std::min(kMaxRetrySeconds, kFirstRetrySeconds * (1 << std::min(attempt, 10))));
    // Up to half more, so that callers who were refused together do not return together.
    std::random_device random;
    seconds *= 1 + 0.5 * (random() / static_cast<double>(std::random_device::max()));
    const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                          std::chrono::duration<double>(seconds));
    if (deadline.has_value() && until >= *deadline) return false;
    CancelToken none;
    CancelToken::Impl& cancel = *(options.cancel == nullptr ? &none : options.cancel)->impl_;
    MutexLock lock(&cancel.mutex);
    while (!cancel.cancelled && Clock::now() < until) {
      cancel.wake.WaitFor(&cancel.mutex, until - Clock::now());
    }
    return !cancel.cancelled;
  }

  template <typename Event, typename Open>
  absl::Status Stream(const CallOptions& options, const std::function<void(const Event&)>& on_event,
                      Open open) {
    const auto deadline = Deadline(options);
    for (int attempt = 0;; ++attempt) {
      bool any = false;
      absl::Status status;
      {
        Attempt call(options_, options, deadline);
        const auto reader = open(call.context());
        Event event;
        while (reader->Read(&event)) {
          any = true;
          on_event(event);
        }
        status = ToAbsl(reader->Finish());
      }
      if (status.ok() || any || !WaitToRetry(status, attempt, options, deadline)) return status;
    }
  }

  template <typename Response, typename Request>
  absl::StatusOr<Response> Unary(const CallOptions& options, const Request& request,
                                 grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                              Response*)) {
    const auto deadline = Deadline(options);
    for (int attempt = 0;; ++attempt) {
      Response response;
      absl::Status status;
      {
        Attempt call(options_, options, deadline);
        status = ToAbsl((stub_.get()->*method)(call.context(), request, &response));
      }
      if (status.ok()) return response;
      if (!WaitToRetry(status, attempt, options, deadline)) return status;
    }
  }

  const ClientOptions options_;
  const std::unique_ptr<Stub> stub_;
};

absl::StatusOr<std::unique_ptr<Client>> Client::Create(const ClientOptions& options) {
  ASSIGN_OR_RETURN(const auto channel, OpenChannel(options));
  return std::make_unique<GrpcClient>(options, channel);
}

}  // namespace entropyserve
