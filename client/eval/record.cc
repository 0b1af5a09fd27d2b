#include "client/eval/record.h"

#include <sys/stat.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "client/eval/random.h"
#include "client/terminal.h"
#include "engine/base/read_file.h"
#include "engine/base/status_macros.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using Json = nlohmann::ordered_json;

// One list of fields for writing and reading. `visit(name, field)`.
template <typename Record, typename Visit>
void VisitTask(Record& r, Visit visit) {
  visit("server", r.server);
  visit("task", r.task);
  visit("policy", r.policy);
  visit("haystack", r.haystack);
  visit("format", r.format);
  visit("length", r.length);
  visit("index", r.index);
  visit("seed", r.seed);
  visit("answer_limit", r.answer_limit);
  visit("score", r.score);
  visit("turn_scores", r.turn_scores);
  visit("answers", r.answers);
  visit("expected", r.expected);
  visit("prompt_tokens", r.prompt_tokens);
  visit("generated_tokens", r.generated_tokens);
  visit("compressed", r.compressed);
  visit("flops_executed", r.flops_executed);
  visit("flops_dense", r.flops_dense);
  visit("kv_bytes_before", r.kv_bytes_before);
  visit("kv_bytes_after", r.kv_bytes_after);
  visit("prefill_seconds", r.prefill_seconds);
  visit("ttft_seconds", r.ttft_seconds);
  visit("decode_seconds", r.decode_seconds);
  visit("concurrency", r.concurrency);
}

// Fields that files of earlier versions lack.
template <typename Record, typename Visit>
void VisitLaterTask(Record& r, Visit visit) {
  visit("answer_nll", r.answer_nll);
  visit("answer_nll_tokens", r.answer_nll_tokens);
}

template <typename Record, typename Visit>
void VisitCompare(Record& r, Visit visit) {
  visit("server", r.server);
  visit("text", r.text);
  visit("policy", r.policy);
  visit("length", r.length);
  visit("window", r.window);
  visit("windows", r.windows);
  visit("score", r.score);
  visit("decode", r.decode);
  const auto part = [&visit](const std::string& name, auto& p) {
    visit(name + "_n", p.n);
    visit(name + "_kl", p.kl);
    visit(name + "_top1", p.top1);
    visit(name + "_nll_a", p.nll_a);
    visit(name + "_nll_b", p.nll_b);
  };
  part("prompt", r.prompt);
  part("decode", r.decoded);
  visit("flops_executed", r.flops_executed);
  visit("flops_dense", r.flops_dense);
  visit("prefill_seconds", r.prefill_seconds);
  visit("full_seconds", r.full_seconds);
  visit("kv_bytes", r.kv_bytes);
  visit("kv_bytes_full", r.kv_bytes_full);
}

// Answers are the model's bytes and need not be whole characters.
std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

std::string ServerName(const v1::GetModelResponse& model, const v1::GetServerResponse& server) {
  return absl::StrFormat("%s %s %s %016x", model.name(), model.dtype(), server.backend(),
                         HashBytes(ToJson(model.default_policy())));
}

std::string KeyOf(const TaskRecord& r) {
  return absl::StrCat("task\n", r.server, "\n", r.task, "\n", r.policy, "\n", r.haystack, "\n",
                      r.format, "\n", r.length, " ", r.index, " ", r.seed, " ", r.answer_limit);
}

std::string KeyOf(const CompareRecord& r) {
  return absl::StrCat("compare\n", r.server, "\n", r.text, "\n", r.policy, "\n", r.length, " ",
                      r.window, " ", r.windows, " ", r.score, " ", r.decode);
}

std::string ToJsonLine(const TaskRecord& record) {
  Json json = {{"kind", "task"}};
  const auto write = [&json](const std::string& name, const auto& value) { json[name] = value; };
  VisitTask(record, write);
  VisitLaterTask(record, write);
  return Dump(json);
}

