// A server on a free loopback port over a FakeEngine, and raw access to it.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/channel_arguments.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/base/status_details.h"
#include "entropyserve/v1/entropyserve.grpc.pb.h"
#include "server/health.h"
#include "server/server.h"
#include "server/service_core.h"
#include "tests/fake_engine.h"

namespace entropyserve {

inline constexpr char kChatMlTemplate[] =
    R"({% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %})";

// A model of a checked-in vocabulary (vocabulary size and context as given) without weights.
std::unique_ptr<ServedModel> MakeFakeModel(const std::string& chat_template = kChatMlTemplate);

class ServerFixture : public ::testing::Test {
 protected:
  // Starts everything; `serve`: the model is attached and health is SERVING.
  void StartServer(ServiceLimits limits = {}, ServerOptions options = {}, bool serve = true,
                   Authenticator authenticator = {});
  void TearDown() override;

  std::string address() const;
  // A stub of a connection of its own.
  std::unique_ptr<v1::EntropyServe::Stub> NewStub(const grpc::ChannelArguments& arguments = {});

  // A whole Generate call.
  struct Result {
    std::vector<v1::GenerateEvent> events;
    grpc::Status status;
    std::string text() const;
  };
  Result Generate(const v1::GenerateRequest& request, grpc::ClientContext* context = nullptr);
  // Bytes that need not be a message, to `method` ("Generate"); returns how the call ended.
  grpc::Status CallRaw(const std::string& method, const std::string& bytes);

  // A request with a short text.
  static v1::GenerateRequest TextRequest(const std::string& text = "Hello, world");
  // The same in a new session.
  v1::GenerateRequest SessionRequest();

  FakeEngine* engine_ = nullptr;  // the model's
  std::unique_ptr<ServedModel> model_ = MakeFakeModel();
  Log log_{"error", false};
  Metrics metrics_{"test"};
  HealthState health_;
  std::unique_ptr<ServiceCore> core_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::EntropyServe::Stub> stub_;
};

// Seconds of google.rpc.RetryInfo in a status' details.
std::optional<double> RetrySeconds(const grpc::Status& status);
// reason of google.rpc.ErrorInfo; empty: none.
std::string ErrorReason(const grpc::Status& status);

}  // namespace entropyserve
