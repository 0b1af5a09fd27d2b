#include "client/prompt_flags.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/command.h"
#include "client/request_flags.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// A document and the question about it, or either alone.
absl::StatusOr<std::string> PromptText(const PromptFlags& prompt, const std::string& argument,
                                       bool has_argument) {
  std::string text = argument;
  if (!prompt.file.empty() || !has_argument || argument == "-") {
    ASSIGN_OR_RETURN(text, ReadText("file", prompt.file.empty() ? "-" : prompt.file));
  }
  if (!prompt.file.empty() && has_argument) text += "\n\n" + argument;
  if (!text.empty()) return text;
  return absl::InvalidArgumentError(
      "the prompt is empty; give it as an argument, with --file, or on standard input");
}

}  // namespace

void AddPromptFlags(FlagSet* flags, PromptFlags* prompt, v1::GenerateRequest* request) {
  flags->Section("Prompt");
  flags->Add("file", &prompt->file, "read the prompt from this file; - is standard input");
  flags->Add("raw", &prompt->raw, "send plain text, without the model's chat template");
  flags->Add("system", &prompt->system, "a system message before the prompt");
  flags->Add("thinking", &prompt->thinking,
             "whether the model may think first, where it has a switch");
  flags->Add("token-ids", &prompt->token_ids, "the prompt as ids, e.g. 1,2,3");
  flags->AddSwitch("parse-special", "false", "with --raw, read control tokens from the text",
                   [request](bool value) { request->set_parse_special(value); });
  flags->AddCustom("session", "", "continue this session", [request](std::string_view text) {
    request->set_session_id(std::string(text));
    return absl::OkStatus();
  });
  flags->AddCustom("request-id", "", "a name for the server's log",
                   [request](std::string_view text) {
                     request->set_request_id(std::string(text));
                     return absl::OkStatus();
                   });
}

absl::Status FillPrompt(const PromptFlags& prompt, const std::vector<std::string>& positional,
                        v1::GenerateRequest* request) {
  if (!prompt.token_ids.empty()) {
    for (const auto& [given, name] :
         {std::pair(!prompt.system.empty(), "--system"), std::pair(!prompt.file.empty(), "--file"),
          std::pair(!positional.empty(), "the prompt's text")}) {
      if (given)
        return absl::InvalidArgumentError(absl::StrCat(name, ": --token-ids is the whole prompt"));
    }
    const absl::Status parsed =
        ParseIds(prompt.token_ids, request->mutable_token_ids()->mutable_ids());
    if (parsed.ok()) return parsed;
    return absl::InvalidArgumentError(absl::StrCat("--token-ids: ", parsed.message()));
  }
  if (request->parse_special() && !prompt.raw) {
    return absl::InvalidArgumentError(
        "--parse-special: a message's control tokens stay text; it goes with --raw");
  }
  const std::string argument = positional.empty() ? "" : positional[0];
  RETURN_IF_ERROR(CheckUtf8("the prompt's text", argument));
  RETURN_IF_ERROR(CheckUtf8("--system: the text", prompt.system));
  ASSIGN_OR_RETURN(std::string text, PromptText(prompt, argument, !positional.empty()));
  if (prompt.raw) {
    if (!prompt.system.empty()) {
      return absl::InvalidArgumentError(
          "--system: plain text has no system message; leave out --raw, or write it into the text");
    }
    if (prompt.thinking.has_value()) {
      return absl::InvalidArgumentError(
          "--thinking: plain text has no template with a switch; leave out --raw");
    }
    request->set_text(std::move(text));
    return absl::OkStatus();
  }
  v1::Messages& messages = *request->mutable_messages();
  if (prompt.thinking.has_value()) messages.set_enable_thinking(*prompt.thinking);
  const auto add = [&messages](const char* role, const std::string& content) {
    v1::Message& message = *messages.add_messages();
    message.set_role(role);
    message.set_content(content);
  };
  if (!prompt.system.empty()) add("system", prompt.system);
  add("user", text);
  return absl::OkStatus();
}

}  // namespace entropyserve
