#include "client/eval/task_runner.h"

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/eval/fit.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// Beyond the gap, so that compression has happened and at least some tokens follow it.
constexpr int64_t kTokensAfterGap = 8;
constexpr char kGiven[] = ", answers given";
constexpr int64_t kDefaultGap = 16;      // the server's, when GetModel does not say
constexpr int64_t kTemplateTokens = 16;  // of a further turn's template, at most
constexpr double kDeleteSeconds = 5;     // for a session that is given up

// A session on the server as long as it lives here.
class ScopedSession {
 public:
  ScopedSession(Client* client, std::string id) : client_(client), id_(std::move(id)) {}
  ~ScopedSession() {
    // Nothing can be done about a failure: the server has forgotten it, or is gone.
    if (!id_.empty()) client_->DeleteSession(id_, {kDeleteSeconds, nullptr}).IgnoreError();
  }
  ScopedSession(ScopedSession&& other) noexcept
      : client_(other.client_), id_(std::exchange(other.id_, "")) {}
  ScopedSession& operator=(ScopedSession&&) = delete;
  const std::string& id() const { return id_; }

 private:
  Client* client_;
  std::string id_;
};

struct Answer {
  std::vector<int32_t> ids;
  // Where the model's likeliest token was an end token: min_new_tokens made it go on, and what
  // follows is not its answer.
  size_t end = 0;
  // Of every token: its natural log-likelihood, and whether it was the likeliest.
  std::vector<double> logprobs;
  std::vector<bool> first_choice;
  v1::Receipt receipt;
};

// With everything that names the measurement.
TaskRecord NewRecord(const TaskRun& run, const TaskJob& job, const PolicySpec& policy, int index) {
  TaskRecord record;
  record.server = run.server;
  record.task = job.name();
  record.policy = policy.name;
  record.haystack = job.task->uses_haystack ? run.haystack->name() : "own";
  record.format = absl::StrCat(run.chat ? "chat" : "text", run.give_answers ? kGiven : "");
  record.length = job.length;
  record.index = index;
  record.seed = run.seed;
  record.answer_limit = run.answer_limit;
  record.concurrency = run.concurrency;
  return record;
}

// One prompt of one job, all policies.
class PromptRun {
 public:
  PromptRun(Client* client, const TaskRun& run, const TaskJob& job, int index)
      : client_(client), run_(run), job_(job), index_(index) {}

  // Finds the prompt's size, about `guess` units.
  absl::StatusOr<Fit> Prepare(int64_t guess);
  // Measures under every policy that `records` lacks.
  absl::Status Run(RecordFile* records);

 private:
  TaskRecord NewRecord(const PolicySpec& policy) const {
    return entropyserve::NewRecord(run_, job_, policy, index_);
  }
  bool Turns() const { return job_.variant == Variant::kTurns; }
  int64_t AnswerTokens() const {
    const int own = job_.task->answer_tokens;
    return run_.answer_limit > 0 ? std::min(own, run_.answer_limit) : own;
  }
  // Tokens of a turn's answer: its given beginning and what is generated.
  int64_t AnswerRoom(size_t turn) const;
  int64_t LeastTokens() const;

  absl::StatusOr<std::vector<int32_t>> Tokenize(const std::string& text) const;
  absl::StatusOr<int64_t> CountTokens(int64_t units);
  absl::Status PrepareTurns();
  absl::Status ScoreGiven(size_t turn, const Answer& answer, TaskRecord* record) const;
  v1::GenerateRequest Request(const std::string& text, const v1::Policy& policy,
                              const std::string& session) const;
  // The separator joins what is one prompt; in a turn of its own a question needs none.
  std::string FirstPrompt() const {
    return absl::StrCat(prompt_.context, prompt_.separator, prompt_.turns[0].question);
  }

  absl::StatusOr<ScopedSession> NewSession() const;
  absl::StatusOr<Answer> Generate(const v1::GenerateRequest& request) const;
  absl::Status Read(const v1::Policy& policy, const std::string& session, TaskRecord* record) const;
  absl::Status Ask(size_t turn, const std::string& text, const v1::Policy& policy,
                   const std::string& session, TaskRecord* record) const;
  absl::Status RunPlain(const PolicySpec& policy, TaskRecord* record) const;
  absl::Status RunHidden(const PolicySpec& policy, TaskRecord* record) const;
  absl::Status RunTurns(const PolicySpec& policy, TaskRecord* record) const;
  absl::Status RunForked(RecordFile* records) const;
  absl::Status AskInFork(const PolicySpec& policy, const std::string& read,
                         TaskRecord* record) const;
  absl::Status Finish(TaskRecord record, RecordFile* records) const;

