// What users of a shared server meet, through Engine::Submit (no gRPC), on random weights:
//
//   serving_bench [--parts=latency,sessions,memory] [--model=synthetic:llama-3.1-8b] ...
//
// latency   short requests alone, then while two long prompts prefill and two more wait for their
//           pages: time to the first token and between tokens. The pool is made for two long
//           prompts.
// sessions  compressed sessions decode together: forks of one that read `context` tokens, and
//           sessions that each read `own_context` tokens themselves, so that they share no page.
//           Both keep as many tokens; a step costs a fork less where the caches hold shared pages.
// memory    bytes of a session of `own_context` and of `context` tokens, compressed and not, and
//           how many a pool of `hold_mib` holds: they are read until one has to go.
// moves     (when named) a stream's times between tokens while a session of `context` tokens comes
//           from host memory for a turn and goes back.
#include <algorithm>
#include <cstdio>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tests/bench/engine_load.h"

namespace entropyserve::bench {
namespace {

const Flags kDefaults = {{"parts", "latency,sessions,memory"},
                         {"model", "synthetic:llama-3.1-8b"},
                         {"backend", "auto"},
                         {"dtype", "auto"},
                         {"linear_dtype", "auto"},
                         {"threads", "0"},
                         {"policy", "fixed2"},
                         {"context", "131072"},
                         {"own_context", "8192"},
                         {"short", "100"},
                         {"new_tokens", "64"},
                         {"rounds", "5"},
                         {"sessions", "64"},
                         {"hold_mib", "24576"},
                         {"step", "0"},
                         {"chunk", "0"}};
constexpr int kAlone = 20;      // requests that are timed alone
constexpr int64_t kAnswer = 8;  // tokens of a short answer: several fit beside one long prefill

std::string Ms(double seconds) { return absl::StrFormat("%.1f", seconds * 1e3); }

class Bench {
 public:
  explicit Bench(Flags flags) : flags_(std::move(flags)) {}

  void Latency() {
    Times alone, beside;
    EngineConfig config = Config();
    {
      EngineLoad load(config);
      for (int i = 0; i < kAlone; ++i) alone.Add(*Answer(load));
      // Two long prompts fit with their block bounds (an eighth of the KV), and half of another:
      // what short requests take. The third has to wait.
      constexpr double kLongPrompts = 2.5 * 1.125;
      config.options.kv_bytes =
          int64_t(kLongPrompts * double(Int("context") * BytesPerToken(load.loaded())));
    }
    EngineLoad load(config);
    int64_t not_counted = 0;
    std::vector<double> long_seconds;
    for (int64_t round = 0; round < Int("rounds"); ++round) {
      std::vector<std::shared_ptr<TimingSink>> longs;
      for (int i = 0; i < 4; ++i) longs.push_back(load.Start(Long(load)));
      // The first two are read step by step; the last two wait for pages.
      while (load.engine().Stats().running < 2) std::this_thread::yield();
      while (true) {
        const EngineStats before = load.engine().Stats();
        if (before.running + before.waiting < 4) break;
        const auto sink = Answer(load);
        if (before.running == 2 && before.waiting == 2) {
          beside.Add(*sink);
        } else {
          ++not_counted;
        }
      }
      for (const auto& sink : longs) {
        const FinishedEvent end = sink->Wait();
        if (!end.status.ok()) Die(end.status.ToString());
        long_seconds.push_back(end.receipt.total_seconds);
      }
    }
    Table table({"short requests", "n", "first token, ms: median", "99 %", "longest",
                 "between tokens, ms: median", "99 %", "longest"});
    alone.Row("alone", &table);
    beside.Row("beside two prefills, two waiting", &table);
    table.Print(absl::StrCat(
        "Requests of ", Int("short"), " tokens that answer ", kAnswer, ", beside prompts of ",
        Int("context"), " tokens (", flags_.at("policy"), "); ", not_counted,
        " not counted, because fewer were waiting. Long prompts took ",
        absl::StrFormat("%.1f to %.1f s, waiting included", Quantile(long_seconds, 0),
                        Quantile(long_seconds, 1))));
  }

