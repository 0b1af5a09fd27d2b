// The evaluation's generators, scorer, sizes and statistics against cases worked by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/eval/fit.h"
#include "client/eval/random.h"
#include "client/eval/statistics.h"
#include "client/eval/task.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

TaskPrompt Make(const char* task, int64_t units = 50, int index = 0, uint64_t seed = 1,
                int64_t length = 4096) {
  static const Haystack kGenerated;
  return FindTask(task)->make({seed, index, length, units, &kGenerated});
}

int Count(const std::string& text, const std::string& part) {
  int n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

std::string WholeText(const TaskPrompt& prompt) {
  std::string text = absl::StrCat(prompt.context, "\x01", prompt.separator);
  for (const TaskTurn& turn : prompt.turns) {
    absl::StrAppend(&text, "\x01", turn.question, "\x01", turn.answer_prefix);
    for (const std::string& answer : turn.answers) absl::StrAppend(&text, "\x01", answer);
  }
  return text;
}

TEST(EvalRandomTest, IsSplitMix64) {
  SplitMix64 random(0);  // the published sequence of seed 0
  EXPECT_EQ(random.Next(), 0xe220a8397b1dcdafu);
  EXPECT_EQ(random.Next(), 0x6e789e6aa1b965f4u);
  EXPECT_EQ(random.Next(), 0x06c45d188009454fu);
}

TEST(EvalTasksTest, TheSameSeedGivesTheSameBytes) {
  // Changing one of these makes older results incomparable: name a new task instead.
  const std::map<std::string, uint64_t> kGolden = {
      {"niah_single_1", 9862413854683955854u},
      {"niah_single_2", 11868354678686238107u},
      {"niah_single_3", 17399611124890822977u},
      {"niah_multikey_1", 10409622142104242482u},
      {"niah_multikey_2", 7400753825284966066u},
      {"niah_multikey_3", 8547625959076598630u},
      {"niah_multivalue", 16595854012070666652u},
      {"niah_multiquery", 16329452005997565008u},
      {"vt", 5851797591456938389u},
      {"cwe", 7079552669415801750u},
      {"fwe", 4110779287837292894u},
      {"qa_facts", 4494957705769310411u},
      {"qa_multihop", 4504779425894944953u},
      {"passkey", 6953567243001244255u},
      {"kv_retrieval", 17404738027193208878u},
  };
  for (const Task& task : Tasks()) {
    uint64_t hash = HashBytes("");
    for (int index = 0; index < 3; ++index) {
      hash = HashBytes(WholeText(Make(task.name, 40, index, 7)), hash);
    }
    ASSERT_EQ(kGolden.count(task.name), 1u) << task.name << " " << hash;
    EXPECT_EQ(kGolden.at(task.name), hash) << task.name;
    EXPECT_NE(WholeText(Make(task.name, 40, 0, 7)), WholeText(Make(task.name, 40, 0, 8)));
    EXPECT_NE(WholeText(Make(task.name, 40, 0, 7)), WholeText(Make(task.name, 40, 1, 7)));
  }
}

// Whatever the size, what is asked and answered stays; so that the size can be searched.
TEST(EvalTasksTest, SizeChangesNeitherQuestionNorAnswer) {
  for (const char* task :
       {"niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
        "niah_multikey_3", "niah_multivalue", "niah_multiquery", "passkey", "vt"}) {
    const TaskTurn small = Make(task, 20).turns[0], large = Make(task, 200).turns[0];
    EXPECT_EQ(small.question, large.question) << task;
    EXPECT_EQ(small.answers, large.answers) << task;
  }
}

TEST(EvalTasksTest, NeedlesStandOnceInTheText) {
  for (const Task& task : Tasks()) {
    const std::string name = task.name;
    if (name.rfind("niah", 0) != 0) continue;
    SCOPED_TRACE(name);
    for (int index = 0; index < 20; ++index) {
      const TaskPrompt prompt = Make(task.name, 60, index);
      for (const TaskTurn& turn : prompt.turns) {
        for (const std::string& answer : turn.answers) {
          EXPECT_EQ(Count(prompt.context, absl::StrCat(" is: ", answer, ".")), 1);
          EXPECT_THAT(turn.question + turn.answer_prefix, Not(HasSubstr(answer)));
        }
      }
    }
  }
}

TEST(EvalTasksTest, NeedleTasksHaveRulersParameters) {
  const TaskPrompt single = Make("niah_single_1", 30);
  EXPECT_THAT(single.context,
              StartsWith("A special magic number is hidden within the following text. Make sure to "
                         "memorize it. I will quiz you about the number afterwards.\n"));
  EXPECT_EQ(Count(single.context, tasks::kNoise), 30);
  EXPECT_EQ(Count(single.context, "One of the special magic numbers for "), 1);
  EXPECT_THAT(single.turns[0].question, StartsWith("What is the special magic number for "));
  EXPECT_THAT(single.turns[0].answer_prefix, EndsWith(" mentioned in the provided text is"));
  EXPECT_EQ(single.turns[0].answers[0].size(), 7u);
  EXPECT_EQ(single.turns.size(), 1u);

  const TaskPrompt uuid = Make("niah_single_3", 30);
  EXPECT_THAT(uuid.context, StartsWith("A special magic uuid is hidden"));
  EXPECT_EQ(uuid.turns[0].answers[0].size(), 36u);
  EXPECT_EQ(uuid.turns[0].answers[0][14], '4');

  EXPECT_EQ(Count(Make("niah_multikey_1", 30).context, "One of the special magic numbers for "), 4);
  EXPECT_EQ(Count(Make("niah_multikey_2", 30).context, "One of the special magic numbers for "),
            31);
  EXPECT_EQ(Make("niah_multikey_2", 30).turns.size(), 4u);  // one key and three of the others

  const TaskPrompt values = Make("niah_multivalue", 30);
  EXPECT_THAT(values.context, StartsWith("Some special magic numbers are hidden within"));
  EXPECT_EQ(values.turns[0].answers.size(), 4u);
  const TaskPrompt queries = Make("niah_multiquery", 30);
  EXPECT_THAT(queries.turns[0].question, StartsWith("What are all the special magic numbers for "));
  EXPECT_EQ(Count(queries.turns[0].question, ", "), 3);
  EXPECT_EQ(queries.turns[0].answers.size(), 4u);
  EXPECT_EQ(queries.turns[1].answers.size(), 1u);
}

TEST(EvalTasksTest, NeedlesLieEverywhere) {
  std::set<int> tenths;
  for (int index = 0; index < 200; ++index) {
    const std::string text = Make("niah_single_2", 100, index).context;
    tenths.insert(static_cast<int>(10 * text.find("One of the special") / text.size()));
  }
  EXPECT_GE(tenths.size(), 10u);
}

TEST(EvalTasksTest, VariablesFormOneChain) {
  const TaskPrompt prompt = Make("vt", 30);
  const TaskTurn& turn = prompt.turns[0];
  ASSERT_EQ(turn.answers.size(), 5u);
  const std::string value = turn.question.substr(turn.question.find("the value ") + 10, 5);
  size_t at = prompt.context.find(absl::StrCat("VAR ", turn.answers[0], " = ", value, "\n"));
  ASSERT_NE(at, std::string::npos);
  for (int i = 1; i < 5; ++i) {  // in this order
    const size_t next = prompt.context.find(
        absl::StrCat("VAR ", turn.answers[i], " = VAR ", turn.answers[i - 1], "\n"));
    ASSERT_NE(next, std::string::npos);
    EXPECT_GT(next, at);
    at = next;
  }
  // The example before it has five lines and an answer, with a value of its own.
  EXPECT_EQ(Count(prompt.context, tasks::kNoise), 30 + 5);
  EXPECT_EQ(Count(prompt.context, value), 1);
  EXPECT_EQ(Count(prompt.context, "5 variables are assigned the value "), 1);
}

// Words of the last list.
std::map<std::string, int> WordCounts(const std::string& context) {
  std::map<std::string, int> counts;
  const std::string list = context.substr(context.rfind('\n') + 1);
  int number = 0;
  const std::vector<std::string> parts = absl::StrSplit(list, ' ');
  for (size_t i = 0; i + 1 < parts.size(); i += 2) {
    EXPECT_EQ(parts[i], absl::StrCat(++number, "."));
    ++counts[parts[i + 1]];
  }
  return counts;
}

TEST(EvalTasksTest, CommonWordsAreThirtyTimesThere) {
  // 100 words: ten 30 times and ninety 3 times; 1000 are more than there are single ones.
  for (const int64_t units : {100, 1000}) {
    const TaskPrompt prompt = Make("cwe", units);
    std::map<std::string, int> counts = WordCounts(prompt.context);
    EXPECT_EQ(static_cast<int64_t>(counts.size()), units);
    ASSERT_EQ(prompt.turns[0].answers.size(), 10u);
    for (const std::string& word : prompt.turns[0].answers) {
      EXPECT_EQ(counts[word], 30);
      counts.erase(word);
    }
    for (const auto& [word, count] : counts) EXPECT_EQ(count, 3) << word;
  }
  std::map<std::string, int> few = WordCounts(Make("cwe", 100, 0, 1, 2048).context);
  EXPECT_EQ(few[Make("cwe", 100, 0, 1, 2048).turns[0].answers[0]], 6);
}

TEST(EvalTasksTest, CodedWordsFollowTheZetaDistribution) {
  // 1645 words, zeta(2) = 1.6449: ranks 1, 2, 3, 4 are there 1000.04, 250.01, 111.1 and 62.5 times.
  const TaskPrompt prompt = Make("fwe", 1645);
  std::map<std::string, int> counts;
  const size_t begin = prompt.context.find("coded words. ") + 13;
  for (const std::string& word :
       std::vector<std::string>(absl::StrSplit(prompt.context.substr(begin), ' '))) {
    ++counts[word];
  }
  EXPECT_EQ(counts["..."], 1000);
  ASSERT_EQ(prompt.turns[0].answers.size(), 3u);
  EXPECT_EQ(counts[prompt.turns[0].answers[0]], 250);
  EXPECT_EQ(counts[prompt.turns[0].answers[1]], 111);
  EXPECT_EQ(counts[prompt.turns[0].answers[2]], 62);
}

TEST(EvalTasksTest, PasskeyAndPairsAreInTheText) {
  const TaskPrompt passkey = Make("passkey", 30);
  const std::string key = passkey.turns[0].answers[0];
  EXPECT_THAT(passkey.context, HasSubstr(absl::StrCat("\nThe pass key is ", key, ". Remember it. ",
                                                      key, " is the pass key.\n")));
  EXPECT_EQ(Count(passkey.context, tasks::kNoise), 30);

  const TaskPrompt pairs = Make("kv_retrieval", 30);
  const auto json = nlohmann::json::parse(pairs.context.substr(pairs.context.find('{')));
  EXPECT_EQ(json.size(), 30u);
  std::set<std::string> asked;
  for (const TaskTurn& turn : pairs.turns) {
    const std::string name = turn.question.substr(6, 36);
    EXPECT_EQ(json[name], turn.answers[0]);
    asked.insert(name);
  }
  EXPECT_EQ(asked.size(), 4u);
}

TEST(EvalTasksTest, FactsAnswerTheQuestions) {
  const auto between = [](const std::string& text, const std::string& from, const std::string& to) {
    const size_t begin = text.find(from);
    EXPECT_NE(begin, std::string::npos) << from;
    const size_t start = begin + from.size();
    return text.substr(start, text.find(to, start) - start);
  };
  const TaskPrompt facts = Make("qa_facts", 20);
  EXPECT_EQ(Count(facts.context, "Document "), 20);
  for (const TaskTurn& turn : facts.turns) {
    const std::string who = between(turn.question, "In which town was ", " born?");
    EXPECT_THAT(turn.answers, ElementsAre(between(facts.context, who + " was born in ", " and")));
    EXPECT_EQ(Count(facts.context, turn.answers[0]), 1);
  }
  const TaskPrompt hops = Make("qa_multihop", 20);
  for (const TaskTurn& turn : hops.turns) {
    const std::string who = between(turn.question, "the teacher of ", " born?");
    const std::string teacher = between(hops.context, "The teacher of " + who + " was ", ".");
    EXPECT_NE(teacher, who);
    EXPECT_THAT(turn.answers,
                ElementsAre(between(hops.context, teacher + " was born in ", " and")));
  }
}

TEST(EvalTasksTest, AHaystackIsTheFilesSentencesInTheirOrder) {
  const Haystack file("a.txt", "One  is\nhere. Two is! Three?\n\nFour");
  EXPECT_THAT(file.name(), StartsWith("a.txt "));
  const std::vector<std::string> sentences = file.Sentences(1, 0, 9);
  ASSERT_EQ(sentences.size(), 9u);
  const std::vector<std::string> all = {"One is here.", "Two is!", "Three?", "Four"};
  const size_t start = std::find(all.begin(), all.end(), sentences[0]) - all.begin();
  for (size_t i = 0; i < 9; ++i) EXPECT_EQ(sentences[i], all[(start + i) % 4]);
  EXPECT_EQ(Haystack("empty.txt", " \n").name(), "generated");
  EXPECT_NE(Haystack("a.txt", "One.").name(), Haystack("a.txt", "Two.").name());
  const TaskPrompt prompt = FindTask("niah_single_2")->make({1, 0, 4096, 10, &file});
  EXPECT_THAT(prompt.context, HasSubstr("One is here."));
}

TEST(EvalScoreTest, CountsWhatOccurs) {
  EXPECT_DOUBLE_EQ(Score(Match::kAll, "the answer is 12 and AB.", {"12", "ab"}), 1);
  EXPECT_DOUBLE_EQ(Score(Match::kAll, "the answer is 12", {"12", "34", "56", "78"}), 0.25);
  EXPECT_DOUBLE_EQ(Score(Match::kAll, "", {"12"}), 0);
  EXPECT_DOUBLE_EQ(Score(Match::kAny, "Torvik", {"Oslo", "torvik"}), 1);
  EXPECT_DOUBLE_EQ(Score(Match::kAny, "Tor vik", {"Oslo", "torvik"}), 0);
}

// --- sizes ---

void ExpectFit(int64_t target, int64_t least, int64_t guess,
               const std::function<int64_t(int64_t)>& tokens, int most_calls) {
  int calls = 0;
  const auto fit = FitUnits(target, least, guess, [&](int64_t units) -> absl::StatusOr<int64_t> {
    ++calls;
    return tokens(units);
  });
  ASSERT_TRUE(fit.ok()) << fit.status();
  EXPECT_EQ(fit->tokens, tokens(fit->units));
  EXPECT_LE(fit->tokens, target);
  EXPECT_TRUE(target - fit->tokens <= target / 100 || tokens(fit->units + 1) > target)
      << fit->units << " units, " << fit->tokens << " of " << target;
  EXPECT_LE(calls, most_calls);
}

TEST(EvalFitTest, FillsTheLengthAndNeverMore) {
  for (const int64_t target : {500, 4096, 131072, 1000000}) {
    for (const int64_t guess : {0, 20, 100000}) {
      SCOPED_TRACE(absl::StrCat(target, " ", guess));
      ExpectFit(
          target, 8, guess, [](int64_t n) { return 100 + 25 * n; }, 8);
      ExpectFit(
          target, 8, guess, [](int64_t n) { return 30 + n / 2; }, 12);
      ExpectFit(
          target, 2, guess, [](int64_t n) { return 200 + 90 * n; }, 8);
      ExpectFit(
          target, 8, guess, [](int64_t n) { return 50 + n + n * n / 2000; }, 20);
      ExpectFit(
          target, 8, guess,
          [](int64_t n) { return 50 + (n < 374 ? 8 * n : 3000 + 20 * (n - 374)); }, 20);
    }
  }
  const auto too_long =
      FitUnits(99, 4, 0, [](int64_t n) { return absl::StatusOr<int64_t>(25 * n); });
  EXPECT_EQ(too_long.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(too_long.status().message()), HasSubstr("takes 100 tokens of the 99"));
}

// --- statistics ---

void ExpectNear(const Interval& interval, double low, double high, double tolerance = 5e-5) {
  EXPECT_NEAR(interval.low, low, tolerance);
  EXPECT_NEAR(interval.high, high, tolerance);
}

TEST(EvalStatisticsTest, WilsonByHand) {
  // With z = 1.96: 9 of 10: (0.9 + 0.19207 -+ 1.95996 sqrt(0.009 + 0.0096)) / 1.38415.
  ExpectNear(Wilson(0.9, 10), 0.59585, 0.98212);
  ExpectNear(Wilson(0, 10), 0, 0.27753);
  ExpectNear(Wilson(1, 10), 0.72247, 1);
  ExpectNear(Wilson(0.5, 100), 0.40383, 0.59617);
  ExpectNear(Wilson(0, 0), 0, 1);
}

TEST(EvalStatisticsTest, PairedDifferencesByHand) {
  std::vector<double> a, b;
  const auto add = [&](int n, double of_a, double of_b) {
    a.insert(a.end(), n, of_a);
    b.insert(b.end(), n, of_b);
  };
  add(36, 1, 1);  // of 50 pairs
  add(12, 1, 0);
  add(2, 0, 1);
  // p_a = .96 in [.86540, .98896], p_b = .76 in [.62587, .85703], phi = (36 * 0 - 12 * 2) /
  // sqrt(48 * 2 * 38 * 12) = -.114708; below sqrt(.09460^2 + 2 * .114708 * .09460 * .09703 +
  // .09703^2) = .14307, above likewise .14043.
  ExpectNear(PairedDifference(a, b), 0.2 - 0.14307, 0.2 + 0.14043);
  // Equal pairs: phi = 1, so that the sides are what the two margins differ by.
  a.assign(9, 1);
  a.push_back(0);
  ExpectNear(PairedDifference(a, a), -(0.30415 - 0.08212), 0.30415 - 0.08212);
  // All right: phi is not defined and counts as 0.
  a.assign(10, 1);
  ExpectNear(PairedDifference(a, a), -0.27753, 0.27753);
}

TEST(EvalStatisticsTest, SharesAreResampled) {
  // Differences of -0.25 and 0 for 50 prompts each: -0.125 -+ 1.96 * 0.125 / 10.
  std::vector<double> a(50, 0.5), b(100, 0.75);
  a.resize(100, 0.75);
  ExpectNear(PairedDifference(a, b), -0.1495, -0.1005, 0.006);
  EXPECT_EQ(PairedDifference(a, b).low, PairedDifference(a, b).low);
  // Where all differ by the same, resamples do too, and would say that this is certain.
  EXPECT_GT(PairedDifference(b, b).high, 0.05);
}

TEST(EvalStatisticsTest, BootstrapCoversTheMean) {
  ExpectNear(Bootstrap(std::vector<double>(5, 0.25)), 0.25, 0.25);
  std::vector<double> values(50, 0);
  values.resize(100, 1);
  ExpectNear(Bootstrap(values), 0.402, 0.598, 0.02);  // 0.5 -+ 1.96 * 0.05
  EXPECT_EQ(Bootstrap(values).low, Bootstrap(values).low);
}

TEST(EvalStatisticsTest, TheFrontIsWhatNothingBeats) {
  const std::vector<Point> points = {{1, 5}, {2, 3}, {2, 4}, {3, 3}, {4, 1}, {4, 1}};
  EXPECT_THAT(ParetoFront(points), ElementsAre(true, true, false, false, true, true));
}

}  // namespace
}  // namespace entropyserve