  Client* const client_;
  const TaskRun& run_;
  const TaskJob& job_;
  const int index_;
  TaskPrompt prompt_;                           // the last that was made,
  int64_t units_ = -1;                          // of this size
  std::vector<std::vector<int32_t>> prefixes_;  // ids of each turn's answer_prefix
  std::vector<std::vector<int32_t>> given_;     // and of its right answer, where that is given
};

int64_t PromptRun::LeastTokens() const {
  int64_t gap = 0;
  for (const PolicySpec& spec : run_.policies) {
    const v1::KvPolicy& kv = spec.policy.kv();
    const v1::KvPolicy& defaults = run_.model.default_policy().kv();
    gap = std::max<int64_t>(gap, kv.has_gap_tokens()         ? kv.gap_tokens()
                                 : defaults.has_gap_tokens() ? defaults.gap_tokens()
                                                             : kDefaultGap);
  }
  return gap + kTokensAfterGap;
}

int64_t PromptRun::AnswerRoom(size_t turn) const {
  const auto given = static_cast<int64_t>(given_[turn].size());
  return std::max(static_cast<int64_t>(prefixes_[turn].size()) + std::max(AnswerTokens(), given),
                  LeastTokens());
}

absl::StatusOr<std::vector<int32_t>> PromptRun::Tokenize(const std::string& text) const {
  v1::TokenizeRequest request;
  request.set_text(text);
  ASSIGN_OR_RETURN(const v1::TokenizeResponse response, client_->Tokenize(request, run_.call));
  return std::vector<int32_t>(response.ids().begin(), response.ids().end());
}

absl::Status PromptRun::PrepareTurns() {
  prefixes_.clear();
  given_.clear();
  if (!Turns()) prompt_.turns.resize(1);
  for (const TaskTurn& turn : prompt_.turns) {
    // As RULER's templates: a space between the question and the answer's beginning.
    ASSIGN_OR_RETURN(std::vector<int32_t> ids,
                     Tokenize(absl::StrCat(run_.chat ? "" : " ", turn.answer_prefix)));
    prefixes_.push_back(std::move(ids));
    given_.emplace_back();
    if (!run_.give_answers) continue;
    ASSIGN_OR_RETURN(given_.back(), Tokenize(RightAnswer(job_.task->match, turn)));
  }
  return absl::OkStatus();
}

absl::StatusOr<int64_t> PromptRun::CountTokens(int64_t units) {
  units_ = units;
  prompt_ = job_.task->make({run_.seed, index_, job_.length, units, run_.haystack});
  RETURN_IF_ERROR(PrepareTurns());
  v1::TokenizeRequest request;
  if (run_.chat) {
    v1::Message& message = *request.mutable_messages()->add_messages();
    message.set_role("user");
    message.set_content(FirstPrompt());
  } else {
    request.set_text(FirstPrompt());
    request.set_add_bos(true);
  }
  ASSIGN_OR_RETURN(const v1::TokenizeResponse response, client_->Tokenize(request, run_.call));
  int64_t tokens = response.ids_size() + AnswerRoom(0);
  if (job_.variant != Variant::kPlain) tokens += kTemplateTokens;
  for (size_t turn = 1; turn < prompt_.turns.size(); ++turn) {
    ASSIGN_OR_RETURN(const std::vector<int32_t> question, Tokenize(prompt_.turns[turn].question));
    tokens += static_cast<int64_t>(question.size()) + kTemplateTokens + AnswerRoom(turn);
  }
  return tokens;
}

absl::StatusOr<Fit> PromptRun::Prepare(int64_t guess) {
  absl::StatusOr<Fit> fit = FitUnits(job_.length, job_.task->min_units, guess,
                                     [this](int64_t units) { return CountTokens(units); });
  if (fit.status().code() == absl::StatusCode::kInvalidArgument) {
    return absl::InvalidArgumentError(
        absl::StrCat(job_.name(), " at ", job_.length, ": ", fit.status().message()));
  }
  RETURN_IF_ERROR(fit.status());
  // The last size that was tried need not be the one that fits.
  if (units_ != fit->units) RETURN_IF_ERROR(CountTokens(fit->units).status());
  return fit;
}

v1::GenerateRequest PromptRun::Request(const std::string& text, const v1::Policy& policy,
                                       const std::string& session) const {
  v1::GenerateRequest request;
  if (run_.chat) {
    v1::Message& message = *request.mutable_messages()->add_messages();
    message.set_role("user");
    message.set_content(text);
  } else {
    request.set_text(text);
  }
  request.set_session_id(session);
  *request.mutable_policy() = policy;
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_seed(run_.seed);
  return request;
}

