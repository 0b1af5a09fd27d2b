#include "engine/text/chat_template.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/utf8.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

using Family = ChatTemplate::Family;

constexpr std::string_view kImStart = "<|im_start|>";
constexpr std::string_view kImEnd = "<|im_end|>";
constexpr std::string_view kHeaderStart = "<|start_header_id|>";
constexpr std::string_view kHeaderEnd = "<|end_header_id|>";
constexpr std::string_view kEot = "<|eot_id|>";
constexpr std::string_view kPanguStart = "[unused9]";
constexpr std::string_view kPanguEnd = "[unused10]";
constexpr std::string_view kThink = "<think>";
constexpr std::string_view kThinkEnd = "</think>";
// The date that the templates of Llama 3.1, 3.2 and 3.3 write when they are given none.
constexpr std::string_view kLlamaDate = "26 Jul 2024";

bool Has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Whether every <|name|> in the template is one of `known`: another marker means another format.
bool OnlyMarkers(std::string_view text, std::initializer_list<std::string_view> known) {
  for (size_t begin = text.find("<|"); begin != std::string_view::npos;
       begin = text.find("<|", begin + 2)) {
    const size_t end = text.find("|>", begin + 2);
    if (end == std::string_view::npos) return false;
    const std::string_view marker = text.substr(begin, end + 2 - begin);
    if (std::find(known.begin(), known.end(), marker) == known.end()) return false;
  }
  return true;
}

// A ChatML template writes its default system prompt as one literal:
// '<|im_start|>system\nYou are ...<|im_end|>\n'.
std::optional<std::string> FindDefaultSystem(std::string_view text) {
  constexpr std::string_view kOpen = "<|im_start|>system";
  for (size_t at = text.find(kOpen); at != std::string_view::npos; at = text.find(kOpen, at + 1)) {
    std::string_view rest = text.substr(at + kOpen.size());
    if (rest.starts_with("\\n")) {
      rest.remove_prefix(2);
    } else if (rest.starts_with("\n")) {
      rest.remove_prefix(1);
    } else {
      continue;
    }
    const size_t end = rest.find(kImEnd);
    if (end == std::string_view::npos) return std::nullopt;
    const std::string_view literal = rest.substr(0, end);
    if (literal.empty() || literal.find_first_of("'\"{}") != std::string_view::npos) continue;
    std::string prompt;
    for (size_t i = 0; i < literal.size(); ++i) {
      const bool newline = literal.substr(i).starts_with("\\n");
      prompt.push_back(newline ? '\n' : literal[i]);
      i += newline;
    }
    return prompt;
  }
  return std::nullopt;
}

// White space as the templates' trim() has it: Python's str.strip().
bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 ||
         c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}

std::string_view Trim(std::string_view text) {
  size_t begin = text.size();
  size_t end = 0;
  for (size_t pos = 0; pos < text.size();) {
    const Utf8Step step = NextUtf8(text.substr(pos));
    if (!step.valid || !IsSpace(DecodeUtf8(text.substr(pos), step.length))) {
      begin = std::min(begin, pos);
      end = pos + step.length;
    }
    pos += step.length;
  }
  return begin < end ? text.substr(begin, end - begin) : std::string_view();
}

std::string_view TrimNewlinesLeft(std::string_view text) {
  while (text.starts_with('\n')) text.remove_prefix(1);
  return text;
}

// Qwen3's answer: <think>, thought, </think>, the rest. Without the markers all of it is the rest.
struct Thought {
  std::string_view thought;
  std::string_view answer;
};

Thought SplitThought(std::string_view content) {
  const size_t last = content.rfind(kThinkEnd);
  if (last == std::string_view::npos) return {{}, content};
  std::string_view thought = content.substr(0, content.find(kThinkEnd));
  if (const size_t begin = thought.rfind(kThink); begin != std::string_view::npos) {
    thought.remove_prefix(begin + kThink.size());
  }
  while (thought.ends_with('\n')) thought.remove_suffix(1);
  return {TrimNewlinesLeft(thought), TrimNewlinesLeft(content.substr(last + kThinkEnd.size()))};
}

}  // namespace