std::string ToJsonLine(const CompareRecord& record) {
  Json json = {{"kind", "compare"}};
  VisitCompare(record, [&json](const std::string& name, const auto& value) { json[name] = value; });
  return Dump(json);
}

absl::StatusOr<std::unique_ptr<RecordFile>> RecordFile::Open(const std::string& path, bool resume,
                                                             const std::string& server) {
  auto file = std::make_unique<RecordFile>();
  if (path.empty()) return file;
  file->path_ = path;
  std::string kept;
  struct stat info = {};
  const bool exists = stat(path.c_str(), &info) == 0;
  if (exists && !resume) {
    return absl::AlreadyExistsError(
        absl::StrCat("--output: ", path, " exists; add to it with --resume, or name another"));
  }
  if (exists) RETURN_IF_ERROR(file->Load(path, server, &kept));
  MutexLock lock(&file->mutex_);
  file->file_.open(path, std::ios::binary);
  file->file_ << kept << std::flush;
  if (!file->file_) return absl::NotFoundError(absl::StrCat("--output: cannot write ", path));
  return file;
}

absl::Status RecordFile::Load(const std::string& path, const std::string& server,
                              std::string* kept) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<std::string> lines = absl::StrSplit(text, '\n');
  lines.pop_back();  // what follows the last newline
  MutexLock lock(&mutex_);
  for (size_t i = 0; i < lines.size(); ++i) {
    const auto at = [&](absl::string_view what) {
      return absl::InvalidArgumentError(
          absl::StrCat("--output: ", path, ", line ", i + 1, ": ", what));
    };
    const Json json = Json::parse(lines[i], nullptr, false);
    TaskRecord task;
    CompareRecord compare;
    const bool is_task = json.is_object() && json.value("kind", "") == "task";
    try {
      // The library reports by exceptions what a record lacks.
      const auto read = [&json](const std::string& name, auto& value) {
        json.at(name).get_to(value);
      };
      is_task ? VisitTask(task, read) : VisitCompare(compare, read);
      VisitLaterTask(task, [&json](const std::string& name, auto& value) {
        if (json.contains(name)) json.at(name).get_to(value);
      });
    } catch (const Json::exception&) {
      return at("expected a record as an earlier run wrote it");
    }
    const std::string& of = is_task ? task.server : compare.server;
    if (!server.empty() && of != server) {
      return at(absl::StrCat("it is of \"", of, "\", and this server is \"", server,
                             "\"; name another file"));
    }
    if (!keys_.insert(is_task ? KeyOf(task) : KeyOf(compare)).second) continue;
    absl::StrAppend(kept, lines[i], "\n");
    is_task ? tasks_.push_back(std::move(task)) : compares_.push_back(std::move(compare));
  }
  return absl::OkStatus();
}

bool RecordFile::Has(const std::string& key) const {
  MutexLock lock(&mutex_);
  return keys_.count(key) > 0;
}

absl::Status RecordFile::Write(const std::string& line) {
  if (path_.empty()) return absl::OkStatus();
  file_ << line << "\n" << std::flush;
  if (file_) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("--output: cannot write ", path_));
}

absl::Status RecordFile::Add(TaskRecord record) {
  MutexLock lock(&mutex_);
  keys_.insert(KeyOf(record));
  const std::string line = ToJsonLine(record);
  tasks_.push_back(std::move(record));
  return Write(line);
}

absl::Status RecordFile::Add(CompareRecord record) {
  MutexLock lock(&mutex_);
  keys_.insert(KeyOf(record));
  const std::string line = ToJsonLine(record);
  compares_.push_back(std::move(record));
  return Write(line);
}

std::vector<TaskRecord> RecordFile::task_records() const {
  MutexLock lock(&mutex_);
  return tasks_;
}

std::vector<CompareRecord> RecordFile::compare_records() const {
  MutexLock lock(&mutex_);
  return compares_;
}

}  // namespace entropyserve
