// What a measurement of one prompt or one window under one policy says, and the file of them: one
// JSON object a line, written as soon as it is known.
#pragma once

#include <cstdint>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/mutex.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

// One prompt of a task.
struct TaskRecord {
  // These name the measurement: it is not done twice.
  std::string server;            // ServerName()
  std::string task;              // with its variant: "niah_single_2/hidden"
  std::string policy;            // PolicySpec.name
  std::string haystack, format;  // "chat", "text"; ", answers given" where they were
  int64_t length = 0;
  int index = 0;
  uint64_t seed = 0;
  int answer_limit = 0;  // most scored tokens; 0: the task's own

  double score = 0;
  // Of given answers: the mean negative log-likelihood of their tokens, nats, and how many these
  // are; 0: they were generated. `score` is then the share of tokens that were the likeliest.
  double answer_nll = 0;
  int64_t answer_nll_tokens = 0;
  std::vector<double> turn_scores;  // of every question; `score` says which of them count
  std::vector<std::string> answers, expected;  // of every question; expected ones joined by " | "
  int64_t prompt_tokens = 0, generated_tokens = 0;
  bool compressed = false;
  double flops_executed = 0, flops_dense = 0;
  int64_t kv_bytes_before = 0, kv_bytes_after = 0;
  double prefill_seconds = 0, ttft_seconds = 0, decode_seconds = 0;
  int concurrency = 1;
};

// Predictions of one kind in a window: of prompt positions, or of those fed one at a time.
struct ComparedPart {
  int64_t n = 0;
  double kl = 0;                // mean, nats
  double top1 = 0;              // share of equal likeliest tokens
  double nll_a = 0, nll_b = 0;  // mean negative log-likelihood of the text, nats
};

// One window of a text under a policy and under the reference.
struct CompareRecord {
  std::string server, text, policy;             // text: its file's name and a hash
  int64_t length = 0, window = 0, windows = 0;  // tokens; number, of how many: they set its place
  int64_t score = 0, decode = 0;                // positions asked for
  ComparedPart prompt, decoded;
  double flops_executed = 0, flops_dense = 0;
  double prefill_seconds = 0, full_seconds = 0;  // of the policy and of the reference
  int64_t kv_bytes = 0, kv_bytes_full = 0;
};

// "model bf16 cuda 3f2a...": the last part is a hash of the server's default policy, because a
// policy's name leaves the rest to it.
std::string ServerName(const v1::GetModelResponse& model, const v1::GetServerResponse& server);

// What makes a measurement; equal for a repeated one.
std::string KeyOf(const TaskRecord& record);
std::string KeyOf(const CompareRecord& record);

std::string ToJsonLine(const TaskRecord& record);
std::string ToJsonLine(const CompareRecord& record);

// Records of this run, and those of earlier runs in the same file. Thread-safe.
class RecordFile {
 public:
  // `path` empty: memory only. ALREADY_EXISTS: the file is there and `resume` is not set.
  // INVALID_ARGUMENT: a line that is no record, or of another server than `server` (empty: any).
  // A last line without an end, of a program that was killed, is dropped. NOT_FOUND: no such
  // folder.
  static absl::StatusOr<std::unique_ptr<RecordFile>> Open(const std::string& path, bool resume,
                                                          const std::string& server);

  // Whether a record of this key is there.
  bool Has(const std::string& key) const;
  // UNAVAILABLE: the file cannot be written.
  absl::Status Add(TaskRecord record);
  absl::Status Add(CompareRecord record);

  std::vector<TaskRecord> task_records() const;
  std::vector<CompareRecord> compare_records() const;

 private:
  absl::Status Load(const std::string& path, const std::string& server, std::string* kept);
  absl::Status Write(const std::string& line) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::string path_;
  std::ofstream file_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> keys_ ABSL_GUARDED_BY(mutex_);
  std::vector<TaskRecord> tasks_ ABSL_GUARDED_BY(mutex_);
  std::vector<CompareRecord> compares_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace entropyserve