// Builds segments; neighbouring text becomes one.
class ChatTemplate::Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  Writer& Control(std::string_view name) {
    segments_.push_back({std::string(name), true});
    return *this;
  }
  Writer& Text(std::string_view text) {
    if (text.empty()) return *this;
    if (segments_.empty() || segments_.back().is_control) segments_.push_back({"", false});
    segments_.back().text.append(text);
    return *this;
  }
  // A marker that some vocabularies declare as control and others as text (<think>).
  Writer& Marker(std::string_view name) {
    return tokenizer_.FindControl(name).has_value() ? Control(name) : Text(name);
  }
  Writer& Bos() {
    const std::optional<int32_t> bos = tokenizer_.bos_id();
    return bos.has_value() ? Control(tokenizer_.TokenBytes(*bos)) : *this;
  }
  std::vector<ChatSegment> Take() { return std::move(segments_); }

 private:
  const Tokenizer& tokenizer_;
  std::vector<ChatSegment> segments_;
};

absl::StatusOr<ChatTemplate> ChatTemplate::Create(const Tokenizer& tokenizer) {
  ChatTemplate result;
  result.tokenizer_ = &tokenizer;
  RETURN_IF_ERROR(result.Recognise(tokenizer.chat_template()));

  std::vector<std::string_view> needed;
  std::string_view closing;
  std::string_view text_after;
  switch (result.family_) {
    case Family::kLlama2:
      needed = {"<s>", "</s>"};
      closing = "</s>";
      break;
    case Family::kLlama3:
      needed = {kHeaderStart, kHeaderEnd, kEot};
      closing = kEot;
      break;
    case Family::kChatMl:
    case Family::kQwen3:
      needed = {kImStart, kImEnd};
      closing = kImEnd;
      text_after = "\n";
      break;
    case Family::kPangu:
      needed = {kPanguStart, kPanguEnd};
      closing = kPanguEnd;
      break;
  }
  for (const std::string_view name : needed) {
    if (!tokenizer.FindControl(name).has_value()) {
      return absl::FailedPreconditionError(
          absl::StrCat("messages: the model's chat template is ", std::string(result.family_name()),
                       ", but its vocabulary has no control token ", std::string(name),
                       "; messages cannot be used with this model, text can"));
    }
  }
  result.end_of_turn_ids_ = {*tokenizer.FindControl(closing)};
  ASSIGN_OR_RETURN(const std::vector<int32_t> after,
                   tokenizer.Encode(text_after, {.text_start = false}));
  result.end_of_turn_ids_.insert(result.end_of_turn_ids_.end(), after.begin(), after.end());
  return result;
}

absl::Status ChatTemplate::Recognise(const std::string& text) {
  const auto refuse = [](const char* why) {
    return absl::FailedPreconditionError(
        absl::StrCat("messages: ", why, "; messages cannot be used with this model, text can"));
  };
  if (text.empty()) return refuse("the model has no chat template");
  if (Has(text, kPanguStart) && Has(text, kPanguEnd) && Has(text, "系统")) {
    family_ = Family::kPangu;
    return absl::OkStatus();
  }
  if (Has(text, kHeaderStart) && Has(text, kEot) &&
      OnlyMarkers(text, {kHeaderStart, kHeaderEnd, kEot, "<|begin_of_text|>", "<|eom_id|>",
                         "<|python_tag|>", "<|end_of_text|>"})) {
    family_ = Family::kLlama3;
    dated_system_ = Has(text, "Cutting Knowledge Date");
    return absl::OkStatus();
  }
  if (Has(text, kImStart) && Has(text, kImEnd) &&
      OnlyMarkers(text, {kImStart, kImEnd, "<|endoftext|>"})) {
    if (Has(text, "</think>")) {
      if (Has(text, "'<think>\\n'")) {
        return refuse("the model's chat template opens <think> in a way that is not known");
      }
      family_ = Family::kQwen3;
      has_thinking_switch_ = Has(text, "enable_thinking");
      always_thinks_ = Has(text, "<|im_start|>assistant\\n<think>") ||
                       Has(text, "<|im_start|>assistant\n<think>");
      return absl::OkStatus();
    }
    family_ = Family::kChatMl;
    default_system_ = FindDefaultSystem(text);
    const bool wants_default = Has(text, "!= 'system'") || Has(text, "!= \"system\"");
    if (!default_system_.has_value() && wants_default) {
      return refuse("the default system prompt of the model's chat template is not understood");
    }
    return absl::OkStatus();
  }
  // Some conversions write a long default system prompt behind "true == true"; Llama 2's own has
  // none.
  if (Has(text, "[INST]") && Has(text, "<<SYS>>") && OnlyMarkers(text, {}) &&
      !Has(text, "true == true")) {
    family_ = Family::kLlama2;
    return absl::OkStatus();
  }
  return refuse("the model's chat template is not one of the known ones");
}

