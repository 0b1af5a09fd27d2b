#include "engine/text/text_stream.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "engine/text/utf8.h"
#include "tests/text_golden.h"

namespace entropyserve {
namespace {

std::unique_ptr<TextStream> MakeStream(const Tokenizer& tokenizer, TextStream::Options options) {
  auto stream = TextStream::Create(tokenizer, std::move(options));
  Check(stream.ok(), "the stream's options are valid");
  return std::make_unique<TextStream>(*std::move(stream));
}

// ---- UTF-8 ----

TEST(Utf8Test, IllFormedPartsBecomeOneReplacementEach) {
  // Unicode 15, section 3.9, tables 3-8 to 3-11.
  EXPECT_EQ(SanitizeUtf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(SanitizeUtf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(SanitizeUtf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\x41\uFFFD\uFFFD\x42");
  EXPECT_EQ(SanitizeUtf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFD\x41");
  EXPECT_EQ(SanitizeUtf8("a\xF0\x9F\x98"), "a\uFFFD");
  EXPECT_EQ(SanitizeUtf8(""), "");
}

TEST(Utf8Test, EveryCodePointSurvives) {
  for (uint32_t point = 0; point <= 0x10FFFF; ++point) {
    if (point >= 0xD800 && point <= 0xDFFF) continue;
    std::string text;
    AppendUtf8(point, &text);
    const Utf8Step step = NextUtf8(text);
    ASSERT_TRUE(step.valid) << point;
    ASSERT_EQ(static_cast<size_t>(step.length), text.size());
    ASSERT_EQ(DecodeUtf8(text, step.length), point);
    // Every proper prefix could still become the character.
    for (size_t cut = 1; cut < text.size(); ++cut) {
      ASSERT_TRUE(NextUtf8(text.substr(0, cut)).incomplete) << point;
    }
  }
}

TEST(Utf8Test, ValidityIsWhatSanitizingKeeps) {
  std::mt19937 random(1);
  const std::string alphabet = "aZ\x80\xBF\xC2\xC3\xE0\xA0\xED\x9F\xF0\x90\xF4\x8F\xFF";
  for (int round = 0; round < 20'000; ++round) {
    std::string bytes;
    for (size_t n = random() % 8; n > 0; --n) bytes.push_back(alphabet[random() % alphabet.size()]);
    const std::string clean = SanitizeUtf8(bytes);
    EXPECT_TRUE(IsValidUtf8(clean));
    EXPECT_EQ(IsValidUtf8(bytes), clean == bytes);
  }
}

// ---- Streaming ----

TEST(TextStreamTest, StreamedTextIsValidAndIsTheDecodedText) {
  for (const char* name : {"llama3", "qwen2", "smollm", "gpt2", "llama2", "sp_bpe", "sp_unigram"}) {
    const auto tokenizer = LoadGoldenTokenizer(name);
    for (const auto& ids : ReadGoldenIds(name)) {
      const auto stream = MakeStream(*tokenizer, {.strip_leading_space = true});
      std::string all;
      for (const int32_t id : ids) {
        const std::string text = stream->Push(id);
        EXPECT_TRUE(IsValidUtf8(text)) << name;
        all += text;
      }
      all += stream->Flush();
      EXPECT_EQ(all, tokenizer->Decode(ids)) << name;
      EXPECT_FALSE(stream->stopped());
    }
  }
}

// Models emit ids in any order, so bytes may make no text at all.
TEST(TextStreamTest, RandomIdsGiveValidText) {
  std::mt19937 random(2);
  for (const char* name : {"llama3", "sp_bpe"}) {
    const auto tokenizer = LoadGoldenTokenizer(name);
    for (int round = 0; round < 500; ++round) {
      const auto stream = MakeStream(*tokenizer, {.stops = {"é", "\n\n"}, .skip_special = false});
      for (int i = 0; i < 40; ++i) {
        const int32_t id = static_cast<int32_t>(random() % (tokenizer->vocab_size() + 4)) - 2;
        EXPECT_TRUE(IsValidUtf8(stream->Push(id)));
      }
      EXPECT_TRUE(IsValidUtf8(stream->Flush()));
    }
  }
}

TEST(TextStreamTest, IncompleteCharactersWaitAndEndAsReplacement) {
  const auto tokenizer = LoadGoldenTokenizer("gpt2");
  // A character no merge knows: one token per byte.
  const auto ids = tokenizer->Encode("\U0001F9FF");
  ASSERT_TRUE(ids.ok());
  ASSERT_GE(ids->size(), 2u);
  const auto stream = MakeStream(*tokenizer, {});
  for (size_t i = 0; i + 1 < ids->size(); ++i) EXPECT_EQ(stream->Push((*ids)[i]), "");
  EXPECT_EQ(stream->Push(ids->back()), "\U0001F9FF");
  EXPECT_EQ(stream->Flush(), "");
  for (size_t i = 0; i + 1 < ids->size(); ++i) EXPECT_EQ(stream->Push((*ids)[i]), "");
  EXPECT_EQ(stream->Flush(), "\uFFFD");
}

TEST(TextStreamTest, ControlTokensGiveNoTextUnlessAsked) {
  const auto tokenizer = LoadGoldenTokenizer("qwen2");
  const int32_t end = *tokenizer->FindControl("<|im_end|>");
  EXPECT_EQ(MakeStream(*tokenizer, {})->Push(end), "");
  EXPECT_EQ(MakeStream(*tokenizer, {.skip_special = false})->Push(end), "<|im_end|>");
  // A control token inside a character does not break it.
  const auto ids = tokenizer->Encode("\U0001F9FF");
  ASSERT_TRUE(ids.ok());
  const auto stream = MakeStream(*tokenizer, {});
  std::string text;
  for (const int32_t id : *ids) text += stream->Push(id) + stream->Push(end);
  EXPECT_EQ(text, "\U0001F9FF");
}

TEST(TextStreamTest, LeadingSpaceGoesOnlyWhenAsked) {
  const auto tokenizer = LoadGoldenTokenizer("sp_bpe");
  const auto ids = tokenizer->Encode("Once upon");
  ASSERT_TRUE(ids.ok());
  for (const bool strip : {false, true}) {
    const auto stream = MakeStream(*tokenizer, {.strip_leading_space = strip});
    std::string text;
    for (const int32_t id : *ids) text += stream->Push(id);
    EXPECT_EQ(text + stream->Flush(), strip ? "Once upon" : " Once upon");
  }
}

// ---- Stop strings ----

// The plain definition: the text up to the first place where a stop string ends; of those that end
// there, the longest.
std::pair<std::string, bool> CutAtStop(const std::string& text,
                                       const std::vector<std::string>& stops) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t longest = 0;
    for (const std::string& stop : stops) {
      if (std::string_view(text).substr(0, end).ends_with(stop)) {
        longest = std::max(longest, stop.size());
      }
    }
    if (longest > 0) return {text.substr(0, end - longest), true};
  }
  return {text, false};
}

// The longest beginning of a stop string that `text` ends with: exactly this must be held back.
size_t MustHold(const std::string& text, const std::vector<std::string>& stops) {
  size_t longest = 0;
  for (const std::string& stop : stops) {
    for (size_t n = 1; n < stop.size(); ++n) {
      if (text.ends_with(stop.substr(0, n))) longest = std::max(longest, n);
    }
  }
  return longest;
}

TEST(TextStreamTest, StopStringsNeverLeakAndNothingElseIsHeld) {
  const auto tokenizer = LoadGoldenTokenizer("gpt2");
  std::vector<int32_t> byte_ids;
  for (const std::string letter : {"a", "b", "c"}) {
    byte_ids.push_back(tokenizer->Encode(letter)->front());
  }
  std::mt19937 random(3);
  const auto word = [&](size_t length) {
    std::string text;
    for (size_t i = 0; i < length; ++i) text.push_back("abc"[random() % 3]);
    return text;
  };
  int stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::string> stops;
    for (size_t n = 1 + random() % 3; n > 0; --n) stops.push_back(word(1 + random() % 6));
    const std::string text = word(random() % 40);
    const auto [want, want_stop] = CutAtStop(text, stops);
    const auto stream = MakeStream(*tokenizer, {.stops = stops});
    std::string released;
    std::string seen;
    for (const char c : text) {
      released += stream->Push(byte_ids[c - 'a']);
      seen.push_back(c);
      if (stream->stopped()) break;
      EXPECT_EQ(released.size(), seen.size() - MustHold(seen, stops)) << seen;
    }
    released += stream->Flush();
    EXPECT_EQ(released, want);
    EXPECT_EQ(stream->stopped(), want_stop);
    if (want_stop) {
      EXPECT_EQ(stream->Push(byte_ids[0]) + stream->Flush(), "");
    }
    stopped += want_stop;
  }
  EXPECT_GT(stopped, 500);
  EXPECT_LT(stopped, 2900);
}

TEST(TextStreamTest, StopStringsOfCharactersBeyondAscii) {
  const auto tokenizer = LoadGoldenTokenizer("llama3");
  const std::string text = "ab😃é。中文 结束 more";
  const auto ids = tokenizer->Encode(text);
  ASSERT_TRUE(ids.ok());
  const auto stream = MakeStream(*tokenizer, {.stops = {"结束", "。文"}});
  std::string released;
  for (const int32_t id : *ids) {
    const std::string part = stream->Push(id);
    EXPECT_TRUE(IsValidUtf8(part));
    released += part;
  }
  EXPECT_TRUE(stream->stopped());
  EXPECT_EQ(stream->matched_stop(), "结束");
  EXPECT_EQ(released + stream->Flush(), "ab😃é。中文 ");
}

TEST(TextStreamTest, BadStopStringsAreRefusedByName) {
  const auto tokenizer = LoadGoldenTokenizer("gpt2");
  const auto message = [&](std::vector<std::string> stops) {
    const auto stream = TextStream::Create(*tokenizer, {.stops = std::move(stops)});
    EXPECT_EQ(stream.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(stream.status().message());
  };
  EXPECT_EQ(message({"ok", ""}), "stop[1]: must not be empty");
  EXPECT_EQ(message({"\xFF"}), "stop[0]: must be valid UTF-8");
  EXPECT_NE(message({std::string(TextStream::kMaxStopBytes + 1, 'x')}).find("stop[0]"),
            std::string::npos);
  EXPECT_NE(message(std::vector<std::string>(TextStream::kMaxStops + 1, "x")).find("stop:"),
            std::string::npos);
}

}  // namespace
}  // namespace entropyserve
