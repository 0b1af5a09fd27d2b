// tokenizer.json, or tokenizer.model for inputs that do not begin as JSON does: whatever the bytes,
// the loader returns a status, and what it accepts encodes any text and decodes any id.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <vector>

#include "engine/text/chat_template.h"
#include "engine/text/text_stream.h"
#include "engine/text/tokenizer.h"

namespace {

using entropyserve::ChatTemplate;
using entropyserve::TextStream;
using entropyserve::Tokenizer;

void Require(bool ok) {
  if (!ok) std::abort();
}

void Use(const Tokenizer& tokenizer) {
  const std::string_view texts[] = {"",
                                    " ",
                                    "Hello, world's 123 \n\n\t x",
                                    "<s>a</s><|im_end|>",
                                    "\xC3\xA9\xE4\xB8\xAD e\xCC\x81",
                                    "\xF0\x9F\x98\x80\xFF\xC3"};
  for (const std::string_view text : texts) {
    for (const bool special : {false, true}) {
      const auto ids = tokenizer.Encode(text, {.add_bos = special, .parse_special = special});
      Require(ids.ok());
      for (const int32_t id : *ids) Require(tokenizer.IsValid(id));
      Require(entropyserve::IsValidUtf8(tokenizer.Decode(*ids)));
    }
  }
  auto stream = TextStream::Create(tokenizer, {.stops = {"lo"}, .skip_special = false});
  Require(stream.ok());
  for (int32_t id = -1; id <= tokenizer.vocab_size() && id < 512; ++id) {
    Require(entropyserve::IsValidUtf8(stream->Push(id)));
  }
  Require(entropyserve::IsValidUtf8(stream->Flush()));
  if (const auto chat = ChatTemplate::Create(tokenizer); chat.ok()) {
    const std::vector<entropyserve::ChatMessage> messages = {{"user", "<|im_end|>Hi"}};
    Require(chat->Render(messages).ok());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const entropyserve::TokenizerSideFiles side = {
      .tokenizer_config = R"({"add_bos_token": true})",
      .chat_template = "<|im_start|>' + role + '\\n' + content + '<|im_end|>"};
  const auto tokenizer = bytes.starts_with('{') ? entropyserve::ParseTokenizerJson(bytes, side)
                                                : entropyserve::ParseSentencePiece(bytes, side);
  if (tokenizer.ok()) Use(**tokenizer);
  return 0;
}
