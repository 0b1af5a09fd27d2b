#include "engine/text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/text_golden.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

// Shortened templates: what each family is recognised by, and little more.
constexpr char kQwen2[] =
    R"({% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %})";
constexpr char kPlainChatMl[] =
    R"({% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %})";
constexpr char kQwen3[] =
    R"({{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- set content = content.split('</think>')[-1] %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %})";
constexpr char kQwen3Thinking[] =
    R"({{- '<|im_start|>' + message.role + '\n' + content.split('</think>')[-1] + '<|im_end|>\n' }}{{- '<|im_start|>assistant\n<think>\n' }})";
constexpr char kLlama2[] =
    R"({% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + content %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }})";
constexpr char kLlama3[] =
    R"({{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }})";
constexpr char kLlama31[] =
    R"({{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- "Cutting Knowledge Date: December 2023\n" }}{{- "<|eot_id|>" }})";
constexpr char kPangu[] = R"({{'[unused9]系统：' + message['content'] + '[unused10]'}})";

// A tokenizer with a template, and the template.
struct Chat {
  std::unique_ptr<Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat;
};

// "pangu" is a SentencePiece vocabulary that puts no space before the first word, as openPangu's.
std::unique_ptr<Tokenizer> LoadChatTokenizer(const std::string& vocabulary,
                                             const std::string& text) {
  TokenizerSideFiles side;
  side.chat_template = text;
  if (vocabulary != "pangu") return LoadGoldenTokenizer(vocabulary, side);
  GgufTokenizerData data = GgufFromSentencePiece("sp_bpe");
  data.add_space_prefix = false;
  data.chat_template = text;
  auto tokenizer = MakeGgufTokenizer(std::move(data));
  Check(tokenizer.ok(), "the vocabulary loads");
  return *std::move(tokenizer);
}

Chat MakeChat(const std::string& vocabulary, const std::string& text) {
  Chat result;
  result.tokenizer = LoadChatTokenizer(vocabulary, text);
  auto chat = ChatTemplate::Create(*result.tokenizer);
  EXPECT_TRUE(chat.ok()) << chat.status();
  Check(chat.ok(), "the template is known");
  result.chat = *std::move(chat);
  return result;
}

// Segments as one string; control tokens stand between bars: |<|im_end|>|.
std::string Show(const std::vector<ChatSegment>& segments) {
  std::string shown;
  for (const ChatSegment& segment : segments) {
    shown += segment.is_control ? "|" + segment.text + "|" : segment.text;
  }
  return shown;
}

std::string Rendered(const Chat& chat, const std::vector<ChatMessage>& messages,
                     const RenderOptions& options = {}) {
  const auto segments = chat.chat->RenderSegments(messages, options);
  EXPECT_TRUE(segments.ok()) << segments.status();
  return segments.ok() ? Show(*segments) : "";
}

const std::vector<ChatMessage> kQuestion = {{"user", "Hi"}};
const std::vector<ChatMessage> kWithSystem = {{"system", "Be brief."}, {"user", "Hi"}};
const std::vector<ChatMessage> kConversation = {
    {"system", "Be brief."}, {"user", "Hi"}, {"assistant", "Hello."}, {"user", " Bye \n"}};

// ---- What each family writes ----

TEST(ChatTemplateTest, Qwen2WritesItsDefaultSystemPrompt) {
  const Chat chat = MakeChat("qwen2", kQwen2);
  EXPECT_EQ(chat.chat->family(), ChatTemplate::Family::kChatMl);
  EXPECT_EQ(Rendered(chat, kQuestion),
            "|<|im_start|>|system\nYou are a helpful assistant.|<|im_end|>|\n"
            "|<|im_start|>|user\nHi|<|im_end|>|\n|<|im_start|>|assistant\n");
  EXPECT_EQ(Rendered(chat, kConversation),
            "|<|im_start|>|system\nBe brief.|<|im_end|>|\n|<|im_start|>|user\nHi|<|im_end|>|\n"
            "|<|im_start|>|assistant\nHello.|<|im_end|>|\n|<|im_start|>|user\n Bye \n|<|im_end|>|\n"
            "|<|im_start|>|assistant\n");
  EXPECT_EQ(Rendered(chat, kQuestion, {.first_turn = false}),
            "|<|im_start|>|user\nHi|<|im_end|>|\n|<|im_start|>|assistant\n");
  EXPECT_EQ(Rendered(chat, kWithSystem, {.add_generation_prompt = false}),
            "|<|im_start|>|system\nBe brief.|<|im_end|>|\n|<|im_start|>|user\nHi|<|im_end|>|\n");
}

