// Prefill and decode times of the whole engine (no gRPC): random token ids through Engine::Submit.
//
//   engine_bench --model=synthetic:llama-3.1-8b --lengths=32768,131072 --decode=1,32
//
// Policies: `full`; `fixedN` is `entropy` with every budget pinned at N times its base of 2048
// (random weights keep every budget at its base, which makes a prefill look cheaper than on real
// text); `rN` after a plus sets the correction's stride. Medians of --runs runs after a warm-up.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "engine/engine_factory.h"

namespace entropyserve {
namespace {

class WaitingSink final : public EventSink {
 public:
  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent) override { last_token = std::chrono::steady_clock::now(); }
  void OnFinished(FinishedEvent event) override { done_.set_value(std::move(event)); }
  FinishedEvent Wait() { return done_.get_future().get(); }

  std::chrono::steady_clock::time_point last_token;

 private:
  std::promise<FinishedEvent> done_;
};

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "engine_bench: %s\n", message.c_str());
  std::exit(2);
}

std::map<std::string, std::string> ParseFlags(int argc, char** argv) {
  std::map<std::string, std::string> flags = {{"model", "synthetic:llama-3.1-8b"},
                                              {"backend", "auto"},
                                              {"dtype", "auto"},
                                              {"lengths", "8192,32768"},
                                              {"policies", "full,fixed1,fixed1+r0,fixed2,fixed3"},
                                              {"decode", "1,8,32"},
                                              {"decode_context", "32768"},
                                              {"runs", "3"},
                                              {"new_tokens", "64"},
                                              {"chunk", "0"},
                                              {"step", "0"},
                                              {"threads", "0"}};
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t equals = arg.find('=');
    if (!arg.starts_with("--") || equals == std::string::npos ||
        !flags.count(arg.substr(2, equals - 2))) {
      std::string known;
      for (const auto& [name, value] : flags) known += " --" + name + "=" + value;
      Die("unknown flag " + arg + "; flags and defaults:" + known);
    }
    flags[arg.substr(2, equals - 2)] = arg.substr(equals + 1);
  }
  return flags;
}

int64_t ToInt(const std::string& text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value)) Die("not a number: " + text);
  return value;
}

std::vector<std::string> Split(const std::string& text) {
  return text.empty() ? std::vector<std::string>()
                      : std::vector<std::string>(absl::StrSplit(text, ','));
}

PrefillPolicy ParsePolicy(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, '+');
  PrefillPolicy policy;
  if (parts[0].starts_with("fixed")) {
    policy = *PrefillPreset("entropy", "policy");
    policy.params.budget = BudgetRule::kFixed;
    policy.params.base *= int32_t(ToInt(parts[0].substr(5)));
  } else {
    auto preset = PrefillPreset(parts[0], "policies");
    if (!preset.ok()) Die(std::string(preset.status().message()));
    policy = *preset;
  }
  for (size_t i = 1; i < parts.size(); ++i) {
    if (!parts[i].starts_with("r")) Die("unknown part " + parts[i]);
    policy.params.correction = int32_t(ToInt(parts[i].substr(1)));
  }
  return policy;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

class Bench {
 public:
  explicit Bench(const std::map<std::string, std::string>& flags)
      : flags_(flags), random_(20261122) {
    EngineConfig config;
    config.model_path = flags_.at("model");
    config.backend = flags_.at("backend");
    config.dtype = flags_.at("dtype");
    config.threads = int(ToInt(flags_.at("threads")));
    config.options.lone_chunk_tokens = ToInt(flags_.at("chunk"));
    config.options.step_tokens = ToInt(flags_.at("step"));
    auto loaded = LoadEngine(config);
    if (!loaded.ok()) Die(loaded.status().ToString());
    loaded_ = *std::move(loaded);
    std::printf("%s, %s, %s, %.2fe9 parameters\n", loaded_.config.name.c_str(),
                loaded_.backend_description.c_str(), Name(loaded_.dtype),
                double(loaded_.parameters) * 1e-9);
    if (absl::Status status = loaded_.engine->WarmUp(); !status.ok()) Die(status.ToString());
  }

