// fake_server: the server over the tests' scripted engine, which answers at once with as many
// tokens as are asked for. For what costs nothing but the service and its client, such as `bench`
// itself:
//   build/bin/fake_server < FIFO     prints HOST:PORT, serves until standard input ends
#include <cstdio>
#include <iostream>
#include <string>

#include "tests/server_testing.h"

int main() {
  using namespace entropyserve;
  const std::unique_ptr<ServedModel> model = MakeFakeModel();
  auto* engine = static_cast<FakeEngine*>(model->engine.get());
  engine->SetScript({.tokens = 1 << 30});  // max_new_tokens ends every answer
  Log log("error", false);
  Metrics metrics("fake");
  HealthState health;
  ServiceCore core(ServiceLimits(), Authenticator(), &metrics, &log);
  const auto server = Server::Start(ServerOptions(), &core, &health);
  if (!server.ok()) {
    std::cerr << server.status() << "\n";
    return 1;
  }
  core.Attach(model.get());
  health.Set(true);
  std::printf("127.0.0.1:%d\n", (*server)->port());
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
  }
  core.AbortAll(absl::UnavailableError("the server is ending"));
  (*server)->Shutdown(5);
  return 0;
}
