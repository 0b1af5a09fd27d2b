#include "engine/text/byte_tokenizer.h"

#include <algorithm>
#include <string>
#include <utility>

namespace entropyserve {
namespace {

class ByteTokenizer final : public Tokenizer {
 public:
  explicit ByteTokenizer(Vocabulary vocabulary) : Tokenizer(std::move(vocabulary)) {}

 private:
  absl::Status EncodeText(std::string_view text, bool, WorkMeter*,
                          std::vector<int32_t>* ids) const override {
    for (char c : text) ids->push_back(uint8_t(c));
    return absl::OkStatus();
  }
};

}  // namespace

std::unique_ptr<Tokenizer> MakeByteTokenizer(int vocab_size) {
  Vocabulary vocabulary;
  vocabulary.bytes.resize(vocab_size);
  for (int byte = 0; byte < std::min(vocab_size, 256); ++byte)
    vocabulary.bytes[byte] = std::string(1, char(byte));
  vocabulary.kinds.assign(vocab_size, TokenKind::kText);
  return std::make_unique<ByteTokenizer>(std::move(vocabulary));
}

}  // namespace entropyserve