  void Sessions() {
    EngineLoad load(Config());
    const int64_t n = Int("sessions");
    Table table({"sessions", "context", "kept per kv head", "ms a step", "tokens/s"});
    std::vector<std::string> forks;
    const SessionInfo read = ReadCompressed(load, Int("context"));
    for (int64_t i = 0; i < n; ++i) forks.push_back(load.Fork(read.id));
    table.Add(DecodeRow(load, absl::StrCat(n, ", forks of one"), read, forks));
    load.Delete(read.id);
    std::vector<std::string> own;
    SessionInfo last;
    for (int64_t i = 0; i < n; ++i) {
      last = ReadCompressed(load, Int("own_context"));
      own.push_back(last.id);
    }
    table.Add(DecodeRow(load, absl::StrCat(n, ", each read by itself"), last, own));
    table.Print("Compressed sessions that decode together");
  }

  void Memory() {
    EngineConfig config = Config();
    config.options.kv_bytes = Int("hold_mib") << 20;
    EngineLoad load(config);
    Table table({"kv policy", "context", "bytes a session", "sessions a GB",
                 absl::StrCat("held in ", flags_.at("hold_mib"), " MiB, counted")});
    for (const char* context : {"own_context", "context"}) {
      for (const char* kv : {"full", "latent"}) {
        const Held held = Hold(load, Int(context), *KvPreset(kv, "kv"));
        const int64_t bytes = held.one.kv_bytes;
        table.Add({kv, absl::StrCat(held.one.positions), absl::StrCat(bytes),
                   absl::StrFormat("%.2f", 1e9 / double(bytes)), absl::StrCat(held.count)});
      }
    }
    table.Print("Idle sessions; a pool also needs room for the whole prompt that is read next");
  }

  void Moves() {
    EngineConfig config = Config();
    config.options.session_device_bytes = 1;  // idle sessions leave the pool at once
    config.options.session_host_bytes = int64_t{1} << 38;
    EngineLoad load(config);
    Table table(
        {"moved to and fro", "bytes", "n", "between tokens, ms: median", "99 %", "longest"});
    const auto row = [&](const std::string& name, int64_t bytes, int64_t n,
                         const std::vector<double>& gaps) {
      table.Add({name, absl::StrCat(bytes), absl::StrCat(n), Ms(Quantile(gaps, 0.5)),
                 Ms(Quantile(gaps, 0.99)), Ms(Quantile(gaps, 1))});
    };
    const int64_t tokens = 8 * Int("new_tokens");
    const auto alone = load.Start(load.Request(8, tokens));
    if (const FinishedEvent end = alone->Wait(); !end.status.ok()) Die(end.status.ToString());
    row("nothing", 0, 0, alone->gaps());
    for (const char* kv : {"latent", "full"}) {
      const SessionInfo session =
          load.ReadSession(Int("context"), ParsePolicy(flags_.at("policy")), *KvPreset(kv, "kv"));
      WaitForHost(load, session.id);
      const auto stream = load.Start(load.Request(8, tokens));
      int64_t n = 0;
      while (load.engine().Stats().running > 0 || load.engine().Stats().waiting > 0 || n == 0) {
        EngineRequest turn = load.Request(8, 1);
        turn.session_id = session.id;
        turn.kv = *KvPreset(kv, "kv");
        load.Run(turn);
        WaitForHost(load, session.id);
        ++n;
      }
      if (const FinishedEvent end = stream->Wait(); !end.status.ok()) Die(end.status.ToString());
      row(kv, session.kv_bytes, n, stream->gaps());
      load.Delete(session.id);
    }
    table.Print(absl::StrCat("A stream beside a session of ", Int("context"), " tokens"));
  }

 private:
  static void WaitForHost(EngineLoad& load, const std::string& session) {
    while (load.Session(session).tier != SessionTier::kHost) std::this_thread::yield();
  }

  // Of short requests.
  struct Times {
    std::vector<double> first, gaps;  // seconds
    void Add(const TimingSink& sink) {
      first.push_back(sink.first_token_seconds());
      for (double gap : sink.gaps()) gaps.push_back(gap);
    }
    void Row(const std::string& name, Table* table) const {
      table->Add({name, absl::StrCat(first.size()), Ms(Quantile(first, 0.5)),
                  Ms(Quantile(first, 0.99)), Ms(Quantile(first, 1)), Ms(Quantile(gaps, 0.5)),
                  Ms(Quantile(gaps, 0.99)), Ms(Quantile(gaps, 1))});
    }
  };

