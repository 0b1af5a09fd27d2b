#include "engine/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "engine/text/bpe.h"
#include "engine/text/byte_level_bpe.h"
#include "engine/text/sentencepiece_model.h"
#include "engine/text/utf8.h"
#include "tests/text_golden.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Json = nlohmann::json;

const EncodeOptions kParseSpecial = {.parse_special = true};

std::vector<int32_t> Encoded(const Tokenizer& tokenizer, std::string_view text,
                             const EncodeOptions& options = {}) {
  auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *std::move(ids) : std::vector<int32_t>();
}

void ExpectGoldenIds(const Tokenizer& tokenizer, const std::string& golden) {
  const std::vector<std::string> lines = ReadGoldenLines();
  const std::vector<std::vector<int32_t>> ids = ReadGoldenIds(golden);
  ASSERT_GE(lines.size(), 2000u);
  ASSERT_EQ(lines.size(), ids.size());
  int wrong = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::vector<int32_t> got = Encoded(tokenizer, lines[i]);
    if (got == ids[i]) continue;
    if (++wrong <= 5) {
      ADD_FAILURE() << "line " << i + 1 << ": " << testing::PrintToString(lines[i]) << "\n got  "
                    << testing::PrintToString(got) << "\n want " << testing::PrintToString(ids[i]);
    }
  }
  EXPECT_EQ(wrong, 0);
}

// ---- Agreement with the reference libraries ----

class TokenizerGoldenTest : public testing::TestWithParam<std::string> {};

TEST_P(TokenizerGoldenTest, AgreesWithTheReferenceLibrary) {
  ExpectGoldenIds(*LoadGoldenTokenizer(GetParam()), GetParam());
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, TokenizerGoldenTest,
                         testing::Values("llama3", "qwen2", "smollm", "gpt2", "llama2", "sp_bpe",
                                         "sp_unigram", "sp_unigram_unk", "sp_bpe_unk"),
                         [](const auto& info) { return info.param; });

// Byte-level vocabularies lose nothing: what comes back is the text, repaired and normalized.
TEST(TokenizerTest, DecodeUndoesEncode) {
  for (const char* name : {"llama3", "qwen2", "smollm", "gpt2", "llama2", "sp_bpe"}) {
    const auto tokenizer = LoadGoldenTokenizer(name);
    for (const std::string& line : ReadGoldenLines()) {
      std::string want = SanitizeUtf8(line);
      if (std::string(name) == "qwen2") want = NormalizeNfc(want);
      // U+2581 is how these vocabularies write a space, so it comes back as one.
      if (tokenizer->strips_leading_space() && want.find("\u2581") != std::string::npos) continue;
      EXPECT_EQ(tokenizer->Decode(Encoded(*tokenizer, line)), want) << name;
    }
  }
}

TEST(TokenizerTest, ControlTokensAreParsedOnlyWhenAsked) {
  const Json rows = Json::parse(ReadTextGolden("special.json"));
  ASSERT_GE(rows.size(), 200u);
  std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers;
  int with_control = 0;
  for (const Json& row : rows) {
    auto& tokenizer = tokenizers[row["vocabulary"]];
    if (tokenizer == nullptr) tokenizer = LoadGoldenTokenizer(row["vocabulary"]);
    const std::string text = row["text"];
    const std::vector<int32_t> want = row["ids"];
    EXPECT_EQ(Encoded(*tokenizer, text, kParseSpecial), want) << text;
    const auto is_control = [&](int32_t id) { return tokenizer->IsControl(id); };
    with_control += std::any_of(want.begin(), want.end(), is_control);
    const std::vector<int32_t> plain = Encoded(*tokenizer, text);
    EXPECT_TRUE(std::none_of(plain.begin(), plain.end(), is_control)) << text;
    EXPECT_EQ(tokenizer->Decode(plain), text);
  }
  EXPECT_GT(with_control, 100);
}