absl::StatusOr<ScopedSession> PromptRun::NewSession() const {
  ASSIGN_OR_RETURN(const v1::Session session, client_->CreateSession(run_.call));
  return ScopedSession(client_, session.id());
}

absl::StatusOr<Answer> PromptRun::Generate(const v1::GenerateRequest& request) const {
  const std::set<int32_t> ends(run_.model.end_token_ids().begin(),
                               run_.model.end_token_ids().end());
  const auto given = static_cast<size_t>(request.sampling().forced_token_ids_size());
  Answer answer;
  bool ended = false;
  RETURN_IF_ERROR(client_->Generate(
      request,
      [&](const v1::GenerateEvent& event) {
        if (event.has_finished()) answer.receipt = event.finished().receipt();
        const v1::Tokens& tokens = event.tokens();
        for (int i = 0; i < tokens.ids_size(); ++i) {
          answer.ids.push_back(tokens.ids(i));
          if (i < tokens.logprobs_size() && tokens.logprobs(i).top_size() > 0) {
            answer.logprobs.push_back(tokens.logprobs(i).logprob());
            answer.first_choice.push_back(tokens.logprobs(i).top(0).id() == tokens.ids(i));
          }
          if (answer.ids.size() <= given || ended) continue;
          ended = ends.count(tokens.ids(i)) > 0 ||
                  (i < tokens.logprobs_size() && tokens.logprobs(i).top_size() > 0 &&
                   ends.count(tokens.logprobs(i).top(0).id()) > 0);
          if (!ended) answer.end = answer.ids.size();
        }
      },
      run_.call));
  answer.end = std::max(answer.end, std::min(given, answer.ids.size()));
  return answer;
}

// Costs of one request, added to the record's.
void AddCosts(const v1::Receipt& receipt, TaskRecord* record) {
  if (record->prompt_tokens == 0) record->ttft_seconds = receipt.ttft_seconds();
  record->prompt_tokens += receipt.prompt_tokens();
  record->generated_tokens += receipt.generated_tokens();
  record->flops_executed += receipt.attention_flops_executed();
  record->flops_dense += receipt.attention_flops_dense();
  record->prefill_seconds += receipt.prefill_seconds();
  record->decode_seconds += receipt.decode_seconds();
  if (record->compressed) return;  // what the first compression left counts
  record->compressed = receipt.compressed();
  record->kv_bytes_before = receipt.kv_bytes_before();
  record->kv_bytes_after = receipt.kv_bytes_after();
}

// Reads the text in a turn of its own.
absl::Status PromptRun::Read(const v1::Policy& policy, const std::string& session,
                             TaskRecord* record) const {
  v1::GenerateRequest request = Request(prompt_.context, policy, session);
  request.mutable_sampling()->set_max_new_tokens(0);
  ASSIGN_OR_RETURN(const Answer answer, Generate(request));
  AddCosts(answer.receipt, record);
  return absl::OkStatus();
}

absl::Status PromptRun::Ask(size_t turn, const std::string& text, const v1::Policy& policy,
                            const std::string& session, TaskRecord* record) const {
  v1::GenerateRequest request = Request(text, policy, session);
  v1::SamplingParams& sampling = *request.mutable_sampling();
  const std::vector<int32_t>& prefix = prefixes_[turn];
  sampling.mutable_forced_token_ids()->Add(prefix.begin(), prefix.end());
  const std::vector<int32_t>& given = given_[turn];
  sampling.mutable_forced_token_ids()->Add(given.begin(), given.end());
  const auto forced = static_cast<int64_t>(prefix.size() + given.size());
  sampling.set_max_new_tokens(given.empty() ? AnswerRoom(turn) : std::max(forced, LeastTokens()));
  sampling.set_min_new_tokens(LeastTokens());
  sampling.set_logprobs(1);  // shows where the answer would have ended
  ASSIGN_OR_RETURN(const Answer answer, Generate(request));
  AddCosts(answer.receipt, record);
  if (run_.give_answers) return ScoreGiven(turn, answer, record);
  const size_t end = std::min(answer.end, prefix.size() + static_cast<size_t>(AnswerTokens()));
  v1::DetokenizeRequest detokenize;
  for (size_t i = prefix.size(); i < end; ++i) detokenize.add_ids(answer.ids[i]);
  detokenize.set_skip_special(true);
  ASSIGN_OR_RETURN(const v1::DetokenizeResponse words, client_->Detokenize(detokenize, run_.call));
  const std::vector<std::string>& expected = prompt_.turns[turn].answers;
  record->answers.push_back(words.text());
  record->expected.push_back(absl::StrJoin(expected, " | "));
  record->turn_scores.push_back(Score(job_.task->match, words.text(), expected));
  return absl::OkStatus();
}