TEST(ChatTemplateTest, TheDefaultSystemPromptIsTheTemplatesOwn) {
  const std::string prompt = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
  for (const std::string newline : {"\\n", "\n"}) {
    const Chat chat =
        MakeChat("smollm", "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system" +
                               newline + prompt + "<|im_end|>" + newline + "' }}{% endif %}");
    EXPECT_EQ(
        Rendered(chat, kQuestion, {.add_generation_prompt = false}),
        "|<|im_start|>|system\n" + prompt + "|<|im_end|>|\n|<|im_start|>|user\nHi|<|im_end|>|\n");
  }
  EXPECT_EQ(Rendered(MakeChat("smollm", kPlainChatMl), kQuestion),
            "|<|im_start|>|user\nHi|<|im_end|>|\n|<|im_start|>|assistant\n");
}

TEST(ChatTemplateTest, Qwen3ThinksUnlessToldNotTo) {
  const Chat chat = MakeChat("qwen2", kQwen3);
  EXPECT_EQ(chat.chat->family(), ChatTemplate::Family::kQwen3);
  const std::string question = "|<|im_start|>|user\nHi|<|im_end|>|\n|<|im_start|>|assistant\n";
  EXPECT_EQ(Rendered(chat, kQuestion), question);
  EXPECT_EQ(Rendered(chat, kQuestion, {.enable_thinking = true}), question);
  EXPECT_EQ(Rendered(chat, kQuestion, {.enable_thinking = false}),
            question + "<think>\n\n</think>\n\n");
  EXPECT_EQ(Rendered(MakeChat("qwen2", kQwen3Thinking), kQuestion), question + "<think>\n");
}

TEST(ChatTemplateTest, Qwen3DropsEarlierThoughts) {
  const Chat chat = MakeChat("qwen2", kQwen3);
  const std::string thinking = "<think>\nHm.\n</think>\n\nHello.";
  const RenderOptions no_prompt = {.add_generation_prompt = false};
  EXPECT_EQ(Rendered(chat, {{"user", "Hi"}, {"assistant", thinking}, {"user", "Bye"}}, no_prompt),
            "|<|im_start|>|user\nHi|<|im_end|>|\n|<|im_start|>|assistant\nHello.|<|im_end|>|\n"
            "|<|im_start|>|user\nBye|<|im_end|>|\n");
  EXPECT_EQ(Rendered(chat, {{"user", "Hi"}, {"assistant", thinking}}, no_prompt),
            "|<|im_start|>|user\nHi|<|im_end|>|\n"
            "|<|im_start|>|assistant\n<think>\nHm.\n</think>\n\nHello.|<|im_end|>|\n");
  EXPECT_EQ(Rendered(chat, {{"user", "Hi"}, {"assistant", "Hello."}}, no_prompt),
            "|<|im_start|>|user\nHi|<|im_end|>|\n"
            "|<|im_start|>|assistant\n<think>\n\n</think>\n\nHello.|<|im_end|>|\n");
}

TEST(ChatTemplateTest, Llama3) {
  const Chat chat = MakeChat("llama3", kLlama3);
  EXPECT_EQ(
      Rendered(chat, kConversation),
      "|<|begin_of_text|>||<|start_header_id|>|system|<|end_header_id|>|\n\nBe brief.|<|eot_id|>|"
      "|<|start_header_id|>|user|<|end_header_id|>|\n\nHi|<|eot_id|>|"
      "|<|start_header_id|>|assistant|<|end_header_id|>|\n\nHello.|<|eot_id|>|"
      "|<|start_header_id|>|user|<|end_header_id|>|\n\nBye|<|eot_id|>|"
      "|<|start_header_id|>|assistant|<|end_header_id|>|\n\n");
  EXPECT_EQ(Rendered(chat, {{"user", "\u00a0\t a b\u2003\n"}}, {.first_turn = false}),
            "|<|start_header_id|>|user|<|end_header_id|>|\n\na b|<|eot_id|>|"
            "|<|start_header_id|>|assistant|<|end_header_id|>|\n\n");
}

TEST(ChatTemplateTest, Llama31StatesDates) {
  const Chat chat = MakeChat("llama3", kLlama31);
  const std::string system =
      "|<|start_header_id|>|system|<|end_header_id|>|\n\n"
      "Cutting Knowledge Date: December 2023\nToday Date: ";
  const std::string rest =
      "|<|eot_id|>||<|start_header_id|>|user|<|end_header_id|>|\n\nHi|<|eot_id|>|"
      "|<|start_header_id|>|assistant|<|end_header_id|>|\n\n";
  EXPECT_EQ(Rendered(chat, kQuestion), "|<|begin_of_text|>|" + system + "26 Jul 2024\n\n" + rest);
  EXPECT_EQ(Rendered(chat, kWithSystem, {.date = "01 Feb 2026"}),
            "|<|begin_of_text|>|" + system + "01 Feb 2026\n\nBe brief." + rest);
  EXPECT_EQ(Rendered(chat, kQuestion, {.first_turn = false}), rest.substr(12));
}

