// Tasks that ask for what one place of the text says: niah_*, passkey, kv_retrieval.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/eval/task.h"

namespace entropyserve::tasks {
namespace {

constexpr int kNumberDigits = 7;  // RULER's
constexpr int kDepths = 40;       // places where RULER hides a needle in text, first to last
constexpr size_t kMostTurns = 4;

std::string RandomOf(SplitMix64* random, bool uuid, bool key) {
  if (uuid) return RandomUuid(random);
  return key ? RandomKey(random) : RandomNumber(random, kNumberDigits);
}

std::string Needle(const NiahShape& shape, const std::string& key, const std::string& value) {
  return absl::StrCat("One of the special magic ", shape.uuid_values ? "uuids" : "numbers", " for ",
                      key, " is: ", value, ".");
}

// "a", "a, and b", "a, b, and c".
std::string List(const std::vector<std::string>& keys) {
  if (keys.size() == 1) return keys[0];
  return absl::StrCat(absl::StrJoin(keys.begin(), keys.end() - 1, ", "), ", and ", keys.back());
}

struct Needles {
  std::vector<std::string> keys;
  std::vector<std::vector<std::string>> values;  // of each key
  std::vector<std::string> sentences;            // shuffled
};

Needles DrawNeedles(const NiahShape& shape, SplitMix64* random) {
  Needles out;
  std::set<std::string> taken;
  while (static_cast<int>(out.keys.size()) < shape.keys) {
    std::string key = RandomOf(random, shape.uuid_keys, true);
    if (!taken.insert(key).second) continue;
    std::vector<std::string> values;
    while (static_cast<int>(values.size()) < shape.values) {
      values.push_back(RandomOf(random, shape.uuid_values, false));
      out.sentences.push_back(Needle(shape, key, values.back()));
    }
    out.keys.push_back(std::move(key));
    out.values.push_back(std::move(values));
  }
  Shuffle(random, &out.sentences);
  return out;
}

TaskTurn Ask(const NiahShape& shape, const std::vector<std::string>& keys,
             std::vector<std::string> answers) {
  const bool one = answers.size() == 1;
  const char* what = shape.uuid_values ? (one ? "uuid" : "uuids") : (one ? "number" : "numbers");
  const std::string query = List(keys);
  TaskTurn turn;
  turn.question = absl::StrCat("What ", one ? "is the" : "are all the", " special magic ", what,
                               " for ", query, " mentioned in the provided text?");
  turn.answer_prefix = absl::StrCat("The special magic ", what, " for ", query,
                                    " mentioned in the provided text ", one ? "is" : "are");
  turn.answers = std::move(answers);
  return turn;
}

// Needles between sentences, at some of RULER's depths.
std::string HideInSentences(const std::vector<std::string>& needles,
                            const std::vector<std::string>& sentences, SplitMix64* places) {
  std::vector<int64_t> depths = Sample(places, kDepths, static_cast<int64_t>(needles.size()));
  std::sort(depths.begin(), depths.end());
  std::vector<std::string> parts;
  size_t next = 0;
  for (size_t i = 0; i <= sentences.size(); ++i) {
    const auto at = [&](size_t n) {
      return sentences.size() * static_cast<size_t>(depths[n]) / (kDepths - 1);
    };
    while (next < needles.size() && at(next) == i) parts.push_back(needles[next++]);
    if (i < sentences.size()) parts.push_back(sentences[i]);
  }
  return absl::StrJoin(parts, " ");
}

// Needles before some of `lines`.
std::string HideInLines(const std::vector<std::string>& needles,
                        const std::vector<std::string>& lines, SplitMix64* places) {
  std::vector<int64_t> at =
      Sample(places, static_cast<int64_t>(lines.size()), static_cast<int64_t>(needles.size()));
  std::sort(at.begin(), at.end());
  std::vector<std::string> parts;
  size_t next = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    if (next < needles.size() && at[next] == static_cast<int64_t>(i)) {
      parts.push_back(needles[next++]);
    }
    parts.push_back(lines[i]);
  }
  return absl::StrJoin(parts, "\n");
}

}  // namespace

