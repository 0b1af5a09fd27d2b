// Messages to token ids, as each family's own chat template writes them. The model's template text
// is recognised, never executed; what is recognised is rendered by code here.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/tokenizer.h"

namespace entropyserve {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// A piece of a rendered conversation: a control token by name, or plain text.
struct ChatSegment {
  std::string text;
  bool is_control = false;
  bool operator==(const ChatSegment&) const = default;
};

struct RenderOptions {
  // False: the session already holds earlier turns. No BOS, no default system prompt, and a system
  // message is refused. (Llama 2 begins every user turn with <s>: it is that family's turn marker.)
  bool first_turn = true;
  // End with the header that asks for the assistant's answer.
  bool add_generation_prompt = true;
  // Qwen3's switch; absent means the template's own default, which is to think. Other families
  // ignore it.
  std::optional<bool> enable_thinking = std::nullopt;
  // "26 Jul 2024": what a template that states today's date writes (Llama 3.1 and later). Empty:
  // the template's own fixed date, so that the same messages always give the same ids.
  std::string date = "";
  KeepGoing keep_going = nullptr;  // see EncodeOptions
};

// Constant after construction; methods may run at the same time on several threads.
class ChatTemplate {
 public:
  enum class Family { kLlama2, kLlama3, kChatMl, kQwen3, kPangu };

  // Recognises tokenizer.chat_template(). `tokenizer` must outlive the result.
  // FAILED_PRECONDITION: no template, an unknown one, or a vocabulary without the family's control
  // tokens; the message says that `messages` cannot be used with this model but `text` can.
  static absl::StatusOr<ChatTemplate> Create(const Tokenizer& tokenizer);

  // Ids to prefill for `messages`. Content is always plain text: a control token written inside it
  // never becomes a control id.
  // INVALID_ARGUMENT names the field: no messages, an unknown role, a misplaced system message.
  absl::StatusOr<std::vector<int32_t>> Render(std::span<const ChatMessage> messages,
                                              const RenderOptions& options = {}) const;

  // The same before tokenization. Neighbouring text is joined, as tokenizers see it.
  absl::StatusOr<std::vector<ChatSegment>> RenderSegments(std::span<const ChatMessage> messages,
                                                          const RenderOptions& options = {}) const;

  // What closes an assistant's turn, to be fed before the next turn's messages; `last_id` is the
  // last sampled token: an end-of-turn marker already sampled is not repeated.
  std::vector<int32_t> ClosingIds(int32_t last_id) const;

  // The marker and the text after it that end an assistant's turn, e.g. <|im_end|> and a newline.
  const std::vector<int32_t>& end_of_turn_ids() const { return end_of_turn_ids_; }

  Family family() const { return family_; }
  std::string_view family_name() const;

 private:
  class Writer;
  ChatTemplate() = default;

  absl::Status Recognise(const std::string& text);
  absl::Status CheckMessages(std::span<const ChatMessage> messages,
                             const RenderOptions& options) const;
  void WriteChatMl(std::span<const ChatMessage> messages, const RenderOptions& options,
                   Writer* writer) const;
  void WriteLlama2(std::span<const ChatMessage> messages, Writer* writer) const;
  void WriteLlama3(std::span<const ChatMessage> messages, const RenderOptions& options,
                   Writer* writer) const;
  void WritePangu(std::span<const ChatMessage> messages, const RenderOptions& options,
                  Writer* writer) const;

  const Tokenizer* tokenizer_ = nullptr;
  Family family_ = Family::kChatMl;
  // ChatML: written when the first message is not a system message.
  std::optional<std::string> default_system_;
  bool dated_system_ = false;         // Llama 3.1 and later: the system header states dates
  bool has_thinking_switch_ = false;  // Qwen3: the template knows enable_thinking
  bool always_thinks_ = false;        // Qwen3, thinking only: the generation prompt opens <think>
  std::vector<int32_t> end_of_turn_ids_;
};

}  // namespace entropyserve
