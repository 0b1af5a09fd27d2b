// Reads tests/golden/text: lines and the ids that the reference libraries gave for them.
#pragma once

#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "engine/text/sentencepiece_model.h"
#include "engine/text/tokenizer.h"
#include "kernels/check.h"

namespace entropyserve {

inline std::string ReadTextGolden(const std::string& name) {
  std::ifstream file(std::string(ES_SOURCE_DIR) + "/tests/golden/text/" + name, std::ios::binary);
  Check(file.good(), "the golden file is there");
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// One text per line; \xHH is a byte.
inline std::vector<std::string> ReadGoldenLines() {
  const std::string text = ReadTextGolden("lines.txt");
  std::vector<std::string> lines(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n') {
      lines.emplace_back();
    } else if (text[i] == '\\') {
      lines.back().push_back(static_cast<char>(std::stoi(text.substr(i + 2, 2), nullptr, 16)));
      i += 3;
    } else {
      lines.back().push_back(text[i]);
    }
  }
  lines.pop_back();
  return lines;
}

// Per line a LEB128 count, and as many LEB128 ids.
inline std::vector<std::vector<int32_t>> ReadGoldenIds(const std::string& name) {
  const std::string bytes = ReadTextGolden(name + ".ids");
  std::vector<std::vector<int32_t>> rows;
  size_t pos = 0;
  const auto next = [&] {
    uint32_t value = 0;
    for (int shift = 0;; shift += 7) {
      const uint8_t byte = static_cast<uint8_t>(bytes.at(pos++));
      value |= static_cast<uint32_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
  };
  while (pos < bytes.size()) {
    rows.emplace_back(next());
    for (int32_t& id : rows.back()) id = static_cast<int32_t>(next());
  }
  return rows;
}

// The checked-in vocabulary NAME.json or, for names that begin with "sp_", NAME.model.
inline std::unique_ptr<Tokenizer> LoadGoldenTokenizer(const std::string& name,
                                                      const TokenizerSideFiles& side = {}) {
  auto tokenizer = name.starts_with("sp_")
                       ? ParseSentencePiece(ReadTextGolden(name + ".model"), side)
                       : ParseTokenizerJson(ReadTextGolden(name + ".json"), side);
  if (!tokenizer.ok()) std::fprintf(stderr, "%s\n", tokenizer.status().ToString().c_str());
  Check(tokenizer.ok(), "the golden vocabulary loads");
  return *std::move(tokenizer);
}

// What a GGUF file made of the checked-in NAME.model would say.
inline GgufTokenizerData GgufFromSentencePiece(const std::string& name) {
  const auto model = ParseSentencePieceModel(ReadTextGolden(name + ".model"));
  Check(model.ok(), "the golden model parses");
  GgufTokenizerData data;
  data.model = "llama";
  data.bos_id = model->bos_id;
  data.eos_id = model->eos_id;
  data.unk_id = model->unk_id;
  for (const SentencePieceModel::Piece& piece : model->pieces) {
    data.tokens.push_back(piece.text);
    data.scores.push_back(piece.score);
    data.types.push_back(static_cast<int32_t>(piece.type));
  }
  return data;
}

}  // namespace entropyserve