  int64_t Int(const std::string& flag) const { return ToInt(flags_.at(flag)); }

  EngineConfig Config() const {
    EngineConfig config;
    config.model_path = flags_.at("model");
    config.backend = flags_.at("backend");
    config.dtype = flags_.at("dtype");
    config.linear_dtype = flags_.at("linear_dtype");
    config.threads = int(Int("threads"));
    config.options.step_tokens = Int("step");
    config.options.lone_chunk_tokens = Int("chunk");
    config.options.max_sequences = std::max(64, int(Int("sessions")));
    return config;
  }

  // K and V of all layers.
  static int64_t BytesPerToken(const LoadedEngine& loaded) {
    const ModelConfig& c = loaded.config;
    return int64_t{2} * c.layers * c.kv_heads * c.head_dim * int64_t(SizeOf(loaded.dtype));
  }

  EngineRequest Long(EngineLoad& load) {
    EngineRequest request = load.Request(Int("context"), 1);
    request.prefill = ParsePolicy(flags_.at("policy"));
    return request;
  }

  std::shared_ptr<TimingSink> Answer(EngineLoad& load) {
    const auto sink = load.Start(load.Request(Int("short"), kAnswer));
    if (const FinishedEvent end = sink->Wait(); !end.status.ok()) Die(end.status.ToString());
    return sink;
  }

  SessionInfo ReadCompressed(EngineLoad& load, int64_t context) {
    return load.ReadSession(context, ParsePolicy(flags_.at("policy")), *KvPreset("latent", "kv"));
  }

  struct Held {
    SessionInfo one;
    int64_t count = 0;
  };
  // Reads sessions until one has to go.
  Held Hold(EngineLoad& load, int64_t context, const KvPolicy& kv) {
    Held held;
    std::vector<std::string> ids;
    do {
      held.count = int64_t(ids.size());
      held.one = load.ReadSession(context, ParsePolicy(flags_.at("policy")), kv);
      ids.push_back(held.one.id);
    } while (load.engine().Stats().sessions == int64_t(ids.size()));
    for (const std::string& id : ids) load.Delete(id);
    return held;
  }

  std::vector<std::string> DecodeRow(EngineLoad& load, const std::string& name,
                                     const SessionInfo& one,
                                     const std::vector<std::string>& sessions) {
    std::vector<std::shared_ptr<TimingSink>> sinks;
    for (const std::string& session : sessions) {
      EngineRequest request = load.Request(8, Int("new_tokens"));
      request.session_id = session;
      sinks.push_back(load.Start(request));
    }
    std::vector<double> steps;  // each the mean of one sequence's
    for (const auto& sink : sinks) {
      const FinishedEvent end = sink->Wait();
      if (!end.status.ok()) Die(end.status.ToString());
      steps.push_back(end.receipt.decode_seconds / double(Int("new_tokens") - 1));
    }
    for (const std::string& session : sessions) load.Delete(session);
    const double step = Quantile(steps, 0.5);
    return {name, absl::StrCat(one.positions), absl::StrCat(one.kept_tokens), Ms(step),
            absl::StrFormat("%.0f", double(sessions.size()) / step)};
  }

  const Flags flags_;
};

int Main(int argc, char** argv) {
  const Flags flags = ParseFlags(argc, argv, kDefaults);
  Bench bench(flags);
  for (const std::string& part : Split(flags.at("parts"))) {
    if (part == "latency") {
      bench.Latency();
    } else if (part == "sessions") {
      bench.Sessions();
    } else if (part == "memory") {
      bench.Memory();
    } else if (part == "moves") {
      bench.Moves();
    } else {
      Die("--parts: unknown part " + part);
    }
  }
  return 0;
}

}  // namespace
}  // namespace entropyserve::bench

int main(int argc, char** argv) { return entropyserve::bench::Main(argc, argv); }