absl::Status PromptRun::ScoreGiven(size_t turn, const Answer& answer, TaskRecord* record) const {
  const size_t begin = prefixes_[turn].size(), end = begin + given_[turn].size();
  if (begin == end || answer.logprobs.size() < end) {
    return absl::InternalError("the server did not report the given answer's log-likelihoods");
  }
  const auto tokens = static_cast<double>(end - begin);
  double nll = 0;
  int64_t first = 0;
  for (size_t i = begin; i < end; ++i) {
    nll -= answer.logprobs[i];
    first += answer.first_choice[i];
  }
  record->answers.push_back(RightAnswer(job_.task->match, prompt_.turns[turn]));
  record->expected.push_back(absl::StrJoin(prompt_.turns[turn].answers, " | "));
  record->turn_scores.push_back(static_cast<double>(first) / tokens);
  if (Turns() && turn == 0) return absl::OkStatus();  // the plain task's question
  const auto before = static_cast<double>(record->answer_nll_tokens);
  record->answer_nll = (record->answer_nll * before + nll) / (before + tokens);
  record->answer_nll_tokens += static_cast<int64_t>(end - begin);
  return absl::OkStatus();
}

absl::Status PromptRun::RunPlain(const PolicySpec& policy, TaskRecord* record) const {
  return Ask(0, FirstPrompt(), policy.policy, "", record);
}

absl::Status PromptRun::RunHidden(const PolicySpec& policy, TaskRecord* record) const {
  ASSIGN_OR_RETURN(const ScopedSession session, NewSession());
  RETURN_IF_ERROR(Read(policy.policy, session.id(), record));
  return Ask(0, prompt_.turns[0].question, policy.policy, session.id(), record);
}

absl::Status PromptRun::RunTurns(const PolicySpec& policy, TaskRecord* record) const {
  ASSIGN_OR_RETURN(const ScopedSession session, NewSession());
  RETURN_IF_ERROR(Ask(0, FirstPrompt(), policy.policy, session.id(), record));
  for (size_t turn = 1; turn < prompt_.turns.size(); ++turn) {
    RETURN_IF_ERROR(Ask(turn, prompt_.turns[turn].question, policy.policy, session.id(), record));
  }
  return absl::OkStatus();
}

absl::Status PromptRun::RunForked(RecordFile* records) const {
  std::vector<std::vector<const PolicySpec*>> by_prefill;
  for (const PolicySpec& policy : run_.policies) {
    if (records->Has(KeyOf(NewRecord(policy)))) continue;
    auto same = std::find_if(by_prefill.begin(), by_prefill.end(), [&policy](const auto& others) {
      return others[0]->prefill == policy.prefill;
    });
    if (same == by_prefill.end()) same = by_prefill.emplace(same);
    same->push_back(&policy);
  }
  for (const std::vector<const PolicySpec*>& policies : by_prefill) {
    v1::Policy whole = policies[0]->policy;
    whole.mutable_kv()->Clear();
    whole.mutable_kv()->set_preset("full");
    ASSIGN_OR_RETURN(const ScopedSession read, NewSession());
    TaskRecord reading;
    RETURN_IF_ERROR(Read(whole, read.id(), &reading));
    // All at once: a batch's decode steps cost little more than one's.
    std::vector<TaskRecord> answered;
    for (const PolicySpec* policy : policies) {
      answered.push_back(NewRecord(*policy));
      TaskRecord& record = answered.back();
      record.prompt_tokens = reading.prompt_tokens;
      record.flops_executed = reading.flops_executed;
      record.flops_dense = reading.flops_dense;
      record.prefill_seconds = reading.prefill_seconds;
    }
    std::vector<absl::Status> statuses(policies.size());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < policies.size(); ++i) {
      threads.emplace_back(
          [this, &read, policy = policies[i], record = &answered[i], status = &statuses[i]] {
            *status = AskInFork(*policy, read.id(), record);
          });
    }
    for (std::thread& thread : threads) thread.join();
    absl::Status first;
    for (size_t i = 0; i < policies.size(); ++i) {
      first.Update(statuses[i]);
      if (statuses[i].ok()) first.Update(Finish(std::move(answered[i]), records));
    }
    RETURN_IF_ERROR(first);
  }
  return absl::OkStatus();
}

