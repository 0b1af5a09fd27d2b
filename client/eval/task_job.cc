#include "client/eval/task_job.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace entropyserve {
namespace {

constexpr const char* kVariantNames[] = {"", "/hidden", "/forked", "/turns"};

}  // namespace

std::string TaskJob::name() const {
  return absl::StrCat(task->name, kVariantNames[static_cast<int>(variant)]);
}

absl::StatusOr<std::vector<TaskJob>> ParseTasks(std::string_view text,
                                                const std::vector<int64_t>& lengths) {
  std::vector<TaskJob> jobs;
  std::set<std::string> named;
  const auto add = [&](const Task& task, Variant variant) {
    TaskJob job{&task, variant, 0};
    if (!named.insert(job.name()).second) return;
    for (const int64_t length : lengths) {
      job.length = length;
      jobs.push_back(job);
    }
  };
  for (const auto piece :
       absl::StrSplit(absl::string_view(text.data(), text.size()), ',', absl::SkipEmpty())) {
    const std::string part(piece);
    const size_t slash = std::min(part.find('/'), part.size());
    const std::string name = part.substr(0, slash), variant_name = part.substr(slash);
    const auto variant =
        std::find(std::begin(kVariantNames), std::end(kVariantNames), variant_name);
    if (variant == std::end(kVariantNames)) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", part, "\": expected /hidden, /forked or /turns after the task"));
    }
    const auto chosen = static_cast<Variant>(variant - std::begin(kVariantNames));
    const bool group = name == "all" || name == "ruler";
    const Task* const task = FindTask(name);
    if (!group && task == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("no task \"", name, "\"; --list-tasks prints them"));
    }
    if (task != nullptr && chosen == Variant::kTurns && !task->further_turns) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", part, "\": ", name, " has one question only"));
    }
    for (const Task& each : Tasks()) {
      const bool wanted = group ? (name == "all" || each.ruler) : &each == task;
      if (wanted && (chosen != Variant::kTurns || each.further_turns)) add(each, chosen);
    }
  }
  if (jobs.empty()) return absl::InvalidArgumentError("expected at least one task");
  return jobs;
}

}  // namespace entropyserve
