// entropyserve-client tokenize and detokenize: text to ids and back, with the server's tokenizer.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "client/command.h"
#include "client/request_flags.h"
#include "client/terminal.h"

namespace entropyserve {
namespace {

constexpr char kTokenizeUsage[] =
    "entropyserve-client tokenize [TEXT] [flags]\n"
    "Prints the token ids of a text: the argument, --file, or standard input.\n";
constexpr char kDetokenizeUsage[] =
    "entropyserve-client detokenize [IDS] [flags]\n"
    "Prints the text of token ids, e.g. 1,2,3: the argument or standard input.\n";

struct TextFlags {
  ConnectionFlags connection;
  std::string file;
  bool json = false, count = false, chat = false, skip_special = false;
  bool parse_special = false, add_bos = false, with_pieces = false;
};

}  // namespace

int RunTokenize(const std::vector<std::string>& args) {
  TextFlags flags;
  FlagSet set(kTokenizeUsage, kClientEnvPrefix);
  set.Section("Text");
  set.Add("file", &flags.file, "read the text from this file; - is standard input");
  set.Add("chat", &flags.chat, "as a user's message, with the model's chat template");
  set.Add("parse-special", &flags.parse_special, "read control tokens from the text");
  set.Add("add-bos", &flags.add_bos, "begin with BOS where the model wants one");
  set.Section("Output");
  set.Add("count", &flags.count, "print only how many");
  set.Add("pieces", &flags.with_pieces, "print each id with its bytes; with --json only");
  set.Add("json", &flags.json, "one JSON object");
  AddConnectionFlags(&set, &flags.connection);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 1, &positional, &exit_code)) return exit_code;
  absl::StatusOr<std::string> text =
      positional.empty() ? ReadText("file", flags.file.empty() ? "-" : flags.file) : positional[0];
  if (!text.ok()) return ReportUsage(std::string(text.status().message()));

  v1::TokenizeRequest request;
  if (flags.chat) {
    v1::Message& message = *request.mutable_messages()->add_messages();
    message.set_role("user");
    message.set_content(*std::move(text));
  } else {
    request.set_text(*std::move(text));
  }
  request.set_parse_special(flags.parse_special);
  request.set_add_bos(flags.add_bos);
  request.set_with_pieces(flags.with_pieces);
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags.connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  const absl::StatusOr<v1::TokenizeResponse> response =
      (*client)->Tokenize(request, {flags.connection.deadline_seconds, nullptr});
  if (!response.ok()) return Report(response.status());
  const std::string out = flags.json    ? ToJson(*response)
                          : flags.count ? std::to_string(response->ids_size())
                                        : absl::StrJoin(response->ids(), ",");
  std::printf("%s\n", out.c_str());
  return kExitOk;
}

int RunDetokenize(const std::vector<std::string>& args) {
  TextFlags flags;
  FlagSet set(kDetokenizeUsage, kClientEnvPrefix);
  set.Section("Output");
  set.Add("skip-special", &flags.skip_special, "leave control tokens out");
  set.Add("json", &flags.json, "one JSON object");
  AddConnectionFlags(&set, &flags.connection);
  std::vector<std::string> positional;
  int exit_code = kExitOk;
  if (!ParseCommandLine(&set, args, 1, &positional, &exit_code)) return exit_code;
  const absl::StatusOr<std::string> text =
      positional.empty() ? ReadText("file", "-") : positional[0];
  if (!text.ok()) return ReportUsage(std::string(text.status().message()));
  v1::DetokenizeRequest request;
  if (const absl::Status status = ParseIds(*text, request.mutable_ids()); !status.ok()) {
    return ReportUsage(std::string(status.message()));
  }
  request.set_skip_special(flags.skip_special);
  const absl::StatusOr<std::unique_ptr<Client>> client = Client::Create(flags.connection.options);
  if (!client.ok()) return ReportUsage(std::string(client.status().message()));
  const absl::StatusOr<v1::DetokenizeResponse> response =
      (*client)->Detokenize(request, {flags.connection.deadline_seconds, nullptr});
  if (!response.ok()) return Report(response.status());
  std::printf("%s\n", (flags.json ? ToJson(*response) : response->text()).c_str());
  return kExitOk;
}

}  // namespace entropyserve
