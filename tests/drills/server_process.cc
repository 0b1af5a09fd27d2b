#include "tests/drills/server_process.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace entropyserve {
namespace {

constexpr int kConnections = 8;

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<std::string> Args(const std::string& port_file, const std::vector<std::string>& flags) {
  std::filesystem::remove(port_file);
  std::vector<std::string> args = {
      "--model=synthetic:tiny", "--listen=127.0.0.1:0", "--metrics-listen=",
      "--backend=cpu",          "--threads=1",          "--port-file=" + port_file};
  args.insert(args.end(), flags.begin(), flags.end());
  return args;
}

}  // namespace

ServerProcess::ServerProcess(const std::string& program, const std::string& folder,
                             const std::vector<std::string>& flags)
    : ChildProcess(program, Args(folder + "/port", flags),
                   {"", folder + "/server.log", folder + "/server.log"}) {
  std::string port;
  WaitUntil([&] {
    port = FirstLine(folder + "/port");
    return !port.empty() || Ended();
  });
  if (!port.empty()) Connect(port);
  const bool serving = !port.empty() && WaitUntil([&] {
    return Ended() || State().state() == v1::GetServerResponse::STATE_SERVING;
  });
  if (serving && !Ended()) return;
  std::fprintf(stderr, "%s does not serve; its log is %s/server.log\n", program.c_str(),
               folder.c_str());
  std::exit(1);
}

void ServerProcess::Connect(const std::string& port) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // Small windows, so that a reader that stops is felt soon.
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 4096);
  for (int i = 0; i < kConnections; ++i) {
    stubs_.push_back(v1::EntropyServe::NewStub(grpc::CreateCustomChannel(
        "127.0.0.1:" + port, grpc::InsecureChannelCredentials(), arguments)));
  }
}

ServerProcess::Stub& ServerProcess::stub() { return *stubs_[next_stub_++ % stubs_.size()]; }

v1::GetServerResponse ServerProcess::State() {
  grpc::ClientContext context;
  v1::GetServerResponse state;
  stubs_.front()->GetServer(&context, {}, &state);
  return state;
}

double ServerProcess::CpuSeconds() const {
  clockid_t clock;
  timespec t = {};
  if (clock_getcpuclockid(pid(), &clock) == 0) clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

}  // namespace entropyserve
