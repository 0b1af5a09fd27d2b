// What benches of the whole engine share: flags, requests of random token ids through
// Engine::Submit (no gRPC), a sink that keeps times, and tables. A bench that cannot go on says why
// and exits with status 2.
#pragma once

#include <chrono>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/engine_factory.h"

namespace entropyserve::bench {

[[noreturn]] void Die(const std::string& message);

using Flags = std::map<std::string, std::string>;  // name (without --) to value

// --name=value; `defaults` are the flags there are.
Flags ParseFlags(int argc, char** argv, Flags defaults);
int64_t ToInt(const std::string& text);
std::vector<std::string> Split(const std::string& text);  // at commas

// `full` and other presets; `fixedN` is `entropy` with every budget pinned at N times its base of
// 2048 (random weights keep every budget at its base, which makes a prefill look cheaper than on
// real text). After a plus, `rN` sets the correction's stride, `lN` the first sparse layer.
PrefillPolicy ParsePolicy(const std::string& text);

// The q-th part of the sorted values; 0.5 is the median. 0 of nothing.
double Quantile(std::vector<double> values, double q);

// Keeps when a request was submitted and when its tokens came.
class TimingSink final : public EventSink {
 public:
  using Time = std::chrono::steady_clock::time_point;

  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent) override { tokens_.push_back(std::chrono::steady_clock::now()); }
  void OnFinished(FinishedEvent event) override { done_.set_value(std::move(event)); }

  // Once. After it the times may be read.
  FinishedEvent Wait() { return done_.get_future().get(); }
  double first_token_seconds() const { return tokens_.empty() ? 0 : Seconds(begin_, tokens_[0]); }
  std::vector<double> gaps() const;  // seconds between tokens

 private:
  static double Seconds(Time from, Time to) {
    return std::chrono::duration<double>(to - from).count();
  }

  const Time begin_ = std::chrono::steady_clock::now();
  std::vector<Time> tokens_;
  std::promise<FinishedEvent> done_;
};

// An engine that has warmed up, and one caller of it.
class EngineLoad {
 public:
  explicit EngineLoad(const EngineConfig& config);

  const LoadedEngine& loaded() const { return loaded_; }
  Engine& engine() { return *loaded_.engine; }

  // Greedy, exactly max_new tokens.
  EngineRequest Request(int64_t prompt_tokens, int64_t max_new);
  std::shared_ptr<TimingSink> Start(const EngineRequest& request);
  FinishedEvent Run(const EngineRequest& request);
  // A session that has read `context` random tokens.
  SessionInfo ReadSession(int64_t context, const PrefillPolicy& prefill, const KvPolicy& kv);
  SessionInfo Session(const std::string& session);
  std::string Fork(const std::string& session);
  void Delete(const std::string& session);

 private:
  std::mt19937 random_;
  LoadedEngine loaded_;
};

// Rows of text as a Markdown table, with columns in line.
class Table {
 public:
  explicit Table(std::vector<std::string> columns) { rows_.push_back(std::move(columns)); }
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  void Print(const std::string& title) const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the first names the columns
};

}  // namespace entropyserve::bench