TEST(TokenizerTest, EveryControlNameInTextStaysText) {
  for (const char* name :
       {"llama3", "qwen2", "smollm", "gpt2", "llama2", "sp_bpe", "sp_unigram", "sp_bpe_unk"}) {
    const auto tokenizer = LoadGoldenTokenizer(name);
    int controls = 0;
    for (int32_t id = 0; id < tokenizer->vocab_size(); ++id) {
      if (!tokenizer->IsControl(id)) continue;
      ++controls;
      const std::string text = "a" + std::string(tokenizer->TokenBytes(id)) + "b";
      // The unknown token is a control token that text may lead to, but not by its name.
      EXPECT_THAT(Encoded(*tokenizer, text), testing::Not(testing::Contains(id))) << text;
      EXPECT_THAT(Encoded(*tokenizer, text, kParseSpecial), testing::Contains(id)) << text;
    }
    EXPECT_GE(controls, 1) << name;
  }
}

// ---- GGUF metadata, made from the same vocabularies ----

GgufTokenizerData GgufFromJson(const std::string& name, const std::string& pre) {
  const Json root = Json::parse(ReadTextGolden(name + ".json"));
  GgufTokenizerData data;
  data.model = "gpt2";
  data.pre = pre;
  const auto put = [&](int id, const std::string& token, int type) {
    if (static_cast<size_t>(id) >= data.tokens.size()) {
      data.tokens.resize(id + 1);
      data.types.resize(id + 1, 1);
    }
    data.tokens[id] = token;
    data.types[id] = type;
  };
  for (const auto& [token, id] : root["model"]["vocab"].items()) put(id, token, 1);
  for (const Json& token : root["added_tokens"]) {
    put(token["id"], token["content"], token["special"].get<bool>() ? 3 : 4);
  }
  for (const Json& merge : root["model"]["merges"]) {
    data.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  return data;
}

TEST(GgufTokenizerTest, AgreesWithTheReferenceLibrary) {
  for (const auto& [name, pre] : std::vector<std::pair<std::string, std::string>>{
           {"llama3", "llama-bpe"}, {"qwen2", "qwen2"}, {"smollm", "smollm"}, {"gpt2", "gpt-2"}}) {
    SCOPED_TRACE(name);
    const auto tokenizer = MakeGgufTokenizer(GgufFromJson(name, pre));
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    ExpectGoldenIds(**tokenizer, name);
  }
  const auto tokenizer = MakeGgufTokenizer(GgufFromSentencePiece("sp_bpe"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  ExpectGoldenIds(**tokenizer, "sp_bpe");
}

// ---- Long runs ----

uint64_t Fnv(const std::vector<int32_t>& ids) {
  uint64_t value = 0xCBF29CE484222325;
  for (const int32_t id : ids) value = (value ^ static_cast<uint32_t>(id)) * 0x100000001B3;
  return value;
}

TEST(TokenizerTest, LongRunsOfOneCharacterAgreeWithTheReferenceLibrary) {
  const Json runs = Json::parse(ReadTextGolden("runs.json"));
  size_t longest = 0;
  for (const Json& run : runs) {
    const auto tokenizer = LoadGoldenTokenizer(run["vocabulary"]);
    const std::string unit = run["unit"];
    std::string text;
    for (int i = 0; i < run["repeat"].get<int>(); ++i) text += unit;
    longest = std::max(longest, text.size());
    const std::vector<int32_t> ids = Encoded(*tokenizer, text);
    EXPECT_EQ(ids.size(), run["ids"].get<size_t>()) << run;
    EXPECT_EQ(std::to_string(Fnv(ids)), run["fnv"].get<std::string>()) << run;
  }
  EXPECT_EQ(longest, size_t{8} << 20);
}

// A queue entry is the unit of work: at most one for each pair of the start, two for each merge.
TEST(BpeMergerTest, WorkOfOnePieceGrowsLinearly) {
  PairTable pairs;  // token k is 2^k letters
  for (int k = 0; k < 8; ++k) pairs.Add(k, k, {k, k + 1});
  WorkMeter meter(nullptr);
  BpeMerger merger(pairs, &meter);
  for (const int64_t letters : {int64_t{1} << 10, int64_t{1} << 15, int64_t{1} << 20}) {
    const int64_t before = merger.operations();
    const std::vector<int32_t> text(letters, 0);
    EXPECT_EQ(merger.Merge(text)->size(), static_cast<size_t>(letters / 256));
    const int64_t work = merger.operations() - before;
    EXPECT_GE(work, letters - 1);
    EXPECT_LE(work, 3 * letters);
  }
}

TEST(BpeMergerTest, LowestRankThenLeftmostMergesFirst) {
  PairTable pairs;
  pairs.Add(0, 0, {5, 10});    // aa
  pairs.Add(0, 1, {1, 11});    // ab, earlier
  pairs.Add(10, 10, {6, 12});  // aaaa
  WorkMeter meter(nullptr);
  BpeMerger merger(pairs, &meter);
  const auto merged = [&](std::vector<int32_t> symbols) {
    const std::span<const int32_t> ids = *merger.Merge(symbols);
    return std::vector<int32_t>(ids.begin(), ids.end());
  };
  EXPECT_THAT(merged({0, 0, 0}), ElementsAre(10, 0));
  EXPECT_THAT(merged({0, 0, 1}), ElementsAre(0, 11));
  EXPECT_THAT(merged({0, 0, 0, 0, 0}), ElementsAre(12, 0));
  EXPECT_THAT(merged({}), IsEmpty());
  EXPECT_THAT(merged({1}), ElementsAre(1));
}

// The definition: of all pairs that stand side by side, the first in (rank, position) merges.
std::vector<int32_t> MergedByTheBook(const PairTable& pairs, const std::vector<int32_t>& symbols) {
  std::map<int64_t, int32_t> left;  // position to id
  for (size_t i = 0; i < symbols.size(); ++i) left[i] = symbols[i];
  std::set<std::pair<int32_t, int64_t>> queue;  // rank, position
  const auto update = [&](auto at, bool insert) {
    if (at == left.end() || std::next(at) == left.end()) return;
    const PairTable::Merge* merge = pairs.Find(at->second, std::next(at)->second);
    if (merge == nullptr) return;
    const std::pair<int32_t, int64_t> key(merge->rank, at->first);
    insert ? void(queue.insert(key)) : void(queue.erase(key));
  };
  for (auto at = left.begin(); at != left.end(); ++at) update(at, true);
  while (!queue.empty()) {
    const auto at = left.find(queue.begin()->second);
    const auto before = at == left.begin() ? left.end() : std::prev(at);
    const auto right = std::next(at);
    const int32_t id = pairs.Find(at->second, right->second)->id;
    for (const auto changed : {before, at, right}) update(changed, false);
    left.erase(right);
    at->second = id;
    for (const auto changed : {before, at}) update(changed, true);
  }
  std::vector<int32_t> ids;
  for (const auto& [position, id] : left) ids.push_back(id);
  return ids;
}

// Ranks are shared and a merge may make a pair of a lower rank than its own: real tables have the
// first, and files may have the second.
TEST(BpeMergerTest, LongWordsMergeAsShortOnes) {
  std::mt19937 random(1);
  const auto draw = [&](uint32_t below) { return static_cast<int32_t>(random() % below); };
  for (int round = 0; round < 8; ++round) {
    PairTable pairs;
    for (int i = 0; i < 150; ++i) pairs.Add(draw(24), draw(24), {draw(100), draw(24)});
    WorkMeter meter(nullptr);
    BpeMerger merger(pairs, &meter);
    for (const size_t symbols : {size_t{1000}, size_t{100'000}, size_t{40'000}}) {
      std::vector<int32_t> word(symbols);
      for (int32_t& symbol : word) symbol = draw(24);
      const std::span<const int32_t> ids = *merger.Merge(word);
      EXPECT_TRUE(std::ranges::equal(ids, MergedByTheBook(pairs, word)))
          << "round " << round << ", " << symbols << " symbols";
    }
  }
}

// The work after somebody has left is bounded, whatever the algorithm and the text.
TEST(TokenizerTest, EncodingEndsSoonWhenNobodyWantsIt) {
  for (const char* vocabulary : {"qwen2", "llama2", "sp_bpe", "sp_unigram"}) {
    const auto tokenizer = LoadGoldenTokenizer(vocabulary);
    std::string word(1 << 20, 'a');
    for (size_t i = 0; i < word.size(); ++i) word[i] = 'a' + i * i % 23 % 5;
    std::string words = word;
    for (size_t i = 0; i < words.size(); i += 6) words[i] = ' ';
    for (const std::string& text : {word, words}) {
      int asked = 0;
      EncodeOptions options;
      options.keep_going = [&] {
        ++asked;
        return absl::OkStatus();
      };
      ASSERT_TRUE(tokenizer->Encode(text, options).ok());
      EXPECT_GE(asked, 8) << vocabulary;
      asked = 0;
      options.keep_going = [&] {
        return ++asked < 3 ? absl::OkStatus() : absl::CancelledError("left");
      };
      EXPECT_EQ(tokenizer->Encode(text, options).status(), absl::CancelledError("left"))
          << vocabulary;
      EXPECT_EQ(asked, 3) << vocabulary;
    }
  }
}

TEST(WordCacheTest, IsBounded) {
  std::vector<std::string> words;
  for (int i = 0; i < 100'000; ++i) words.push_back(std::to_string(i));
  WordCache cache;
  const std::vector<int32_t> ids = {1, 2};
  for (const std::string& word : words) cache.Add(word, ids);
  int known = 0;
  for (const std::string& word : words) known += cache.Find(word).has_value();
  EXPECT_EQ(known, 1 << 16);
  const std::string huge(1000, 'x');
  WordCache other;
  other.Add(huge, ids);
  EXPECT_FALSE(other.Find(huge).has_value());
}

// ---- Special tokens, BOS, options ----

TEST(TokenizerTest, SideFilesGiveBosEosAndTemplate) {
  TokenizerSideFiles side;
  side.tokenizer_config =
      R"({"bos_token": null, "eos_token": {"content": "<|im_end|>"}, "add_bos_token": false,
          "chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]})";
  const auto plain = LoadGoldenTokenizer("qwen2");
  const int32_t end = *plain->FindControl("<|im_end|>");
  const int32_t text_end = *plain->FindControl("<|endoftext|>");
  side.generation_config = Json({{"eos_token_id", {end, text_end}}}).dump();
  const auto tokenizer = LoadGoldenTokenizer("qwen2", side);
  EXPECT_FALSE(tokenizer->bos_id().has_value());
  EXPECT_FALSE(tokenizer->add_bos());
  EXPECT_THAT(tokenizer->eos_ids(), ElementsAre(end, text_end));
  EXPECT_TRUE(tokenizer->IsEos(text_end));
  EXPECT_FALSE(tokenizer->IsEos(0));
  EXPECT_EQ(tokenizer->chat_template(), "D");
  side.chat_template = "from its own file";
  EXPECT_EQ(LoadGoldenTokenizer("qwen2", side)->chat_template(), "from its own file");
}

TEST(TokenizerTest, BosComesFromThePostProcessor) {
  const auto tokenizer = LoadGoldenTokenizer("llama3");
  ASSERT_TRUE(tokenizer->add_bos());
  EXPECT_EQ(tokenizer->bos_id(), tokenizer->FindControl("<|begin_of_text|>"));
  const std::vector<int32_t> with = Encoded(*tokenizer, "Hi", {.add_bos = true});
  ASSERT_FALSE(with.empty());
  EXPECT_EQ(with.front(), *tokenizer->bos_id());
  EXPECT_EQ(std::vector<int32_t>(with.begin() + 1, with.end()), Encoded(*tokenizer, "Hi"));
  EXPECT_EQ(tokenizer->Decode(with), "Hi");
  EXPECT_EQ(tokenizer->Decode(with, /*skip_special=*/false), "<|begin_of_text|>Hi");
}

TEST(TokenizerTest, IdsOutsideTheVocabularyAreNothing) {
  const auto tokenizer = LoadGoldenTokenizer("gpt2");
  for (const int32_t id : {-1, tokenizer->vocab_size(), INT32_MAX, INT32_MIN}) {
    EXPECT_FALSE(tokenizer->IsValid(id));
    EXPECT_FALSE(tokenizer->IsControl(id));
    EXPECT_EQ(tokenizer->TokenBytes(id), "");
    const std::vector<int32_t> ids = {id};
    EXPECT_EQ(tokenizer->Decode(ids), "");
  }
}

TEST(TokenizerTest, TokensOfATemplatesMarkersAreControl) {
  // A SentencePiece file may declare turn markers as ordinary user-defined text.
  TokenizerSideFiles side;
  const auto plain = LoadGoldenTokenizer("sp_bpe");
  const int32_t marker = *plain->FindAdded("[unused9]");
  EXPECT_FALSE(plain->IsControl(marker));
  EXPECT_THAT(Encoded(*plain, "a[unused9]b"), testing::Contains(marker));
  side.chat_template = "[unused9]系统：[unused10]";
  const auto chat = LoadGoldenTokenizer("sp_bpe", side);
  EXPECT_TRUE(chat->IsControl(marker));
  EXPECT_THAT(Encoded(*chat, "a[unused9]b"), testing::Not(testing::Contains(marker)));
  EXPECT_EQ(chat->Decode(Encoded(*chat, "a[unused9]b")), "a[unused9]b");
}

TEST(TokenizerTest, ThreadsMayEncodeAtTheSameTime) {
  for (const char* name : {"qwen2", "sp_bpe", "sp_unigram"}) {
    const auto tokenizer = LoadGoldenTokenizer(name);
    const std::vector<std::string> lines = ReadGoldenLines();
    const std::vector<std::vector<int32_t>> want = ReadGoldenIds(name);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        for (size_t i = t % 2; i < lines.size(); i += 2) {
          const auto ids = tokenizer->Encode(lines[i]);
          wrong += !ids.ok() || *ids != want[i];
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0) << name;
  }
}

// Real vocabularies lack a few bytes; the `tokenizers` library leaves those out of the text.
TEST(TokenizerTest, BytesWithoutATokenGiveNothing) {
  Json json = Json::parse(ReadTextGolden("gpt2.json"));
  json["model"]["vocab"].erase("\u0113");  // byte 0x13
  const auto tokenizer = ParseTokenizerJson(json.dump());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::vector<int32_t> want = Encoded(**tokenizer, "no");
  const std::vector<int32_t> rest = Encoded(**tokenizer, "thing");
  want.insert(want.end(), rest.begin(), rest.end());
  EXPECT_EQ(Encoded(**tokenizer, "no\x13thing"), want);
  EXPECT_THAT(Encoded(**tokenizer, "\x13"), IsEmpty());
}

TEST(TokenizerTest, TooLongATextIsRefused) {
  const auto tokenizer = LoadGoldenTokenizer("gpt2");
  const std::string text(Tokenizer::kMaxTextBytes + 1, 'a');
  EXPECT_EQ(tokenizer->Encode(text).status().code(), absl::StatusCode::kInvalidArgument);
}

// Marks in the wrong order, a million of them: a quadratic sort would not come back.
TEST(NfcTest, LongRunsOfMarksAreSorted) {
  std::string text = "a";
  std::string want = "\u1ea1";  // the first mark below goes onto the letter
  constexpr int kPairs = 1 << 19;
  for (int i = 0; i < kPairs; ++i) text += "\u0301\u0323";
  for (int i = 1; i < kPairs; ++i) want += "\u0323";
  for (int i = 0; i < kPairs; ++i) want += "\u0301";
  EXPECT_TRUE(NormalizeNfc(text) == want);
}

TEST(NfcTest, KnownForms) {
  EXPECT_EQ(NormalizeNfc("plain"), "plain");
  EXPECT_EQ(NormalizeNfc("e\u0301!"), "\u00e9!");
  EXPECT_EQ(NormalizeNfc("\u212b"), "\u00c5");
  EXPECT_EQ(NormalizeNfc("a\u0302\u0323"), "\u1ead");
  EXPECT_EQ(NormalizeNfc("\u1100\u1161\u11a8"), "\uac01");
  EXPECT_EQ(NormalizeNfc("\u0958"), "\u0915\u093c");  // a composition exclusion
}

}  // namespace
}  // namespace entropyserve
