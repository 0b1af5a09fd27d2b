// One Generate call, run by gRPC's own threads.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "entropyserve/v1/entropyserve.grpc.pb.h"

namespace entropyserve {

// Thread-safe after Start. Outlives the call: Wait before destruction.
class Call final : public grpc::ClientReadReactor<v1::GenerateEvent> {
 public:
  // With `reads` off nothing is ever read.
  Call(v1::EntropyServe::Stub* stub, const v1::GenerateRequest& request, bool reads = true);
  ~Call() override { Wait(); }

  void Cancel() { context_.TryCancel(); }
  void Wait();
  bool accepted() const;
  bool ended() const;

  // After Wait.
  const grpc::Status& status() const { return status_; }
  const std::optional<v1::Finished>& finished() const { return finished_; }
  const std::vector<float>& logprobs() const { return logprobs_; }
  int64_t tokens() const { return tokens_; }
  double seconds() const { return std::chrono::duration<double>(end_ - start_).count(); }
  std::chrono::steady_clock::time_point end() const { return end_; }
  // OK, all events in order, `finished` the last.
  bool complete() const { return status_.ok() && finished_.has_value() && in_order_; }
  // Refused with google.rpc.RetryInfo.
  bool shed() const;
  // reason of google.rpc.ErrorInfo; empty: none.
  std::string reason() const;

  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  const v1::GenerateRequest request_;
  grpc::ClientContext context_;
  v1::GenerateEvent event_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point end_;

  mutable std::mutex mutex_;
  std::condition_variable done_;
  bool accepted_ = false, ended_ = false, in_order_ = true;
  std::optional<v1::Finished> finished_;
  std::vector<float> logprobs_;
  int64_t tokens_ = 0;
  grpc::Status status_;
};

}  // namespace entropyserve
