// Tasks that look at many places of the text: vt, cwe, fwe.
#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/eval/task.h"

namespace entropyserve::tasks {
namespace {

// --- variable tracking ---

constexpr int kHops = 4;  // a chain of five variables, RULER's

struct Chain {
  std::string text, value;
  std::vector<std::string> names;
};

// One chain of `letters`-letter names in `lines` lines of noise.
Chain MakeChain(int letters, int64_t lines, SplitMix64* random, SplitMix64* places) {
  Chain chain;
  std::set<std::string> taken;
  while (chain.names.size() <= kHops) {
    std::string name = RandomLetters(random, 'A', letters);
    if (taken.insert(name).second) chain.names.push_back(std::move(name));
  }
  chain.value = RandomNumber(random, 5);
  std::vector<int64_t> at = Sample(places, lines, kHops + 1);
  std::sort(at.begin(), at.end());
  std::vector<std::string> parts;
  size_t next = 0;
  for (int64_t i = 0; i < lines; ++i) {
    if (next < at.size() && at[next] == i) {
      parts.push_back(
          absl::StrCat("VAR ", chain.names[next], " = ",
                       next == 0 ? chain.value : absl::StrCat("VAR ", chain.names[next - 1])));
      ++next;
    }
    parts.push_back(kNoise);
  }
  chain.text = absl::StrJoin(parts, "\n");
  return chain;
}

std::string TrackingContext(const Chain& chain) {
  return absl::StrCat(
      "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
      chain.text);
}

TaskTurn TrackingTurn(const Chain& chain) {
  return {absl::StrCat("Question: Find all variables that are assigned the value ", chain.value,
                       " in the text above."),
          absl::StrCat("Answer: According to the chain(s) of variable assignment in the text "
                       "above, ",
                       kHops + 1, " variables are assigned the value ", chain.value, ", they are:"),
          chain.names, " "};
}

// --- common words ---

struct Words {
  std::string list;
  std::vector<std::string> common;
};

constexpr int kCommonWords = 10;
constexpr int64_t kShortLength = 4096;  // below it RULER's frequencies are smaller

// Different words: single ones as long as there are enough, else pairs.
std::vector<std::string> DistinctWords(int64_t count, SplitMix64* random) {
  std::vector<std::string> pool(Adjectives().begin(), Adjectives().end());
  pool.insert(pool.end(), Nouns().begin(), Nouns().end());
  if (count > static_cast<int64_t>(pool.size())) {
    pool.clear();
    for (const char* adjective : Adjectives()) {
      for (const char* noun : Nouns()) pool.push_back(absl::StrCat(adjective, "-", noun));
    }
  }
  const int64_t most = std::min<int64_t>(count, static_cast<int64_t>(pool.size()));
  std::vector<std::string> words;
  for (const int64_t i : Sample(random, static_cast<int64_t>(pool.size()), most)) {
    words.push_back(pool[static_cast<size_t>(i)]);
  }
  return words;
}

Words MakeWords(int64_t count, int common_repeats, int other_repeats, SplitMix64* random) {
  const std::vector<std::string> words = DistinctWords(count, random);
  std::vector<std::string> list;
  for (size_t i = 0; i < words.size(); ++i) {
    list.insert(list.end(), i < kCommonWords ? common_repeats : other_repeats, words[i]);
  }
  Shuffle(random, &list);
  Words out;
  out.common.assign(words.begin(), words.begin() + std::min<size_t>(words.size(), kCommonWords));
  for (size_t i = 0; i < list.size(); ++i) {
    absl::StrAppend(&out.list, i > 0 ? " " : "", i + 1, ". ", list[i]);
  }
  return out;
}

std::string CommonWordsContext(const Words& words) {
  return absl::StrCat(
      "Below is a numbered list of words. In these words, some appear more often than others. "
      "Memorize the ones that appear most often.\n",
      words.list);
}

TaskTurn CommonWordsTurn(const Words& words) {
  return {"Question: What are the 10 most common words in the above list?",
          "Answer: The top 10 words that appear most often in the list are:", words.common};
}

// An answered example before the task, as RULER puts it.
std::string Example(const std::string& context, const TaskTurn& turn, const std::string& answer) {
  return absl::StrCat(context, "\n", turn.question, " ", turn.answer_prefix, " ", answer, "\n");
}

}  // namespace

TaskPrompt MakeVariableTracking(const TaskRequest& request) {
  const auto index = static_cast<uint64_t>(request.index);
  SplitMix64 random = Stream(request.seed, "vt", index);
  SplitMix64 places = Stream(request.seed, "vt places", index);
  SplitMix64 example_random = Stream(request.seed, "vt example", index);
  // Names of three letters, so that they are none of the task's.
  const Chain example = MakeChain(3, 5, &example_random, &example_random);
  const Chain chain = MakeChain(5, request.units, &random, &places);
  TaskPrompt prompt;
  prompt.context = absl::StrCat(
      Example(TrackingContext(example), TrackingTurn(example), absl::StrJoin(example.names, " ")),
      "\n", TrackingContext(chain));
  prompt.turns.push_back(TrackingTurn(chain));
  return prompt;
}

TaskPrompt MakeCommonWords(const TaskRequest& request) {
  const auto index = static_cast<uint64_t>(request.index);
  SplitMix64 random = Stream(request.seed, "cwe", index);
  SplitMix64 example_random = Stream(request.seed, "cwe example", index);
  const bool is_short = request.length < kShortLength;
  const Words example =
      is_short ? MakeWords(20, 3, 1, &example_random) : MakeWords(40, 10, 3, &example_random);
  const Words words =
      is_short ? MakeWords(request.units, 6, 1, &random) : MakeWords(request.units, 30, 3, &random);
  std::string answer;
  for (size_t i = 0; i < example.common.size(); ++i) {
    absl::StrAppend(&answer, i > 0 ? " " : "", i + 1, ". ", example.common[i]);
  }
  TaskPrompt prompt;
  prompt.context =
      absl::StrCat(Example(CommonWordsContext(example), CommonWordsTurn(example), answer), "\n",
                   CommonWordsContext(words));
  prompt.turns.push_back(CommonWordsTurn(words));
  return prompt;
}

TaskPrompt MakeFrequentWords(const TaskRequest& request) {
  SplitMix64 random = Stream(request.seed, "fwe", static_cast<uint64_t>(request.index));
  // RULER's: one coded word in 50 tokens, frequencies by the zeta distribution with alpha 2. The
  // most frequent one is noise, three dots.
  const int64_t vocabulary = std::max<int64_t>(8, request.length / 50);
  constexpr double kZetaOfTwo = 1.6449340668482264;
  std::vector<std::string> names = {"..."};
  std::set<std::string> taken;
  while (static_cast<int64_t>(names.size()) < vocabulary) {
    std::string name = RandomLetters(&random, 'a', 6);
    if (taken.insert(name).second) names.push_back(std::move(name));
  }
  std::vector<std::string> words;
  for (int64_t rank = 1; rank <= vocabulary; ++rank) {
    const auto square = static_cast<double>(rank) * static_cast<double>(rank);
    const auto count =
        static_cast<size_t>(static_cast<double>(request.units) / square / kZetaOfTwo);
    words.insert(words.end(), count, names[static_cast<size_t>(rank - 1)]);
  }
  Shuffle(&random, &words);
  TaskPrompt prompt;
  prompt.context = absl::StrCat(
      "Read the following coded text and track the frequency of each coded word. Find "
      "the three most frequently appeared coded words. ",
      absl::StrJoin(words, " "));
  prompt.turns.push_back(
      {"Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
       "three "
       "most frequently appeared words in the above coded text?",
       "Answer: According to the coded text above, the three most frequently appeared words are:",
       {names[1], names[2], names[3]}});
  return prompt;
}

}  // namespace entropyserve::tasks
