// Prefill and decode times of the whole engine (no gRPC): random token ids through Engine::Submit.
//
//   engine_bench --model=synthetic:llama-3.1-8b --lengths=32768,131072 --decode=1,32
//
// Policies: see ParsePolicy. Medians of --runs runs after --warm_runs that do not count. Decode:
// sessions that were forked from one, or with --decode_distinct=true that were read one by one and
// share no page, as many as fit at most.
//
// --breakdown=true: after each row, one more run in which every operator is waited for and timed
// alone; its total over the median without says what the waiting adds.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tests/bench/engine_load.h"
#include "tests/bench/timed_backend.h"

namespace entropyserve::bench {
namespace {

const Flags kDefaults = {{"model", "synthetic:llama-3.1-8b"},
                         {"backend", "auto"},
                         {"dtype", "auto"},
                         {"linear_dtype", "auto"},
                         {"lengths", "8192,32768"},
                         {"policies", "full,fixed1,fixed1+r0,fixed2,fixed3"},
                         {"decode", "1,8,32"},
                         {"decode_context", "32768"},
                         {"decode_kv", "latent,full"},
                         {"decode_distinct", "false"},
                         {"runs", "3"},
                         {"warm_runs", "1"},
                         {"new_tokens", "64"},
                         {"max_context", "0"},
                         {"chunk", "0"},
                         {"step", "0"},
                         {"threads", "0"},
                         {"breakdown", "false"}};

// How sessions for decoding are read where each is read by itself: what they hold does not depend
// on it, and it is the cheapest.
constexpr char kCheapPolicy[] = "fixed1+r0";

class Bench {
 public:
  explicit Bench(const Flags& flags)
      : flags_(flags), times_(std::make_shared<OperatorTimes>()), load_(Config()) {}

  void Prefill() {
    std::printf("%-16s %8s %10s %10s %9s %8s %9s\n", "policy", "tokens", "prefill_s", "tokens/s",
                "share", "vs_full", "kv_ratio");
    for (const std::string& length : Split(flags_.at("lengths"))) {
      double full = 0;
      for (const std::string& name : Split(flags_.at("policies"))) {
        EngineRequest request = load_.Request(ToInt(length), 20);
        request.prefill = ParsePolicy(name);
        if (request.prefill.params.full) request.kv = *KvPreset("full", "kv");
        std::vector<double> seconds;
        Receipt receipt;
        const int64_t warm = ToInt(flags_.at("warm_runs"));
        for (int64_t run = 0; run < warm + ToInt(flags_.at("runs")); ++run) {
          receipt = load_.Run(request).receipt;
          if (run >= warm) seconds.push_back(receipt.prefill_seconds);
        }
        const double median = Quantile(seconds, 0.5);
        if (request.prefill.params.full) full = median;
        std::printf("%-16s %8ld %10.3f %10.0f %9.3f %8.2f %9.3f\n", name.c_str(),
                    long(request.prompt.size()), median, double(request.prompt.size()) / median,
                    receipt.attention_flops_executed / receipt.attention_flops_dense,
                    full > 0 ? full / median : 0.0,
                    double(receipt.kv_bytes_after) / double(receipt.kv_bytes_before));
        std::fflush(stdout);
        if (!Wanted("breakdown")) continue;
        times_->TurnOn(true);
        receipt = load_.Run(request).receipt;
        PrintTimes(absl::StrCat("Prefill of ", length, " tokens, ", name), Phase::kPrefill,
                   receipt.prefill_seconds, median);
        PrintTimes("Its compression", Phase::kCompress, 0, 0);
        times_->TurnOn(false);
      }
    }
  }

