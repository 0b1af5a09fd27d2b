// Text to token ids and back, for byte-level BPE (Llama 3, Qwen, SmolLM2, GPT-2) and SentencePiece
// (Llama 2, openPangu) vocabularies.
//
// Three kinds of tokens: text; user-defined (declared by the vocabulary as text that is never
// split, such as <tool_call>, and found in any text); control (<|im_end|>, BOS, ...), which text
// never produces unless EncodeOptions::parse_special asks for it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/work_meter.h"

namespace entropyserve {

struct EncodeOptions {
  // Put BOS first, where the vocabulary has one. Callers pass Tokenizer::add_bos() for the model's
  // own habit.
  bool add_bos = false;
  // Control tokens written out in the text become their ids. For trusted text only.
  bool parse_special = false;
  // The text begins the sequence. False: it follows a control token, and a vocabulary that puts a
  // space before the first word only (Metaspace "first") does not.
  bool text_start = true;
  // Asked now and then; its error ends Encode. For callers that may have left meanwhile.
  KeepGoing keep_going = nullptr;
};

// What a GGUF file says about its tokenizer; keys are tokenizer.ggml.* unless noted.
struct GgufTokenizerData {
  std::string model;                     // "gpt2": byte-level BPE; "llama": SentencePiece
  std::string pre;                       // byte-level only: "llama-bpe", "qwen2", "smollm", "gpt-2"
  std::vector<std::string> tokens;       // by id
  std::vector<float> scores;             // by id; "llama" needs it
  std::vector<int32_t> types;            // token_type by id: 1 normal .. 6 byte; empty: all normal
  std::vector<std::string> merges;       // "left right"; "gpt2" needs it
  int32_t bos_id = -1;                   // bos_token_id; -1: absent
  int32_t eos_id = -1;                   // eos_token_id
  int32_t eot_id = -1;                   // eot_token_id, a second end
  int32_t unk_id = -1;                   // unknown_token_id
  std::optional<bool> add_bos;           // add_bos_token; absent: what the model or `pre` implies
  std::optional<bool> add_space_prefix;  // "llama" only; absent: true
  std::string chat_template;             // tokenizer.chat_template; empty: none
};

enum class TokenKind : uint8_t { kText, kUserDefined, kControl };

// What every vocabulary has, whatever its algorithm; loaders fill it.
struct Vocabulary {
  std::vector<std::string> bytes;  // by id: what the token stands for; a control token's name
  std::vector<TokenKind> kinds;    // by id
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;
  bool add_bos = false;
  bool strips_leading_space = false;
  // User-defined tokens are cut out of the text before the algorithm sees it. False where the
  // algorithm itself finds them (SentencePiece).
  bool splits_user_defined = true;
  std::string chat_template;
};

class ByteTrie;

// Constant after construction: all methods may run at the same time on several threads.
class Tokenizer {
 public:
  // Texts above this are refused (INVALID_ARGUMENT); positions are 32 bits wide inside.
  static constexpr size_t kMaxTextBytes = size_t{256} << 20;

  virtual ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Ill-formed UTF-8 is first replaced by U+FFFD, one per maximal ill-formed part (SanitizeUtf8),
  // so the ids are those of the replaced text. Time is O(n log n) in the text's bytes whatever the
  // text. INVALID_ARGUMENT: text above kMaxTextBytes. RESOURCE_EXHAUSTED: the pattern matcher gave
  // up. Any other: options.keep_going's.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              const EncodeOptions& options = {}) const;

  // Text of `ids`, ill-formed UTF-8 replaced, control tokens left out if `skip_special`. A
  // vocabulary that puts a space before the first word drops it here. Ids outside the vocabulary
  // give nothing.
  std::string Decode(std::span<const int32_t> ids, bool skip_special = true) const;

  int32_t vocab_size() const { return static_cast<int32_t>(vocab_.bytes.size()); }
  bool IsValid(int32_t id) const { return id >= 0 && id < vocab_size(); }

  // The raw bytes a token stands for (part of a character, possibly); a control token's name. Empty
  // for ids outside the vocabulary: a model may have more rows than its tokenizer has tokens.
  std::string_view TokenBytes(int32_t id) const;
  bool IsControl(int32_t id) const {
    return IsValid(id) && vocab_.kinds[id] == TokenKind::kControl;
  }

  // The control token with exactly this name.
  std::optional<int32_t> FindControl(std::string_view name) const;
  // The control or user-defined token with exactly this name.
  std::optional<int32_t> FindAdded(std::string_view name) const;

  std::optional<int32_t> bos_id() const { return vocab_.bos_id; }
  // Ids that end an answer: eos of the tokenizer, of generation_config.json, GGUF's eot. May be
  // empty.
  const std::vector<int32_t>& eos_ids() const { return vocab_.eos_ids; }
  bool IsEos(int32_t id) const;
  // Whether this model's own tokenizer begins every text with BOS.
  bool add_bos() const { return vocab_.add_bos; }
  // Whether the first token's leading space is not part of the text (SentencePiece's dummy prefix).
  bool strips_leading_space() const { return vocab_.strips_leading_space; }
  // The model's chat template as its files give it; empty: none. See chat_template.h.
  const std::string& chat_template() const { return vocab_.chat_template; }

 protected:
  explicit Tokenizer(Vocabulary vocabulary);
  const Vocabulary& vocabulary() const { return vocab_; }

  // Appends the ids of `text`: valid UTF-8, not empty, nothing in it that Encode itself finds.
  // `first`: it is the beginning of the sequence's text.
  virtual absl::Status EncodeText(std::string_view text, bool first, WorkMeter* meter,
                                  std::vector<int32_t>* ids) const = 0;

 private:
  Vocabulary vocab_;
  // Names of control and user-defined tokens, and of the user-defined ones that Encode cuts out.
  std::unique_ptr<const ByteTrie> added_;
  std::unique_ptr<const ByteTrie> user_defined_;
};

// A Hugging Face folder: tokenizer.json, or tokenizer.model where there is none; special tokens and
// the chat template from tokenizer_config.json, chat_template.jinja, generation_config.json.
// NOT_FOUND: neither file is there. INVALID_ARGUMENT: a truncated, inconsistent or oversized file;
// the message names file and field. UNIMPLEMENTED: a tokenizer component that is not supported, by
// name.
absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder);

// The same errors; the message names the tokenizer.ggml key.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeGgufTokenizer(GgufTokenizerData data);

// Texts of the side files of a tokenizer; an empty text stands for an absent file.
struct TokenizerSideFiles {
  std::string tokenizer_config = "";
  std::string generation_config = "";
  std::string chat_template = "";
};

// From the contents of tokenizer.json and of tokenizer.model. The same errors as LoadTokenizer.
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(std::string_view json,
                                                              const TokenizerSideFiles& side = {});
absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view model,
                                                              const TokenizerSideFiles& side = {});

}  // namespace entropyserve
