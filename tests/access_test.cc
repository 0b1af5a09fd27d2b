// What stands around the service: health, reflection, keys and certificates, metrics, ports.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <utility>

#include "client/client.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class AccessTest : public ServerFixture {
 protected:
  std::unique_ptr<grpc::health::v1::Health::Stub> HealthStub(int port) {
    return grpc::health::v1::Health::NewStub(grpc::CreateChannel(
        "127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials()));
  }
  static grpc::health::v1::HealthCheckResponse::ServingStatus Check(
      grpc::health::v1::Health::Stub& stub, const std::string& service = "") {
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    grpc::health::v1::HealthCheckResponse response;
    grpc::ClientContext context;
    EXPECT_TRUE(stub.Check(&context, request, &response).ok());
    return response.status();
  }
};

using Serving = grpc::health::v1::HealthCheckResponse;

TEST_F(AccessTest, HealthFollowsTheStateOnBothPorts) {
  ServerOptions options;
  options.health_listen = "127.0.0.1:0";
  StartServer({}, options, /*serve=*/false);
  ASSERT_NE(server_->health_port(), 0);
  ASSERT_NE(server_->health_port(), server_->port());
  const auto main = HealthStub(server_->port()), probe = HealthStub(server_->health_port());
  for (const std::string service : {"", "entropyserve.v1.EntropyServe"}) {
    EXPECT_EQ(Check(*main, service), Serving::NOT_SERVING);
    EXPECT_EQ(Check(*probe, service), Serving::NOT_SERVING);
  }
  grpc::ClientContext watch_context;
  const auto watch = main->Watch(&watch_context, {});
  Serving seen;
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), Serving::NOT_SERVING);
  health_.Set(true);
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), Serving::SERVING);
  EXPECT_EQ(Check(*main), Serving::SERVING);
  EXPECT_EQ(Check(*probe), Serving::SERVING);
  health_.Set(false);
  ASSERT_TRUE(watch->Read(&seen));
  EXPECT_EQ(seen.status(), Serving::NOT_SERVING);
  watch_context.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);

  grpc::health::v1::HealthCheckRequest unknown;
  unknown.set_service("no.such.Service");
  grpc::ClientContext context;
  EXPECT_EQ(main->Check(&context, unknown, &seen).error_code(), grpc::StatusCode::NOT_FOUND);
  grpc::ClientContext unknown_context;
  const auto unknown_watch = main->Watch(&unknown_context, unknown);
  ASSERT_TRUE(unknown_watch->Read(&seen));
  EXPECT_EQ(seen.status(), Serving::SERVICE_UNKNOWN);
  unknown_context.TryCancel();
  (void)unknown_watch->Finish();
}

TEST_F(AccessTest, ReflectionIsServedOnlyWhenAskedFor) {
  const std::string method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  const auto call = [&] {
    const auto channel = grpc::CreateChannel(address(), grpc::InsecureChannelCredentials());
    const grpc::internal::RpcMethod rpc(method.c_str(), grpc::internal::RpcMethod::BIDI_STREAMING);
    grpc::ClientContext context;
    grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>* stream =
        grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
            channel.get(), rpc, &context);
    const grpc::Slice list_services(std::string("\x3a\x01*", 3));  // field 7: list_services
    stream->Write(grpc::ByteBuffer(&list_services, 1));
    stream->WritesDone();
    grpc::ByteBuffer answer;
    std::string text;
    while (stream->Read(&answer)) {
      grpc::Slice slice;
      if (answer.DumpToSingleSlice(&slice).ok()) {
        text.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
      }
    }
    const grpc::Status status = stream->Finish();
    delete stream;
    return std::pair(status, text);
  };
  StartServer();
  EXPECT_EQ(call().first.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  TearDown();
  ServerOptions options;
  options.reflection = true;
  StartServer({}, options);
  const auto [status, text] = call();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(text, HasSubstr("entropyserve.v1.EntropyServe"));
  EXPECT_THAT(text, HasSubstr("grpc.health.v1.Health"));
}

