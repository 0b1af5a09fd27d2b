// entropyserve-client session: the caller's sessions on the server.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/command.h"
#include "client/session_table.h"
#include "client/terminal.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client session create | list | get ID... | fork ID... | delete ID... [flags]\n"
    "A session keeps the KV cache of a conversation between calls. Prints the sessions that were\n"
    "made, found or forked as a table; what can be read of them is the caller's own. Every ID is\n"
    "tried, and one that fails is named on stderr.\n";

// What an action says: sessions to show, ids that are gone, and what failed.
struct Outcome {
  std::vector<v1::Session> sessions;
  std::vector<std::string> deleted;
  std::vector<absl::Status> errors;
};

absl::Status RunOne(const std::string& action, const std::string& id, const CallOptions& options,
                    Client* client, Outcome* outcome) {
  if (action == "delete") {
    RETURN_IF_ERROR(client->DeleteSession(id, options));
    outcome->deleted.push_back(id);
    return absl::OkStatus();
  }
  if (action == "list") {
    ASSIGN_OR_RETURN(const v1::ListSessionsResponse list, client->ListSessions(options));
    outcome->sessions.assign(list.sessions().begin(), list.sessions().end());
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(v1::Session session, action == "create" ? client->CreateSession(options)
                                        : action == "get"  ? client->GetSession(id, options)
                                                           : client->ForkSession(id, options));
  outcome->sessions.push_back(std::move(session));
  return absl::OkStatus();
}

// An id that fails does not keep the others from being tried.
Outcome Run(const std::string& action, const std::vector<std::string>& ids,
            const CallOptions& options, Client* client) {
  Outcome outcome;
  if (ids.empty()) {
    const absl::Status status = RunOne(action, "", options, client, &outcome);
    if (!status.ok()) outcome.errors.push_back(status);
  }
  for (const std::string& id : ids) {
    const absl::Status status = RunOne(action, id, options, client, &outcome);
    if (status.ok()) continue;
    outcome.errors.emplace_back(status.code(), absl::StrCat(id, ": ", status.message()));
  }
  return outcome;
}

void Print(const Outcome& outcome, const std::string& action, bool json) {
  if (json) {
    for (const v1::Session& session : outcome.sessions)
      std::printf("%s\n", ToJson(session).c_str());
    for (const std::string& id : outcome.deleted) std::printf("{\"deleted\":\"%s\"}\n", id.c_str());
    return;
  }
  for (const std::string& id : outcome.deleted) std::printf("deleted %s\n", id.c_str());
  if (action == "list" && outcome.sessions.empty() && outcome.errors.empty())
    std::puts("no sessions");
  if (!outcome.sessions.empty()) std::fputs(FormatSessions(outcome.sessions).c_str(), stdout);
}

}  // namespace

int RunSession(const std::vector<std::string>& args) {
  ConnectionFlags connection;
  bool json = false;
  FlagSet set(kUsage, kClientEnvPrefix);
  set.Section("Output");
  set.Add("json", &json, "one JSON object per session, a line each");
  AddConnectionFlags(&set, &connection);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  constexpr size_t kMaxIds = 10000;  // more than a command line holds
  if (!ParseCommandLine(&set, args, 1 + kMaxIds, &positional, &exit_code)) return exit_code;
  const std::string action = positional.empty() ? "" : positional[0];
  const bool takes_ids = action == "get" || action == "fork" || action == "delete";
  if (!takes_ids && action != "create" && action != "list") {
    return ReportUsage("expected one of create, list, get, fork, delete; --help explains them");
  }
  const std::vector<std::string> ids(positional.begin() + 1, positional.end());
  if (takes_ids == ids.empty()) {
    return ReportUsage(takes_ids ? absl::StrCat("session ", action, ": expected a session's id")
                                 : absl::StrCat("session ", action, ": takes no id"));
  }
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  const Outcome outcome = Run(action, ids, {connection.deadline_seconds, nullptr}, client->get());
  Print(outcome, action, json);
  for (const absl::Status& error : outcome.errors) Report(error);
  return outcome.errors.empty() ? kExitOk : kExitServer;
}

}  // namespace entropyserve
