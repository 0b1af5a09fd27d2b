#include "tests/drills/call.h"

#include <google/protobuf/any.pb.h>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace entropyserve {
namespace {

template <typename Detail>
std::optional<Detail> FindDetail(const grpc::Status& status) {
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return std::nullopt;
  for (const google::protobuf::Any& any : rich.details()) {
    Detail detail;
    if (any.Is<Detail>() && any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

}  // namespace

Call::Call(v1::EntropyServe::Stub* stub, const v1::GenerateRequest& request, bool reads)
    : request_(request) {
  stub->async()->Generate(&context_, &request_, this);
  if (reads) StartRead(&event_);
  StartCall();
}

void Call::OnReadDone(bool ok) {
  if (!ok) return;
  {
    std::lock_guard lock(mutex_);
    if (finished_.has_value() || (event_.has_tokens() && !accepted_)) in_order_ = false;
    if (event_.has_accepted()) accepted_ = true;
    if (event_.has_tokens()) {
      tokens_ += event_.tokens().ids_size();
      for (const auto& logprob : event_.tokens().logprobs()) logprobs_.push_back(logprob.logprob());
    }
    if (event_.has_finished()) finished_ = event_.finished();
  }
  StartRead(&event_);
}

void Call::OnDone(const grpc::Status& status) {
  std::lock_guard lock(mutex_);
  end_ = std::chrono::steady_clock::now();
  status_ = status;
  ended_ = true;
  done_.notify_all();
}

void Call::Wait() {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return ended_; });
}

bool Call::accepted() const {
  std::lock_guard lock(mutex_);
  return accepted_;
}

bool Call::ended() const {
  std::lock_guard lock(mutex_);
  return ended_;
}

bool Call::shed() const {
  return status_.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED &&
         FindDetail<google::rpc::RetryInfo>(status_).has_value();
}

std::string Call::reason() const {
  const auto info = FindDetail<google::rpc::ErrorInfo>(status_);
  return info ? info->reason() : std::string();
}

}  // namespace entropyserve