std::string_view ChatTemplate::family_name() const {
  switch (family_) {
    case Family::kLlama2:
      return "Llama 2";
    case Family::kLlama3:
      return "Llama 3";
    case Family::kChatMl:
      return "ChatML";
    case Family::kQwen3:
      return "Qwen3";
    case Family::kPangu:
      return "openPangu";
  }
  Check(false, "a known family");
  return "";
}

absl::Status ChatTemplate::CheckMessages(std::span<const ChatMessage> messages,
                                         const RenderOptions& options) const {
  if (messages.empty()) return absl::InvalidArgumentError("messages: must not be empty");
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string field = absl::StrCat("messages[", i, "].role: ");
    const std::string& role = messages[i].role;
    if (role != "system" && role != "user" && role != "assistant") {
      return absl::InvalidArgumentError(absl::StrCat(field, "must be system, user or assistant"));
    }
    if (role == "system" && !options.first_turn) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, "a system message belongs to the session's first turn"));
    }
    if (family_ != Family::kLlama2) continue;
    // This family's template refuses anything but an optional system message, then turns.
    const size_t turn = i - (messages[0].role == "system" ? 1 : 0);
    if (role == "system" ? i > 0 : (role == "user") != (turn % 2 == 0)) {
      return absl::InvalidArgumentError(absl::StrCat(
          field, "for this model, user and assistant must take turns after one system message"));
    }
    if (role == "system" && messages.size() == 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, "for this model, a user message must follow the system message"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ChatSegment>> ChatTemplate::RenderSegments(
    std::span<const ChatMessage> messages, const RenderOptions& options) const {
  RETURN_IF_ERROR(CheckMessages(messages, options));
  Writer writer(*tokenizer_);
  switch (family_) {
    case Family::kLlama2:
      WriteLlama2(messages, &writer);
      break;
    case Family::kLlama3:
      WriteLlama3(messages, options, &writer);
      break;
    case Family::kChatMl:
    case Family::kQwen3:
      WriteChatMl(messages, options, &writer);
      break;
    case Family::kPangu:
      WritePangu(messages, options, &writer);
      break;
  }
  return writer.Take();
}

// <|im_start|>role \n content <|im_end|> \n
void ChatTemplate::WriteChatMl(std::span<const ChatMessage> messages, const RenderOptions& options,
                               Writer* writer) const {
  const auto write = [&](std::string_view role, std::string_view content) {
    writer->Control(kImStart).Text(role).Text("\n").Text(content).Control(kImEnd).Text("\n");
  };
  if (options.first_turn && tokenizer_->add_bos()) writer->Bos();
  if (options.first_turn && default_system_.has_value() && messages[0].role != "system") {
    write("system", *default_system_);
  }
  const auto is_user = [](const ChatMessage& m) { return m.role == "user"; };
  const auto last_user = std::find_if(messages.rbegin(), messages.rend(), is_user);
  for (auto message = messages.begin(); message != messages.end(); ++message) {
    if (family_ != Family::kQwen3 || message->role != "assistant") {
      write(message->role, message->content);
      continue;
    }
    // Qwen3: what an answer thought is kept only behind the last question.
    const auto [thought, answer] = SplitThought(message->content);
    const bool behind = last_user != messages.rend() && message > last_user.base() - 1;
    if (!behind || (thought.empty() && message + 1 != messages.end())) {
      write(message->role, answer);
      continue;
    }
    writer->Control(kImStart).Text("assistant\n").Marker(kThink).Text("\n").Text(thought);
    writer->Text("\n").Marker(kThinkEnd).Text("\n\n").Text(TrimNewlinesLeft(answer));
    writer->Control(kImEnd).Text("\n");
  }
  if (!options.add_generation_prompt) return;
  writer->Control(kImStart).Text("assistant\n");
  if (family_ != Family::kQwen3) return;
  if (always_thinks_) {
    writer->Marker(kThink).Text("\n");
  } else if (has_thinking_switch_ && !options.enable_thinking.value_or(true)) {
    writer->Marker(kThink).Text("\n\n").Marker(kThinkEnd).Text("\n\n");
  }
}

// <s>[INST] <<SYS>>...<</SYS>> question [/INST] answer </s>; the next question begins with <s>
// again, in a later turn too, and its header needs no generation prompt.
void ChatTemplate::WriteLlama2(std::span<const ChatMessage> messages, Writer* writer) const {
  std::string system;
  if (messages[0].role == "system") {
    system = absl::StrCat("<<SYS>>\n", messages[0].content, "\n<</SYS>>\n\n");
    messages = messages.subspan(1);
  }
  for (const ChatMessage& message : messages) {
    if (message.role == "user") {
      const std::string content = std::exchange(system, "") + message.content;
      writer->Control("<s>").Text("[INST] ").Text(Trim(content)).Text(" [/INST]");
    } else {
      writer->Text(" ").Text(Trim(message.content)).Text(" ").Control("</s>");
    }
  }
}

// <|start_header_id|>role<|end_header_id|> \n\n content <|eot_id|>
void ChatTemplate::WriteLlama3(std::span<const ChatMessage> messages, const RenderOptions& options,
                               Writer* writer) const {
  const auto header = [&](std::string_view role) -> Writer& {
    return writer->Control(kHeaderStart).Text(role).Control(kHeaderEnd).Text("\n\n");
  };
  if (options.first_turn) {
    writer->Bos();
    if (dated_system_) {
      // Written even without a system message; what follows the dates is that message or nothing.
      std::string_view system;
      if (messages[0].role == "system") {
        system = Trim(messages[0].content);
        messages = messages.subspan(1);
      }
      const std::string_view date = options.date.empty() ? kLlamaDate : options.date;
      header("system")
          .Text("Cutting Knowledge Date: December 2023\nToday Date: ")
          .Text(date)
          .Text("\n\n")
          .Text(system)
          .Control(kEot);
    }
  }
  for (const ChatMessage& message : messages) {
    header(message.role).Text(Trim(message.content)).Control(kEot);
  }
  if (options.add_generation_prompt) header("assistant");
}

// [unused9]role：content[unused10]; a system part is always there, possibly empty.
void ChatTemplate::WritePangu(std::span<const ChatMessage> messages, const RenderOptions& options,
                              Writer* writer) const {
  if (options.first_turn) {
    if (tokenizer_->add_bos()) writer->Bos();
    if (messages[0].role != "system") {
      writer->Control(kPanguStart).Text("系统：").Control(kPanguEnd);
    }
  }
  for (const ChatMessage& message : messages) {
    const std::string_view role = message.role == "system" ? "系统："
                                  : message.role == "user" ? "用户："
                                                           : "助手：";
    writer->Control(kPanguStart).Text(role).Text(message.content).Control(kPanguEnd);
  }
  if (options.add_generation_prompt) writer->Control(kPanguStart).Text("助手：");
}

absl::StatusOr<std::vector<int32_t>> ChatTemplate::Render(std::span<const ChatMessage> messages,
                                                          const RenderOptions& options) const {
  ASSIGN_OR_RETURN(const std::vector<ChatSegment> segments, RenderSegments(messages, options));
  std::vector<int32_t> ids;
  for (const ChatSegment& segment : segments) {
    if (segment.is_control) {
      const std::optional<int32_t> id = tokenizer_->FindControl(segment.text);
      Check(id.has_value(), "Create has looked the family's control tokens up");
      ids.push_back(*id);
      continue;
    }
    ASSIGN_OR_RETURN(const std::vector<int32_t> text,
                     tokenizer_->Encode(segment.text, {.text_start = ids.empty(),
                                                       .keep_going = options.keep_going}));
    ids.insert(ids.end(), text.begin(), text.end());
  }
  return ids;
}

std::vector<int32_t> ChatTemplate::ClosingIds(int32_t last_id) const {
  const bool closed = last_id == end_of_turn_ids_.front();
  return {end_of_turn_ids_.begin() + (closed ? 1 : 0), end_of_turn_ids_.end()};
}

}  // namespace entropyserve
