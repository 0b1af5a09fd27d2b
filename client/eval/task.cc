#include "client/eval/task.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace entropyserve {
namespace {

using Text = tasks::NiahShape::Text;

constexpr Task kTasks[] = {
    {"niah_single_1", "a number in repeated noise", Match::kAll, 128, 4, false, false, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_single_1", {.text = Text::kNoise}, r);
     }},
    {"niah_single_2", "a number in text", Match::kAll, 128, 4, true, false, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_single_2", {.text = Text::kSentences}, r);
     }},
    {"niah_single_3", "a UUID in text", Match::kAll, 128, 4, true, false, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_single_3", {.text = Text::kSentences, .uuid_values = true}, r);
     }},
    {"niah_multikey_1", "one of four keys in text", Match::kAll, 128, 8, true, true, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_multikey_1", {.text = Text::kSentences, .keys = 4}, r);
     }},
    {"niah_multikey_2", "one key among nothing but others", Match::kAll, 128, 8, false, true, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_multikey_2", {.text = Text::kNeedles}, r);
     }},
    {"niah_multikey_3", "the same with UUIDs", Match::kAll, 128, 8, false, true, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_multikey_3",
                              {.text = Text::kNeedles, .uuid_keys = true, .uuid_values = true}, r);
     }},
    {"niah_multivalue", "four values of one key", Match::kAll, 128, 8, true, false, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_multivalue", {.text = Text::kSentences, .values = 4}, r);
     }},
    {"niah_multiquery", "four keys at once", Match::kAll, 128, 8, true, true, true,
     [](const TaskRequest& r) {
       return tasks::MakeNiah("niah_multiquery",
                              {.text = Text::kSentences, .keys = 4, .queries = 4}, r);
     }},
    {"vt", "a chain of five variables", Match::kAll, 30, 8, false, false, true,
     tasks::MakeVariableTracking},
    {"cwe", "the ten most common words", Match::kAll, 120, 10, false, false, true,
     tasks::MakeCommonWords},
    {"fwe", "the three most frequent coded words", Match::kAll, 50, 64, false, false, true,
     tasks::MakeFrequentWords},
    {"qa_facts", "a fact of one of many generated lives", Match::kAny, 32, 6, false, true, false,
     [](const TaskRequest& r) { return tasks::MakeQa(false, r); }},
    {"qa_multihop", "a fact that two of them hold together", Match::kAny, 32, 6, false, true, false,
     [](const TaskRequest& r) { return tasks::MakeQa(true, r); }},
    {"passkey", "five digits in repeated noise", Match::kAll, 16, 4, false, false, false,
     tasks::MakePasskey},
    {"kv_retrieval", "one value of a JSON object of UUIDs", Match::kAll, 64, 6, false, true, false,
     tasks::MakeKvRetrieval},
};

}  // namespace

std::span<const Task> Tasks() { return kTasks; }

const Task* FindTask(std::string_view name) {
  for (const Task& task : kTasks) {
    if (name == task.name) return &task;
  }
  return nullptr;
}

std::string RightAnswer(Match match, const TaskTurn& turn) {
  // Where the beginning ends in a quotation mark, the answer is a part of what is quoted.
  const char* space = absl::EndsWith(turn.answer_prefix, "\"") ? "" : " ";
  if (match == Match::kAny) return absl::StrCat(space, turn.answers[0]);
  return absl::StrCat(space, absl::StrJoin(turn.answers, turn.joint));
}

double Score(Match match, std::string_view answer, const std::vector<std::string>& expected) {
  const std::string text = absl::AsciiStrToLower({answer.data(), answer.size()});
  const auto found =
      std::count_if(expected.begin(), expected.end(), [&text](const std::string& reference) {
        return text.find(absl::AsciiStrToLower(reference)) != std::string::npos;
      });
  if (match == Match::kAny) return found > 0 ? 1 : 0;
  return expected.empty() ? 0 : static_cast<double>(found) / static_cast<double>(expected.size());
}

}  // namespace entropyserve
