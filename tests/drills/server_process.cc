#include "tests/drills/server_process.h"

#include <fcntl.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>

namespace entropyserve {
namespace {

constexpr int kConnections = 8;

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

int ExitCode(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

bool WaitUntil(const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

ServerProcess::ServerProcess(const std::string& program, const std::string& folder,
                             const std::vector<std::string>& flags)
    : log_(folder + "/server.log") {
  const std::string port_file = folder + "/port";
  std::filesystem::remove(port_file);
  std::vector<std::string> args = {program,
                                   "--model=synthetic:tiny",
                                   "--listen=127.0.0.1:0",
                                   "--metrics-listen=",
                                   "--backend=cpu",
                                   "--threads=1",
                                   "--port-file=" + port_file};
  args.insert(args.end(), flags.begin(), flags.end());
  std::vector<char*> argv;
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ == 0) {
    const int log = open(log_.c_str(), O_CREAT | O_APPEND | O_WRONLY, 0600);
    dup2(log, 1);
    dup2(log, 2);
    execv(program.c_str(), argv.data());
    _exit(127);
  }
  std::string port;
  WaitUntil([&] {
    port = FirstLine(port_file);
    return !port.empty() || Ended();
  });
  if (!port.empty()) Connect(port);
  const bool serving = !port.empty() && WaitUntil([&] {
    return Ended() || State().state() == v1::GetServerResponse::STATE_SERVING;
  });
  if (serving && !Ended()) return;
  std::fprintf(stderr, "%s does not serve; its log is %s\n", program.c_str(), log_.c_str());
  std::exit(1);
}

ServerProcess::~ServerProcess() {
  if (pid_ <= 0) return;
  Signal(SIGKILL);
  Wait();
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

void ServerProcess::Signal(int signal) const { kill(pid_, signal); }

double ServerProcess::CpuSeconds() const {
  clockid_t clock;
  timespec t = {};
  if (clock_getcpuclockid(pid_, &clock) == 0) clock_gettime(clock, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

int ServerProcess::Wait() {
  if (pid_ > 0) {
    int status = 0;
    waitpid(pid_, &status, 0);
    code_ = ExitCode(status);
    pid_ = 0;
  }
  return code_;
}

bool ServerProcess::Ended() {
  int status = 0;
  if (pid_ > 0 && waitpid(pid_, &status, WNOHANG) != 0) {
    code_ = ExitCode(status);
    pid_ = 0;
  }
  return pid_ <= 0;
}

}  // namespace entropyserve