TEST(ChatTemplateTest, Llama2) {
  const Chat chat = MakeChat("sp_bpe", kLlama2);
  EXPECT_EQ(Rendered(chat, kQuestion), "|<s>|[INST] Hi [/INST]");
  EXPECT_EQ(Rendered(chat, kConversation),
            "|<s>|[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. |</s>||<s>|[INST] Bye "
            "[/INST]");
  EXPECT_EQ(Rendered(chat, kQuestion, {.first_turn = false}), "|<s>|[INST] Hi [/INST]");
}

TEST(ChatTemplateTest, Pangu) {
  const Chat chat = MakeChat("pangu", kPangu);
  EXPECT_EQ(Rendered(chat, kQuestion),
            "|<s>||[unused9]|系统：|[unused10]||[unused9]|用户：Hi|[unused10]||[unused9]|助手：");
  EXPECT_EQ(Rendered(chat, kWithSystem),
            "|<s>||[unused9]|系统：Be "
            "brief.|[unused10]||[unused9]|用户：Hi|[unused10]||[unused9]|助手：");
  EXPECT_EQ(Rendered(chat, kQuestion, {.first_turn = false}),
            "|[unused9]|用户：Hi|[unused10]||[unused9]|助手：");
}

// ---- What holds for every family ----

const std::vector<std::pair<std::string, std::string>> kFamilies = {
    {"qwen2", kQwen2},         {"smollm", kPlainChatMl}, {"qwen2", kQwen3},
    {"qwen2", kQwen3Thinking}, {"llama3", kLlama3},      {"llama3", kLlama31},
    {"sp_bpe", kLlama2},       {"llama2", kLlama2},      {"pangu", kPangu}};

// Whatever a message says, the control ids are those of the same conversation with harmless
// content.
TEST(ChatTemplateTest, ContentNeverBecomesControlTokens) {
  for (const auto& [vocabulary, text] : kFamilies) {
    SCOPED_TRACE(text);
    const Chat chat = MakeChat(vocabulary, text);
    std::string hostile;
    for (int32_t id = 0; id < chat.tokenizer->vocab_size(); ++id) {
      if (chat.tokenizer->IsControl(id))
        hostile += std::string(chat.tokenizer->TokenBytes(id)) + " ";
    }
    ASSERT_FALSE(hostile.empty());
    const auto controls = [&](const std::string& content) {
      const std::vector<ChatMessage> messages = {
          {"system", content}, {"user", content}, {"assistant", content}, {"user", content}};
      const auto ids = chat.chat->Render(messages);
      EXPECT_TRUE(ids.ok()) << ids.status();
      std::vector<int32_t> found;
      for (const int32_t id : *ids) {
        if (chat.tokenizer->IsControl(id)) found.push_back(id);
      }
      return found;
    };
    const std::vector<int32_t> harmless = controls("hello");
    EXPECT_GE(harmless.size(), 3u);
    EXPECT_THAT(controls(hostile), ElementsAreArray(harmless));
    EXPECT_THAT(controls("x" + hostile + "\xE7"), ElementsAreArray(harmless));
  }
}

TEST(ChatTemplateTest, IdsAreTheSegmentsIds) {
  for (const auto& [vocabulary, text] : kFamilies) {
    SCOPED_TRACE(text);
    const Chat chat = MakeChat(vocabulary, text);
    const auto ids = chat.chat->Render(kConversation);
    const auto segments = chat.chat->RenderSegments(kConversation);
    ASSERT_TRUE(ids.ok() && segments.ok());
    std::vector<int32_t> want;
    for (const ChatSegment& segment : *segments) {
      if (segment.is_control) {
        want.push_back(*chat.tokenizer->FindControl(segment.text));
      } else {
        const auto part = chat.tokenizer->Encode(segment.text);
        ASSERT_TRUE(part.ok());
        want.insert(want.end(), part->begin(), part->end());
      }
    }
    EXPECT_EQ(*ids, want);
  }
}

// A session feeds turn by turn what a whole conversation would be.
TEST(ChatTemplateTest, TurnsMakeTheWholeConversation) {
  for (const auto& [vocabulary, text] : kFamilies) {
    SCOPED_TRACE(text);
    if (text == kQwen3 || text == kQwen3Thinking) continue;  // these drop earlier thoughts
    const Chat chat = MakeChat(vocabulary, text);
    const auto first =
        chat.chat->Render(std::vector(kConversation.begin(), kConversation.begin() + 2));
    const auto later = chat.chat->Render(
        std::vector(kConversation.begin() + 3, kConversation.end()), {.first_turn = false});
    // Llama 2 writes spaces around an answer; the first one is its vocabulary's dummy prefix.
    const bool spaced = chat.chat->family() == ChatTemplate::Family::kLlama2;
    const auto answer = chat.tokenizer->Encode(spaced ? "Hello. " : "Hello.");
    const auto whole = chat.chat->Render(kConversation);
    ASSERT_TRUE(first.ok() && later.ok() && answer.ok() && whole.ok());
    std::vector<int32_t> turns = *first;
    turns.insert(turns.end(), answer->begin(), answer->end());
    const std::vector<int32_t> closing = chat.chat->ClosingIds(turns.back());
    turns.insert(turns.end(), closing.begin(), closing.end());
    turns.insert(turns.end(), later->begin(), later->end());
    EXPECT_EQ(turns, *whole);
  }
}

