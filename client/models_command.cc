// entropyserve-client models: what is served, and how it is doing.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/command.h"
#include "client/terminal.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client models [flags]\n"
    "Prints the served model, its default policy, and the server's load and memory.\n";

std::string Describe(const v1::GetModelResponse& model, const v1::GetServerResponse& server) {
  std::string out;
  const auto line = [&out](const char* name, const std::string& value) {
    absl::StrAppendFormat(&out, "%-12s %s\n", name, value);
  };
  line("model", model.name());
  line("kind", absl::StrFormat("%s, %.2f B parameters, %s on %s", model.architecture(),
                               static_cast<double>(model.parameters()) * 1e-9, model.dtype(),
                               server.backend()));
  line("shape",
       absl::StrFormat("%d layers, %d heads, %d kv heads of %d, vocabulary %d", model.layers(),
                       model.heads(), model.kv_heads(), model.head_dim(), model.vocab_size()));
  line("context", absl::StrFormat("%d tokens served, %d in the model", model.context_tokens(),
                                  model.model_context_tokens()));
  line("template", model.chat_template().empty() ? "none: use --raw" : model.chat_template());
  line("policy", absl::StrCat("prefill ", model.default_policy().prefill().preset(), " of ",
                              absl::StrJoin(model.prefill_presets(), ", "), "; kv ",
                              model.default_policy().kv().preset(), " of ",
                              absl::StrJoin(model.kv_presets(), ", ")));
  line("server",
       absl::StrFormat("%s, %s, up %.0f s", server.version(),
                       v1::GetServerResponse::State_Name(server.state()), server.uptime_seconds()));
  const v1::Load& load = server.load();
  line("load",
       absl::StrFormat("%d running, %d waiting, %d queued tokens, %d sessions", load.running(),
                       load.waiting(), load.queued_tokens(), load.sessions()));
  std::vector<std::string> entries;
  for (const v1::Memory::Entry& entry : server.memory().entries()) {
    entries.push_back(
        absl::StrCat(entry.name(), " ", FormatBytes(static_cast<double>(entry.bytes()))));
  }
  line("memory", absl::StrFormat("%s; %d of %d pages used", absl::StrJoin(entries, ", "),
                                 server.memory().pages_used(), server.memory().pages_total()));
  return out;
}

}  // namespace

int RunModels(const std::vector<std::string>& args) {
  ConnectionFlags connection;
  bool json = false;
  FlagSet set(kUsage, kClientEnvPrefix);
  set.Section("Output");
  set.Add("json", &json, "two JSON objects, a line each: model and server");
  AddConnectionFlags(&set, &connection);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 0, &positional, &exit_code)) return exit_code;
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  const CallOptions options{connection.deadline_seconds, nullptr};
  const absl::StatusOr<v1::GetModelResponse> model = (*client)->GetModel(options);
  if (!model.ok()) return Report(model.status());
  const absl::StatusOr<v1::GetServerResponse> server = (*client)->GetServer(options);
  if (!server.ok()) return Report(server.status());
  const std::string text =
      json ? ToJson(*model) + "\n" + ToJson(*server) + "\n" : Describe(*model, *server);
  std::fputs(text.c_str(), stdout);
  return kExitOk;
}

}  // namespace entropyserve