// SHA-256 of "alpha" and "beta".
constexpr char kKeys[] =
    "# keys\n"
    "alice 8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8\n"
    "bob f44e64e75f3948e9f73f8dfa94721c4ce8cbb4f265c4790c702b2d41cfbf2753\n";

TEST_F(AccessTest, AKeyMayHaveSoManyStreamsAndDisturbsNoOther) {
  const auto authenticator = Authenticator::FromText(kKeys, "keys");
  ASSERT_TRUE(authenticator.ok()) << authenticator.status();
  ServiceLimits limits;
  limits.max_owner_streams = 1;
  StartServer(limits, {}, true, *authenticator);
  grpc::ClientContext contexts[4];
  for (int i : {0, 1, 3}) contexts[i].AddMetadata("authorization", "Bearer alpha");
  contexts[2].AddMetadata("authorization", "Bearer beta");
  engine_->Hold(true);
  const auto first = stub_->Generate(&contexts[0], TextRequest());
  FakeEngine::WaitFor([this] { return engine_->Requests().size() == 1; });
  const grpc::Status second = Generate(TextRequest(), &contexts[1]).status;
  EXPECT_EQ(second.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(RetrySeconds(second).has_value());
  EXPECT_THAT(second.error_message(), HasSubstr("--max-key-streams"));
  engine_->Hold(false);
  EXPECT_TRUE(Generate(TextRequest(), &contexts[2]).status.ok());
  v1::GenerateEvent event;
  while (first->Read(&event)) {
  }
  EXPECT_TRUE(first->Finish().ok());
  FakeEngine::WaitFor([this] { return core_->open_calls() == 0; });
  EXPECT_TRUE(Generate(TextRequest(), &contexts[3]).status.ok());
}

TEST_F(AccessTest, KeysAreAskedForAndOwnSessions) {
  const auto authenticator = Authenticator::FromText(kKeys, "keys");
  ASSERT_TRUE(authenticator.ok()) << authenticator.status();
  StartServer({}, {}, true, *authenticator);
  const auto create = [this](const std::string& authorization, v1::Session* session) {
    grpc::ClientContext context;
    if (!authorization.empty()) context.AddMetadata("authorization", authorization);
    return stub_->CreateSession(&context, {}, session).error_code();
  };
  v1::Session session;
  for (const std::string wrong :
       {"", "Bearer", "Bearer ", "Bearer alph", "Bearer alphaa", "Basic alpha"}) {
    EXPECT_EQ(create(wrong, &session), grpc::StatusCode::UNAUTHENTICATED) << wrong;
  }
  EXPECT_EQ(Generate(TextRequest()).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  ASSERT_EQ(create("bearer alpha", &session), grpc::StatusCode::OK);
  v1::GetSessionRequest get;
  get.set_session_id(session.id());
  grpc::ClientContext bobs;
  bobs.AddMetadata("authorization", "Bearer beta");
  EXPECT_EQ(stub_->GetSession(&bobs, get, &session).error_code(), grpc::StatusCode::NOT_FOUND);
  grpc::ClientContext alices;
  alices.AddMetadata("authorization", "Bearer alpha");
  EXPECT_TRUE(stub_->GetSession(&alices, get, &session).ok());
}

TEST_F(AccessTest, CertificatesAreAskedForAndOwnSessions) {
  const std::string folder = std::string(ES_SOURCE_DIR) + "/tests/golden/tls/";
  ServerOptions options;
  options.tls_cert = folder + "server.pem";
  options.tls_key = folder + "server.key";
  options.tls_client_ca = folder + "ca.pem";
  options.health_listen = "127.0.0.1:0";
  StartServer({}, options);
  const auto client = [&](const std::string& name) {
    ClientOptions own;
    own.server = address();
    own.tls_ca = folder + "ca.pem";
    own.max_attempts = 1;
    if (!name.empty()) {
      own.tls_cert = folder + name + ".pem";
      own.tls_key = folder + name + ".key";
    }
    return *Client::Create(own);
  };
  EXPECT_EQ(client("")->CreateSession().status().code(), absl::StatusCode::kUnavailable);
  const auto session = client("alice")->CreateSession();
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_TRUE(client("alice")->GetSession(session->id()).ok());
  EXPECT_EQ(client("bob")->GetSession(session->id()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Check(*HealthStub(server_->health_port())), Serving::SERVING);  // plaintext

  options.tls_key = folder + "no such file";
  EXPECT_EQ(Server::Start(options, core_.get(), &health_).status().code(),
            absl::StatusCode::kNotFound);
  options.tls_key = folder + "alice.key";  // not the certificate's
  EXPECT_FALSE(Server::Start(options, core_.get(), &health_).ok());
}

TEST(AuthTest, KeyFilesAreChecked) {
  for (const char* text : {"", "# nothing\n", "alice\n", "alice abc\n", "alice abc def\n"}) {
    const auto authenticator = Authenticator::FromText(text, "keys");
    EXPECT_EQ(authenticator.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(authenticator.status().message()), StartsWith("keys"));
  }
  EXPECT_EQ(Authenticator::FromFile("/no/such/file").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(AccessTest, MetricsCountWhatHappened) {
  StartServer();
  engine_->SetScript({.tokens = 3});
  ASSERT_TRUE(Generate(TextRequest()).status.ok());
  EXPECT_FALSE(Generate(v1::GenerateRequest()).status.ok());
  FakeEngine::WaitFor([this] { return core_->Idle(); });
  const std::string text = metrics_.Render(core_->Gauges());
  for (const char* line :
       {"entropyserve_requests_total{code=\"OK\",method=\"Generate\"} 1",
        "entropyserve_requests_total{code=\"INVALID_ARGUMENT\",method=\"Generate\"} 1",
        "entropyserve_time_to_first_token_seconds_count{prompt=\"1k\"} 1",
        "entropyserve_request_seconds_count{outcome=\"completed\"} 1",
        "entropyserve_inter_token_seconds_count 2", "entropyserve_completed_total 1",
        "entropyserve_running_requests 0", "entropyserve_kv_pages 1000",
        "entropyserve_build_info{version=\"test\"} 1", "entropyserve_ready 1",
        "entropyserve_encode_lane_bytes{lane=\"long\"} 0"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST_F(AccessTest, BusyPortsAreErrors) {
  StartServer();
  ServerOptions options;
  options.listen = address();
  const auto second = Server::Start(options, core_.get(), &health_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(options.listen));
  EXPECT_EQ(metrics_.Listen(address(), [] { return ServerGauges(); }).code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(AccessTest, ASocketThatAnotherServerListensOnIsNotTaken) {
  const std::string path =
      ::testing::TempDir() + "access_test_" + std::to_string(getpid()) + ".sock";
  ServerOptions options;
  options.listen = "unix:" + path;
  StartServer({}, options);
  HealthState health;
  for (const std::string& address : {"unix:" + path, "unix://" + path}) {
    for (const bool probe : {false, true}) {
      ServerOptions second;
      (probe ? second.health_listen : second.listen) = address;
      const absl::Status status = Server::Start(second, core_.get(), &health).status();
      EXPECT_TRUE(absl::IsUnavailable(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr(probe ? "--health-listen" : "--listen"));
    }
  }
  const auto stub = v1::EntropyServe::NewStub(
      grpc::CreateChannel(options.listen, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::GetServerResponse response;
  EXPECT_TRUE(stub->GetServer(&context, {}, &response).ok()) << "the first one still answers";

  // What a server that was killed left behind is no obstacle.
  server_->Shutdown(0);
  unlink(path.c_str());
  const int left = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  path.copy(name.sun_path, sizeof(name.sun_path) - 1);
  ASSERT_EQ(bind(left, reinterpret_cast<const sockaddr*>(&name), sizeof(name)), 0);
  close(left);
  {
    const auto next = Server::Start(options, core_.get(), &health);
    EXPECT_TRUE(next.ok()) << next.status();
  }
  unlink(path.c_str());
}

}  // namespace
}  // namespace entropyserve