TaskPrompt MakeNiah(std::string_view name, const NiahShape& shape, const TaskRequest& request) {
  const std::string task(name);
  const auto index = static_cast<uint64_t>(request.index);
  SplitMix64 random = Stream(request.seed, task, index);
  SplitMix64 places = Stream(request.seed, task + " places", index);
  SplitMix64 others = Stream(request.seed, task + " others", index);
  Needles needles = DrawNeedles(shape, &random);
  std::string text;
  // Distractors by key, which further turns may ask for.
  std::vector<std::pair<std::string, std::string>> distractors;
  if (shape.text == NiahShape::Text::kSentences) {
    text = HideInSentences(needles.sentences,
                           request.haystack->Sentences(request.seed, request.index, request.units),
                           &places);
  } else {
    std::vector<std::string> lines;
    std::map<std::string, int> times;
    while (static_cast<int64_t>(lines.size()) < request.units) {
      if (shape.text == NiahShape::Text::kNoise) {
        lines.push_back(kNoise);
        continue;
      }
      std::string key = RandomOf(&others, shape.uuid_keys, true);
      std::string value = RandomOf(&others, shape.uuid_values, false);
      // Another value of the asked key would make a second right answer. Beyond the number of
      // word keys the others repeat, as in RULER.
      if (std::find(needles.keys.begin(), needles.keys.end(), key) != needles.keys.end()) continue;
      lines.push_back(Needle(shape, key, value));
      ++times[key];
      distractors.emplace_back(std::move(key), std::move(value));
    }
    std::erase_if(distractors, [&times](const auto& d) { return times[d.first] > 1; });
    text = HideInLines(needles.sentences, lines, &places);
  }

  TaskPrompt prompt;
  std::vector<std::string> asked(needles.keys.begin(), needles.keys.begin() + shape.queries);
  std::vector<std::string> answers;
  for (int i = 0; i < shape.queries; ++i) {
    answers.insert(answers.end(), needles.values[i].begin(), needles.values[i].end());
  }
  prompt.turns.push_back(Ask(shape, asked, answers));
  if (shape.values == 1) {  // further questions: one key each
    for (size_t i = shape.queries == 1 ? 1 : 0; i < needles.keys.size(); ++i) {
      if (prompt.turns.size() < kMostTurns) {
        prompt.turns.push_back(Ask(shape, {needles.keys[i]}, needles.values[i]));
      }
    }
    // Then distractors that have one value only, spread over the text.
    const size_t step = std::max<size_t>(1, distractors.size() / kMostTurns);
    for (size_t i = 0; i < distractors.size() && prompt.turns.size() < kMostTurns; i += step) {
      prompt.turns.push_back(Ask(shape, {distractors[i].first}, {distractors[i].second}));
    }
  }
  const bool one = prompt.turns[0].answers.size() == 1;
  const char* what = shape.uuid_values ? (one ? "uuid" : "uuids") : (one ? "number" : "numbers");
  prompt.context =
      absl::StrCat(one ? "A" : "Some", " special magic ", what, one ? " is" : " are",
                   " hidden within the following text. Make sure to memorize it. I will quiz you "
                   "about the ",
                   what, " afterwards.\n", text);
  return prompt;
}

TaskPrompt MakePasskey(const TaskRequest& request) {
  const auto index = static_cast<uint64_t>(request.index);
  SplitMix64 random = Stream(request.seed, "passkey", index);
  const std::string key = RandomNumber(&random, 5);
  const auto depth = static_cast<int64_t>(random.Below(kDepths));
  TaskPrompt prompt;
  prompt.context =
      "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
      "it. I will quiz you about the important information there.";
  for (int64_t i = 0; i <= request.units; ++i) {
    if (i == request.units * depth / (kDepths - 1)) {
      absl::StrAppend(&prompt.context, "\nThe pass key is ", key, ". Remember it. ", key,
                      " is the pass key.");
    }
    if (i < request.units) absl::StrAppend(&prompt.context, "\n", kNoise);
  }
  prompt.turns.push_back({"What is the pass key?", "The pass key is", {key}});
  return prompt;
}

TaskPrompt MakeKvRetrieval(const TaskRequest& request) {
  const auto index = static_cast<uint64_t>(request.index);
  SplitMix64 random = Stream(request.seed, "kv_retrieval", index);
  SplitMix64 places = Stream(request.seed, "kv_retrieval places", index);
  std::vector<std::pair<std::string, std::string>> pairs;
  for (int64_t i = 0; i < request.units; ++i) {
    std::string key = RandomUuid(&random);
    pairs.emplace_back(std::move(key), RandomUuid(&random));
  }
  TaskPrompt prompt;
  prompt.context =
      "Extract the value corresponding to the specified key in the JSON object below.\n\n"
      "JSON data:\n{";
  for (size_t i = 0; i < pairs.size(); ++i) {
    absl::StrAppend(&prompt.context, i == 0 ? "\"" : " \"", pairs[i].first, "\": \"",
                    pairs[i].second, i + 1 < pairs.size() ? "\",\n" : "\"}");
  }
  prompt.separator += "\n";
  const auto turns = std::min<int64_t>(request.units, kMostTurns);
  for (const int64_t i : Sample(&places, request.units, turns)) {
    const auto& [key, value] = pairs[static_cast<size_t>(i)];
    prompt.turns.push_back(
        {absl::StrCat("Key: \"", key, "\""), "Corresponding value: \"", {value}});
  }
  return prompt;
}

}  // namespace entropyserve::tasks