  void Prefill() {
    std::printf("%-16s %8s %10s %10s %9s %8s %9s\n", "policy", "tokens", "prefill_s", "tokens/s",
                "share", "vs_full", "kv_ratio");
    const int64_t runs = ToInt(flags_.at("runs"));
    for (const std::string& length : Split(flags_.at("lengths"))) {
      double full = 0;
      for (const std::string& name : Split(flags_.at("policies"))) {
        EngineRequest request = Request(ToInt(length), 20);
        request.prefill = ParsePolicy(name);
        if (request.prefill.params.full) request.kv = *KvPreset("full", "kv");
        std::vector<double> seconds;
        Receipt receipt;
        for (int64_t run = 0; run <= runs; ++run) {
          receipt = Run(request).receipt;
          if (run > 0) seconds.push_back(receipt.prefill_seconds);
        }
        const double median = Median(seconds);
        if (request.prefill.params.full) full = median;
        std::printf("%-16s %8ld %10.3f %10.0f %9.3f %8.2f %9.3f\n", name.c_str(),
                    long(request.prompt.size()), median, double(request.prompt.size()) / median,
                    receipt.attention_flops_executed / receipt.attention_flops_dense,
                    full > 0 ? full / median : 0.0,
                    double(receipt.kv_bytes_after) / double(receipt.kv_bytes_before));
        std::fflush(stdout);
      }
    }
  }

  // N sessions forked from one prompt decode together: the prompt is read once.
  void Decode() {
    const std::vector<std::string> batches = Split(flags_.at("decode"));
    if (batches.empty()) return;
    std::printf("%-8s %8s %6s %12s %12s\n", "kv", "context", "batch", "ms/step", "tokens/s");
    for (const char* kv : {"latent", "full"}) {
      const auto session = loaded_.engine->CreateSession("bench");
      if (!session.ok()) Die(session.status().ToString());
      EngineRequest read = Request(ToInt(flags_.at("decode_context")), 0);
      read.kv = *KvPreset(kv, "kv");
      read.session_id = session->id;
      if (const FinishedEvent end = Run(read); !end.status.ok()) Die(end.status.ToString());
      for (const std::string& batch : batches) DecodeBatch(kv, session->id, ToInt(batch));
      loaded_.engine->DeleteSession("bench", session->id).IgnoreError();
    }
  }

 private:
  EngineRequest Request(int64_t tokens, int64_t max_new) {
    EngineRequest request;
    request.owner = "bench";
    std::uniform_int_distribution<int32_t> id(0, loaded_.config.vocab - 1);
    for (int64_t i = 0; i < tokens; ++i) request.prompt.push_back(id(random_));
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    request.sampling.max_new_tokens = max_new;
    return request;
  }

  FinishedEvent Run(const EngineRequest& request) {
    auto sink = std::make_shared<WaitingSink>();
    if (auto id = loaded_.engine->Submit(request, sink); !id.ok()) Die(id.status().ToString());
    FinishedEvent end = sink->Wait();
    if (!end.status.ok()) Die(end.status.ToString());
    return end;
  }

  void DecodeBatch(const char* kv, const std::string& session, int64_t batch) {
    std::vector<std::string> forks;
    std::vector<std::shared_ptr<WaitingSink>> sinks;
    for (int64_t i = 0; i < batch; ++i) {
      auto fork = loaded_.engine->ForkSession("bench", session);
      if (!fork.ok()) Die(fork.status().ToString());
      forks.push_back(fork->id);
    }
    const int64_t tokens = ToInt(flags_.at("new_tokens"));
    bool fits = true;
    for (const std::string& fork : forks) {
      EngineRequest request = Request(8, tokens);
      request.session_id = fork;
      request.kv = *KvPreset(kv, "kv");
      sinks.push_back(std::make_shared<WaitingSink>());
      if (!loaded_.engine->Submit(request, sinks.back()).ok()) Die("submit failed");
    }
    // Whole steps of the batch: what the slowest sequence took after its prefill.
    std::vector<double> ms;
    for (auto& sink : sinks) {
      const FinishedEvent end = sink->Wait();
      fits = fits && end.status.ok();
      ms.push_back(end.receipt.decode_seconds * 1e3 / double(tokens - 1));
    }
    if (fits) {
      const double step = Median(ms);
      std::printf("%-8s %8s %6ld %12.3f %12.1f\n", kv, flags_.at("decode_context").c_str(),
                  long(batch), step, double(batch) * 1e3 / step);
    } else {
      std::printf("%-8s %8s %6ld does not fit\n", kv, flags_.at("decode_context").c_str(),
                  long(batch));
    }
    std::fflush(stdout);
    for (const std::string& fork : forks)
      loaded_.engine->DeleteSession("bench", fork).IgnoreError();
  }

  const std::map<std::string, std::string> flags_;
  std::mt19937 random_;
  LoadedEngine loaded_;
};

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  entropyserve::Bench bench(entropyserve::ParseFlags(argc, argv));
  bench.Prefill();
  bench.Decode();
  return 0;
}