  void Decode() {
    if (flags_.at("decode").empty()) return;
    std::printf("%-8s %8s %6s %12s %12s\n", "kv", "context", "batch", "ms/step", "tokens/s");
    const int64_t context = ToInt(flags_.at("decode_context"));
    for (const std::string& kv : Split(flags_.at("decode_kv"))) {
      const auto policy = KvPreset(kv, "decode_kv");
      if (!policy.ok()) Die(policy.status().ToString());
      const bool distinct = Wanted("decode_distinct");
      const SessionInfo first = load_.ReadSession(
          context, distinct ? ParsePolicy(kCheapPolicy) : PrefillPolicy(), *policy);
      std::vector<std::string> read = {first.id};
      std::set<int64_t> done;
      for (const std::string& text : Split(flags_.at("decode"))) {
        const int64_t batch = distinct ? std::min(ToInt(text), Fit(first)) : ToInt(text);
        if (!done.insert(batch).second) continue;
        while (distinct && int64_t(read.size()) < batch)
          read.push_back(load_.ReadSession(context, ParsePolicy(kCheapPolicy), *policy).id);
        DecodeRow(kv, read, batch);
      }
      for (const std::string& session : read) load_.Delete(session);
    }
  }

 private:
  EngineConfig Config() const {
    EngineConfig config;
    config.model_path = flags_.at("model");
    config.backend = flags_.at("backend");
    config.dtype = flags_.at("dtype");
    config.linear_dtype = flags_.at("linear_dtype");
    config.threads = int(ToInt(flags_.at("threads")));
    config.options.max_context = ToInt(flags_.at("max_context"));
    config.options.lone_chunk_tokens = ToInt(flags_.at("chunk"));
    config.options.step_tokens = ToInt(flags_.at("step"));
    if (Wanted("breakdown")) {
      config.wrap_backend = [times = times_](std::unique_ptr<Backend> backend) {
        return MakeTimedBackend(std::move(backend), times);
      };
    }
    return config;
  }

  bool Wanted(const std::string& flag) const {
    const std::string& value = flags_.at(flag);
    if (value != "true" && value != "false") Die("--" + flag + ": neither true nor false");
    return value == "true";
  }

  // Sessions like `one` that fit beside each other while the last of them is being read, which
  // takes its uncompressed cache and block bounds as well.
  int64_t Fit(const SessionInfo& one) {
    const EngineStats stats = load_.engine().Stats();
    const ModelConfig& c = load_.loaded().config;
    const double pool = double(stats.pages_total) * double(stats.page_bytes);
    const double whole = 2.0 * double(one.positions) * c.layers * c.kv_heads * c.head_dim *
                         double(SizeOf(load_.loaded().dtype));
    constexpr double kWhileReading = 1.2;
    return std::max<int64_t>(1, 1 + int64_t((pool - kWhileReading * whole) / double(one.kv_bytes)));
  }

  // Receipts of sequences that decode together: in forks of the one session that was read, or in
  // the sessions themselves, which then are that much longer (a fork is charged as if it shared
  // nothing, so that forks beside them would not fit).
  std::vector<Receipt> DecodeTogether(const std::string& kv, const std::vector<std::string>& read,
                                      int64_t batch) {
    std::vector<std::string> sessions = read;
    std::vector<std::shared_ptr<TimingSink>> sinks;
    sessions.resize(size_t(batch));
    const bool forked = !Wanted("decode_distinct");
    for (std::string& session : sessions) {
      if (forked) session = load_.Fork(read[0]);
    }
    for (const std::string& session : sessions) {
      EngineRequest request = load_.Request(8, ToInt(flags_.at("new_tokens")));
      request.session_id = session;
      request.kv = *KvPreset(kv, "kv");
      sinks.push_back(load_.Start(request));
    }
    std::vector<Receipt> receipts;
    for (auto& sink : sinks) {
      const FinishedEvent end = sink->Wait();
      if (end.status.ok()) receipts.push_back(end.receipt);
    }
    for (const std::string& session : sessions) {
      if (forked) load_.Delete(session);
    }
    return receipts;
  }