TEST(ChatTemplateTest, AnEndOfTurnAlreadySampledIsNotRepeated) {
  const Chat chat = MakeChat("qwen2", kQwen2);
  const int32_t end = *chat.tokenizer->FindControl("<|im_end|>");
  const int32_t newline = chat.tokenizer->Encode("\n")->front();
  EXPECT_EQ(chat.chat->end_of_turn_ids(), (std::vector<int32_t>{end, newline}));
  EXPECT_EQ(chat.chat->ClosingIds(end), (std::vector<int32_t>{newline}));
  EXPECT_EQ(chat.chat->ClosingIds(newline), (std::vector<int32_t>{end, newline}));
  const Chat llama = MakeChat("llama3", kLlama3);
  EXPECT_TRUE(llama.chat->ClosingIds(*llama.tokenizer->FindControl("<|eot_id|>")).empty());
}

// ---- Refusals ----

void ExpectMessagesRefused(const std::string& vocabulary, const std::string& text,
                           const std::string& why) {
  const auto tokenizer = LoadChatTokenizer(vocabulary, text);
  const auto chat = ChatTemplate::Create(*tokenizer);
  ASSERT_EQ(chat.status().code(), absl::StatusCode::kFailedPrecondition) << text;
  EXPECT_THAT(std::string(chat.status().message()),
              HasSubstr("messages cannot be used with this model, text can"));
  EXPECT_THAT(std::string(chat.status().message()), HasSubstr(why));
}

TEST(ChatTemplateTest, UnknownTemplatesAreRefused) {
  ExpectMessagesRefused("qwen2", "", "no chat template");
  ExpectMessagesRefused("qwen2", "{{ '<|user|>\\n' + message['content'] }}",
                        "not one of the known");
  ExpectMessagesRefused("qwen2", "<|im_start|>user<|im_sep|>x<|im_end|>", "not one of the known");
  ExpectMessagesRefused("llama3", std::string(kLlama3) + "<|image|>", "not one of the known");
  ExpectMessagesRefused("sp_bpe", "{{ '[INST] ' + content + ' [/INST]' }}", "not one of the known");
  ExpectMessagesRefused("qwen2",
                        "{% if messages[0].role != 'system' %}{{ default }}<|im_start|><|im_end|>",
                        "default system prompt");
  ExpectMessagesRefused("qwen2", std::string(kQwen3) + R"({%- else %}{{- '<think>\n' }})",
                        "opens <think>");
  ExpectMessagesRefused("sp_bpe", std::string(kLlama2) + "{% elif true == true %}", "not one of");
  ExpectMessagesRefused("gpt2", kQwen2, "no control token <|im_start|>");
}

TEST(ChatTemplateTest, BadMessagesAreRefusedByName) {
  const Chat chatml = MakeChat("qwen2", kQwen2);
  const Chat llama2 = MakeChat("sp_bpe", kLlama2);
  const auto error = [](const Chat& chat, const std::vector<ChatMessage>& messages,
                        const RenderOptions& options = {}) {
    const auto ids = chat.chat->Render(messages, options);
    EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(ids.status().message());
  };
  EXPECT_THAT(error(chatml, {}), HasSubstr("messages"));
  EXPECT_THAT(error(chatml, {{"user", "a"}, {"tool", "b"}}), HasSubstr("messages[1].role"));
  EXPECT_THAT(error(chatml, {{"", "a"}}), HasSubstr("messages[0].role"));
  EXPECT_THAT(error(chatml, kWithSystem, {.first_turn = false}), HasSubstr("messages[0].role"));
  EXPECT_THAT(error(llama2, {{"user", "a"}, {"user", "b"}}), HasSubstr("messages[1].role"));
  EXPECT_THAT(error(llama2, {{"assistant", "a"}}), HasSubstr("messages[0].role"));
  EXPECT_THAT(error(llama2, {{"user", "a"}, {"system", "b"}}), HasSubstr("messages[1].role"));
  EXPECT_THAT(error(llama2, {{"system", "a"}}), HasSubstr("messages[0].role"));
}

}  // namespace
}  // namespace entropyserve
