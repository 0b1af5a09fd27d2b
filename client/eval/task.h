// Tasks with known answers, generated at any length. The templates and scores of niah_*, vt, cwe
// and fwe are those of RULER (arXiv 2404.06654, NVIDIA/RULER), passkey's of arXiv 2305.16300,
// kv_retrieval's of arXiv 2307.03172; words, names and text are our own. Deterministic: a prompt
// is a function of TaskRequest, byte for byte, on every platform.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "client/eval/words.h"

namespace entropyserve {

// How an answer scores against the expected strings, without regard to case.
enum class Match {
  kAll,  // share of them that occur in it: RULER's string_match_all
  kAny,  // whether one of them does: RULER's string_match_part
};

struct TaskTurn {
  std::string question;
  std::string answer_prefix;  // how the answer begins; given, not generated, and not scored
  std::vector<std::string> answers;
  std::string joint = ", ";  // between them, where the whole answer is given
};

struct TaskPrompt {
  std::string context;           // instruction and text
  std::string separator = "\n";  // between context and question
  std::vector<TaskTurn> turns;   // the first is the task's question; the others ask further
};

struct TaskRequest {
  uint64_t seed = 0;
  int index = 0;
  int64_t length = 0;  // tokens of the whole, which some tasks' frequencies follow
  int64_t units = 0;   // sentences, needles, words, pairs, documents: what grows with the length
  const Haystack* haystack = nullptr;
};

struct Task {
  const char* name;
  const char* summary;
  Match match;
  int answer_tokens;  // RULER's tokens_to_generate
  int64_t min_units;
  bool uses_haystack;  // reads TaskRequest.haystack
  bool further_turns;  // has more than one turn
  bool ruler;          // by this name and with these parameters in RULER
  TaskPrompt (*make)(const TaskRequest& request);
};

std::span<const Task> Tasks();
const Task* FindTask(std::string_view name);  // nullptr: none

// What follows the answer's beginning when the right answer is given: of Match::kAny the first.
std::string RightAnswer(Match match, const TaskTurn& turn);

// In [0, 1].
double Score(Match match, std::string_view answer, const std::vector<std::string>& expected);

// The makers, by file.
namespace tasks {
struct NiahShape {
  enum class Text { kNoise, kSentences, kNeedles } text;
  bool uuid_keys = false, uuid_values = false;
  int keys = 1, values = 1, queries = 1;
};
TaskPrompt MakeNiah(std::string_view name, const NiahShape& shape, const TaskRequest& request);
TaskPrompt MakePasskey(const TaskRequest& request);
TaskPrompt MakeVariableTracking(const TaskRequest& request);
TaskPrompt MakeCommonWords(const TaskRequest& request);
TaskPrompt MakeFrequentWords(const TaskRequest& request);
TaskPrompt MakeKvRetrieval(const TaskRequest& request);
TaskPrompt MakeQa(bool multihop, const TaskRequest& request);

inline constexpr char kNoise[] =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
}  // namespace tasks

}  // namespace entropyserve