absl::Status PromptRun::AskInFork(const PolicySpec& policy, const std::string& read,
                                  TaskRecord* record) const {
  ASSIGN_OR_RETURN(const v1::Session fork, client_->ForkSession(read, run_.call));
  const ScopedSession session(client_, fork.id());
  // A question is shorter than any dense prefix: dense under every policy, and entropy_paper takes
  // no second turn.
  v1::Policy asking = policy.policy;
  asking.mutable_prefill()->Clear();
  asking.mutable_prefill()->set_preset("full");
  return Ask(0, prompt_.turns[0].question, asking, session.id(), record);
}

absl::Status PromptRun::Finish(TaskRecord record, RecordFile* records) const {
  // With further turns those count: the first is the plain task.
  const size_t first = Turns() ? 1 : 0;
  double sum = 0;
  for (size_t i = first; i < record.turn_scores.size(); ++i) sum += record.turn_scores[i];
  record.score = sum / static_cast<double>(record.turn_scores.size() - first);
  return records->Add(std::move(record));
}

absl::Status PromptRun::Run(RecordFile* records) {
  if (job_.variant == Variant::kForked) return RunForked(records);
  for (const PolicySpec& policy : run_.policies) {
    TaskRecord record = NewRecord(policy);
    if (records->Has(KeyOf(record))) continue;
    RETURN_IF_ERROR(job_.variant == Variant::kPlain    ? RunPlain(policy, &record)
                    : job_.variant == Variant::kHidden ? RunHidden(policy, &record)
                                                       : RunTurns(policy, &record));
    RETURN_IF_ERROR(Finish(std::move(record), records));
  }
  return absl::OkStatus();
}

// Hands out prompts to threads and remembers each job's size.
class Queue {
 public:
  Queue(Client* client, const TaskRun& run, RecordFile* records)
      : client_(client), run_(run), records_(records), guesses_(run.jobs.size()) {
    for (int index = 0; index < run.prompts; ++index) {
      for (size_t job = 0; job < run.jobs.size(); ++job) {
        if (Missing(job, index)) todo_.emplace_back(job, index);
      }
    }
  }

  // Until nothing is left, time is up, or something failed.
  void Work() {
    while (true) {
      std::pair<size_t, int> next;
      {
        MutexLock lock(&mutex_);
        if (!status_.ok() || at_ == todo_.size()) return;
        if (run_.out_of_time && run_.out_of_time()) return;
        next = todo_[at_++];
      }
      const absl::Status status = Measure(next.first, next.second);
      MutexLock lock(&mutex_);
      status_.Update(status);
      if (status.ok() && run_.on_prompt) run_.on_prompt(++done_, static_cast<int>(todo_.size()));
    }
  }

  absl::Status status() const {
    MutexLock lock(&mutex_);
    return status_;
  }

 private:
  bool Missing(size_t job, int index) const {
    return std::any_of(run_.policies.begin(), run_.policies.end(), [&](const PolicySpec& policy) {
      return !records_->Has(KeyOf(NewRecord(run_, run_.jobs[job], policy, index)));
    });
  }

  // The size of prompt 0, whichever prompt comes first: what was measured before, or by another
  // thread, must not change a prompt.
  absl::StatusOr<int64_t> Guess(size_t job) {
    MutexLock lock(&guess_mutex_);
    if (guesses_[job] == 0) {
      PromptRun first(client_, run_, run_.jobs[job], 0);
      ASSIGN_OR_RETURN(const Fit fit, first.Prepare(0));
      guesses_[job] = fit.units;
    }
    return guesses_[job];
  }

  absl::Status Measure(size_t job, int index) {
    ASSIGN_OR_RETURN(const int64_t guess, Guess(job));
    PromptRun prompt(client_, run_, run_.jobs[job], index);
    RETURN_IF_ERROR(prompt.Prepare(guess).status());
    return prompt.Run(records_);
  }

  Client* const client_;
  const TaskRun& run_;
  RecordFile* const records_;
  std::vector<std::pair<size_t, int>> todo_;  // job, index
  mutable Mutex mutex_;
  size_t at_ ABSL_GUARDED_BY(mutex_) = 0;
  int done_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  Mutex guess_mutex_;
  std::vector<int64_t> guesses_ ABSL_GUARDED_BY(guess_mutex_);
};

}  // namespace

absl::Status RunTasks(Client* client, const TaskRun& run, RecordFile* records) {
  Queue queue(client, run, records);
  std::vector<std::thread> threads;
  for (int i = 1; i < run.concurrency; ++i) threads.emplace_back([&queue] { queue.Work(); });
  queue.Work();
  for (std::thread& thread : threads) thread.join();
  return queue.status();
}

}  // namespace entropyserve
