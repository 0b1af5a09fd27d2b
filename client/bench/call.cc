#include "client/bench/call.h"

#include <algorithm>

#include "engine/base/status_macros.h"

namespace entropyserve {

absl::Status Connections::Open() {
  // Channels with equal arguments would otherwise share one connection, and its limit of streams.
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  auto connection = std::make_unique<Connection>();
  ASSIGN_OR_RETURN(connection->channel, OpenChannel(options_, arguments));
  connection->stub = v1::EntropyServe::NewStub(connection->channel);
  connections_.push_back(std::move(connection));
  return absl::OkStatus();
}

bool Connections::WaitUntilUp(std::chrono::system_clock::time_point deadline) {
  for (const auto& connection : connections_)
    connection->channel->GetState(/*try_to_connect=*/true);
  return std::all_of(connections_.begin(), connections_.end(), [deadline](const auto& connection) {
    return connection->channel->WaitForConnected(deadline);
  });
}

Connection* Connections::Pick() {
  const auto fewest = [this] {
    return std::min_element(connections_.begin(), connections_.end(),
                            [](const auto& a, const auto& b) { return a->calls < b->calls; })
        ->get();
  };
  if (Connection* found = fewest(); found->calls < calls_per_connection_) return found;
  // Should a file of its credentials have gone meanwhile, the call waits for a stream.
  (void)Open();
  return fewest();
}

void Call::Start(Connection* connection, const ClientOptions& options, std::function<void()> resume,
                 std::function<void()> done) {
  connection_ = connection;
  ++connection_->calls;
  resume_ = std::move(resume);
  done_ = std::move(done);
  AddHeaders(options, &context_);
  if (behaviour_.deadline_seconds > 0) {
    context_.set_deadline(std::chrono::system_clock::now() +
                          std::chrono::duration_cast<std::chrono::system_clock::duration>(
                              std::chrono::duration<double>(behaviour_.deadline_seconds)));
  }
  connection_->stub->async()->Generate(&context_, &request_, this);
  // Its next read begins outside of a reaction: until the last, the call must not end.
  if (behaviour_.slow) AddHold();
  StartRead(&event_);
  recorder_.OnSent(shared_.clock->Now());
  StartCall();
}

void Call::OnReadDone(bool ok) {
  if (!ok) {
    if (behaviour_.slow) RemoveHold();
    return;
  }
  const int64_t before = recorder_.record().output_tokens;
  recorder_.OnEvent(event_, shared_.clock->Now());
  const int64_t tokens = recorder_.record().output_tokens;
  shared_.output_tokens->fetch_add(tokens - before, std::memory_order_relaxed);
  if (!cancelled_ && behaviour_.cancel_after_tokens >= 0 &&
      tokens >= behaviour_.cancel_after_tokens) {
    cancelled_ = true;
    context_.TryCancel();
  }
  if (behaviour_.slow && !cancelled_) {
    shared_.inbox->Post(resume_);
  } else {
    StartRead(&event_);
  }
}

void Call::OnDone(const grpc::Status& status) {
  ended_ = shared_.clock->Now();
  status_ = ToAbsl(status);
  // Whoever takes this deletes the call: nothing of it may be touched after.
  const std::shared_ptr<Inbox> inbox = shared_.inbox;
  inbox->Post(std::move(done_));
}

}  // namespace entropyserve