  void DecodeRow(const std::string& kv, const std::vector<std::string>& read, int64_t batch) {
    const std::vector<Receipt> receipts = DecodeTogether(kv, read, batch);
    std::printf("%-8s %8s %6ld ", kv.c_str(), flags_.at("decode_context").c_str(), long(batch));
    if (int64_t(receipts.size()) < batch) {
      std::printf("does not fit\n");
      return;
    }
    const double step = MedianDecode(receipts) / double(ToInt(flags_.at("new_tokens")) - 1);
    std::printf("%12.3f %12.1f\n", step * 1e3, double(batch) / step);
    std::fflush(stdout);
    if (!Wanted("breakdown")) return;
    times_->TurnOn(true);
    const double timed = MedianDecode(DecodeTogether(kv, read, batch));
    PrintTimes(absl::StrCat("Decode, ", kv, ", ", batch, " sequences"), Phase::kDecode, timed,
               MedianDecode(receipts));
    times_->TurnOn(false);
  }

  static double MedianDecode(const std::vector<Receipt>& receipts) {
    std::vector<double> seconds;
    for (const Receipt& receipt : receipts) seconds.push_back(receipt.decode_seconds);
    return Quantile(seconds, 0.5);
  }

  // A linear's name by its shape; any other name as it is.
  std::string OperatorName(const std::string& name) const {
    const ModelConfig& c = load_.loaded().config;
    const auto linear = [](int64_t rows, int64_t cols) {
      return absl::StrCat("linear ", rows, "x", cols);
    };
    const int64_t q = int64_t{c.heads} * c.head_dim, kv = int64_t{c.kv_heads} * c.head_dim;
    if (name == linear(q + 2 * kv, c.hidden)) return "linear qkv";
    if (name == linear(c.hidden, q)) return c.ffn == q ? "linear o, down" : "linear o";
    if (name == linear(2 * int64_t{c.ffn}, c.hidden)) return "linear gate_up";
    if (name == linear(c.hidden, c.ffn)) return "linear down";
    if (name == linear(c.vocab, c.hidden)) return "linear logits";
    return name;
  }

  // timed: the receipt's seconds of the run that was timed, whose rest no operator has; 0: none.
  void PrintTimes(const std::string& title, Phase phase, double timed, double without) const {
    std::vector<std::pair<std::string, OperatorTime>> rows;
    double sum = 0;
    for (const auto& [name, time] : times_->Get(phase)) {
      rows.emplace_back(OperatorName(name), time);
      sum += time.seconds;
    }
    if (rows.empty()) return;
    std::sort(rows.begin(), rows.end(),
              [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
    const double total = std::max(timed, sum);
    if (timed > sum) rows.push_back({"rest", {.seconds = timed - sum}});
    Table table({"operator", "calls", "ms", "share", "TFLOP/s", "GB/s of weights"});
    for (const auto& [name, t] : rows) {
      const bool linear = t.flops > 0;
      table.Add({name, t.calls > 0 ? absl::StrCat(t.calls) : "",
                 absl::StrFormat("%.2f", t.seconds * 1e3),
                 absl::StrFormat("%.1f %%", 100 * t.seconds / total),
                 linear ? absl::StrFormat("%.2f", t.flops / t.seconds * 1e-12) : "",
                 linear ? absl::StrFormat("%.0f", t.bytes / t.seconds * 1e-9) : ""});
    }
    std::string note;
    if (without > 0) {
      note =
          absl::StrFormat(": %.3f s timed, %.3f s without (%.2f)", timed, without, timed / without);
    }
    table.Print(title + note);
    std::printf("\n");
  }

  const Flags flags_;
  const std::shared_ptr<OperatorTimes> times_;
  EngineLoad load_;
};

}  // namespace
}  // namespace entropyserve::bench

int main(int argc, char** argv) {
  using namespace entropyserve::bench;
  Bench bench(ParseFlags(argc, argv, kDefaults));
  bench.Prefill();
  bench.Decode();
  return 0;
}
