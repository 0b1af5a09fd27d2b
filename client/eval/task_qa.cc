// Questions about generated facts, in RULER's template for questions about documents.
#include <algorithm>
#include <iterator>
#include <set>

#include "absl/strings/str_cat.h"
#include "client/eval/task.h"

namespace entropyserve::tasks {
namespace {

constexpr const char* kTrades[] = {"cartographer", "clockmaker", "botanist",   "glassblower",
                                   "engraver",     "astronomer", "bookbinder", "shipwright",
                                   "violinist",    "surveyor",   "apothecary", "stonemason"};

struct Life {
  std::string name, town, trade, treasure, teacher;
};

// Everyone has a name and a town of their own and was taught by another one of them.
std::vector<Life> DrawLives(int64_t count, SplitMix64* random) {
  std::vector<Life> lives;
  std::set<std::string> taken;
  // A town that is part of a person's name would be a right answer by chance.
  const auto fresh = [&taken, random] {
    for (;;) {
      std::string name = RandomName(random);
      if (taken.insert(name).second) return name;
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    Life life;
    life.name = fresh();
    absl::StrAppend(&life.name, " ", fresh());
    life.town = fresh();
    life.trade = kTrades[random->Below(std::size(kTrades))];
    const char* adjective = Adjectives()[random->Below(Adjectives().size())];
    life.treasure = absl::StrCat(adjective, " ", Nouns()[random->Below(Nouns().size())]);
    lives.push_back(life);
  }
  for (size_t i = 0; i < lives.size(); ++i) {
    const size_t steps = 1 + random->Below(lives.size() - 1);  // nobody teaches himself
    lives[i].teacher = lives[(i + steps) % lives.size()].name;
  }
  return lives;
}

std::string Document(int64_t number, const Life& life) {
  return absl::StrCat("Document ", number, ":\n", life.name, " was born in ", life.town,
                      " and became a well known ", life.trade, ". The teacher of ", life.name,
                      " was ", life.teacher, ". Among the belongings of ", life.name, " was a ",
                      life.treasure, ", which is still on display.");
}

TaskTurn Ask(bool multihop, const std::vector<Life>& lives, size_t who) {
  const Life& life = lives[who];
  const auto teacher = std::find_if(lives.begin(), lives.end(), [&life](const Life& other) {
    return other.name == life.teacher;
  });
  TaskTurn turn;
  turn.question = absl::StrCat(
      "Answer the question based on the given documents. Only give me the answer and do not output "
      "any other words.\n\nQuestion: In which town was ",
      multihop ? absl::StrCat("the teacher of ", life.name) : life.name, " born?");
  turn.answer_prefix = "Answer:";
  turn.answers = {multihop ? teacher->town : life.town};
  return turn;
}

}  // namespace

TaskPrompt MakeQa(bool multihop, const TaskRequest& request) {
  const auto index = static_cast<uint64_t>(request.index);
  SplitMix64 random = Stream(request.seed, multihop ? "qa_multihop" : "qa_facts", index);
  SplitMix64 places = Stream(request.seed, "qa places", index);
  const std::vector<Life> lives = DrawLives(request.units, &random);
  TaskPrompt prompt;
  prompt.context =
      "Answer the question based on the given documents. Only give me the answer and do not output "
      "any other words.\n\nThe following are given documents.\n";
  for (size_t i = 0; i < lives.size(); ++i) {
    absl::StrAppend(&prompt.context, "\n", Document(static_cast<int64_t>(i) + 1, lives[i]), "\n");
  }
  for (const int64_t who : Sample(&places, request.units, 4)) {
    prompt.turns.push_back(Ask(multihop, lives, static_cast<size_t>(who)));
  }
  return prompt;
}

}  // namespace entropyserve::tasks
