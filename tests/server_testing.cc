#include "tests/server_testing.h"

#include <google/protobuf/any.pb.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <utility>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "kernels/check.h"
#include "tests/text_golden.h"

namespace entropyserve {

std::unique_ptr<ServedModel> MakeFakeModel(const std::string& chat_template) {
  auto model = std::make_unique<ServedModel>();
  TokenizerSideFiles side;
  side.chat_template = chat_template;
  model->tokenizer = LoadGoldenTokenizer("qwen2", side);
  model->chat = ChatTemplate::Create(*model->tokenizer);
  model->name = "fake";
  model->config.family = "qwen2";
  model->config.layers = 3;
  model->config.heads = 4;
  model->config.kv_heads = 2;
  model->config.head_dim = 16;
  model->config.hidden = 64;
  model->config.vocab = model->tokenizer->vocab_size();
  model->config.context = 1 << 20;
  model->context_tokens = 1 << 20;
  model->dtype = "f32";
  model->backend = "cpu";
  model->engine = std::make_unique<FakeEngine>();
  return model;
}

void ServerFixture::StartServer(ServiceLimits limits, ServerOptions options, bool serve,
                                Authenticator authenticator) {
  if (model_ == nullptr) model_ = MakeFakeModel();
  engine_ = static_cast<FakeEngine*>(model_->engine.get());
  core_ = std::make_unique<ServiceCore>(limits, std::move(authenticator), &metrics_, &log_);
  auto server = Server::Start(options, core_.get(), &health_);
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = *std::move(server);
  if (serve) {
    core_->Attach(model_.get());
    health_.Set(true);
  }
  channel_ = grpc::CreateChannel(address(), grpc::InsecureChannelCredentials());
  stub_ = v1::EntropyServe::NewStub(channel_);
}

void ServerFixture::TearDown() {
  if (server_ == nullptr) return;
  engine_->Hold(false);
  core_->AbortAll(absl::UnavailableError("the test is over"));
  server_->Shutdown(5);
  EXPECT_EQ(core_->open_calls(), 0);
  // A call may be over before its lane has left it, and the lane still speaks to the model's
  // engine.
  FakeEngine::WaitFor([this] {
    const EncodeLanes& lanes = core_->lanes();
    return lanes.short_bytes() + lanes.long_bytes() + lanes.session_bytes() == 0;
  });
  server_.reset();
  model_.reset();  // ends what was kept without a reader; its last event takes the core
  core_.reset();
}

std::string ServerFixture::address() const {
  return "127.0.0.1:" + std::to_string(server_->port());
}

std::unique_ptr<v1::EntropyServe::Stub> ServerFixture::NewStub(
    const grpc::ChannelArguments& arguments) {
  grpc::ChannelArguments own = arguments;
  own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection that no other stub shares
  return v1::EntropyServe::NewStub(
      grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), own));
}

std::string ServerFixture::Result::text() const {
  std::string text;
  for (const v1::GenerateEvent& event : events) text += event.tokens().text();
  return text;
}

ServerFixture::Result ServerFixture::Generate(const v1::GenerateRequest& request,
                                              grpc::ClientContext* context) {
  grpc::ClientContext own;
  if (context == nullptr) context = &own;
  Result result;
  const auto reader = stub_->Generate(context, request);
  v1::GenerateEvent event;
  while (reader->Read(&event)) result.events.push_back(event);
  result.status = reader->Finish();
  return result;
}

grpc::Status ServerFixture::CallRaw(const std::string& method, const std::string& bytes) {
  grpc::GenericStub stub(channel_);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const grpc::Slice slice(bytes);
  const auto call = stub.PrepareUnaryCall(&context, "/entropyserve.v1.EntropyServe/" + method,
                                          grpc::ByteBuffer(&slice, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  Check(queue.Next(&tag, &ok), "the call ends");
  return status;
}

v1::GenerateRequest ServerFixture::TextRequest(const std::string& text) {
  v1::GenerateRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_max_new_tokens(1'000'000'000);  // the script says when it ends
  return request;
}

v1::GenerateRequest ServerFixture::SessionRequest() {
  v1::Session session;
  grpc::ClientContext context;
  EXPECT_TRUE(stub_->CreateSession(&context, {}, &session).ok());
  v1::GenerateRequest request = TextRequest();
  request.set_session_id(session.id());
  return request;
}

namespace {

template <typename Detail>
std::optional<Detail> FindDetail(const grpc::Status& status) {
  google::rpc::Status rich;
  if (!rich.ParseFromString(status.error_details())) return std::nullopt;
  for (const google::protobuf::Any& any : rich.details()) {
    Detail detail;
    if (any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

}  // namespace

std::optional<double> RetrySeconds(const grpc::Status& status) {
  const auto retry = FindDetail<google::rpc::RetryInfo>(status);
  if (!retry.has_value()) return std::nullopt;
  return static_cast<double>(retry->retry_delay().seconds()) + retry->retry_delay().nanos() * 1e-9;
}

std::string ErrorReason(const grpc::Status& status) {
  const auto info = FindDetail<google::rpc::ErrorInfo>(status);
  return info.has_value() ? info->reason() : "";
}

}  // namespace entropyserve
