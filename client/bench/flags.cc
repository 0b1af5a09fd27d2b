#include "client/bench/flags.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/status_macros.h"
#include "proto/policy_flags.h"

namespace entropyserve {
namespace {

constexpr char kUsage[] =
    "entropyserve-client bench [flags]\n"
    "Measures a server under load and prints, per load and policy: latencies with their "
    "percentiles,\n"
    "throughput, goodput, errors, receipts. Each request is sent once, at its time, whatever "
    "became of\n"
    "those before it (--rate), or when one before it has ended (--concurrency). Latencies are "
    "given from\n"
    "when a request was sent, as vLLM's bench gives them, and from when it should have been sent.\n"
    "\n"
    "  bench --concurrency=1,8,32 --input-len=8000 --output-len=128 --html=bench.html\n"
    "  bench --rate=0.5,1,2 --requests=200 --slo=ttft:2000,tpot:50 "
    "--policies=full,entropy,coverage\n"
    "\n"
    "Ctrl-C and SIGTERM end the run and report what was measured. Exit codes: 0 the plan was "
    "carried "
    "out,\n"
    "1 the server went away or completed nothing, 2 wrong usage, 130 interrupted.\n";

// Flags whose text needs the others to be understood.
struct RawFlags {
  std::string rate, concurrency, replay, replay_speed = "1", arrivals = "poisson", policies;
  std::string policy_order = "sequential";
  std::optional<double> ramp_from, duration_seconds;
  std::optional<int64_t> requests;
  int64_t seed = 0;
  double slow_pause_ms = 100;
};

void AddDistribution(FlagSet* set, const char* name, const char* shown, const char* help,
                     Distribution* target) {
  set->AddCustom(name, shown, help, [target](std::string_view text) -> absl::Status {
    ASSIGN_OR_RETURN(*target, Distribution::Parse(text));
    return absl::OkStatus();
  });
}

void AddLoadFlags(FlagSet* set, RawFlags* raw, BenchSettings* settings) {
  set->Section("Load");
  set->Add("rate", &raw->rate,
           "open loop: conversations per second, one row for each of 1,2,4; inf: all at once");
  set->Add("concurrency", &raw->concurrency,
           "closed loop: conversations at a time, one row for each of 1,8,32. Without any: 1");
  set->Add(
      "replay", &raw->replay,
      "a trace: lines of {\"timestamp\": ms, \"input_length\", \"output_length\", \"session\"}");
  set->Add("replay-speed", &raw->replay_speed, "2: twice as fast; one row for each of 1,2,4");
  set->AddChoice("arrivals", &raw->arrivals, {"poisson", "constant"}, "of the open loop");
  set->Add("ramp-from", &raw->ramp_from,
           "open loop: the rate at the start; it grows linearly to --rate over the run");
  set->Add("requests", &raw->requests,
           "conversations of a row, of one request each unless --turns; 100, or a whole trace");
  set->Add("duration-seconds", &raw->duration_seconds, "start nothing later than this");
  set->Add("max-concurrency", &settings->max_concurrency,
           "open loop: conversations at once; later ones wait in the client, which is reported");
  set->Add("warmup", &settings->warmup, "requests before each row that do not count");
  set->Add("seed", &raw->seed, "the same seed gives the same schedule, lengths, prompts and noise");
}

void AddPromptFlags(FlagSet* set, RawFlags* raw, BenchSettings* settings) {
  WorkloadSpec* workload = &settings->workload;
  set->Section("Requests");
  AddDistribution(
      set, "input-len", "512",
      "tokens: 512, uniform:a-b, normal:mean,deviation, lognormal:median,sigma, list:a,b",
      &workload->input_tokens);
  AddDistribution(set, "output-len", "128", "tokens, in the same forms", &workload->output_tokens);
  set->Add("text", &settings->text_file,
           "prompts are windows of this file; without it, random plain tokens");
  AddDistribution(set, "turns", "1", "requests of a conversation; several: in a session",
                  &workload->turns);
  AddDistribution(set, "think-seconds", "0", "between an answer and the next turn",
                  &workload->think_seconds);
  set->Add("cancel-share", &workload->cancel_share,
           "of the requests, cancelled somewhere on their way");
  set->Add("slow-share", &workload->slow_share, "of the requests, read with pauses");
  set->Add("slow-pause-ms", &raw->slow_pause_ms, "after each event that a slow reader reads");
  v1::SamplingParams* sampling = settings->request.mutable_sampling();
  sampling->set_ignore_eos(true);
  set->AddSwitch("ignore-eos", "true", "answers have exactly their planned length",
                 [sampling](bool value) { sampling->set_ignore_eos(value); });
  set->AddCustom("temperature", "", "0: greedy; absent: the server's default",
                 [sampling](std::string_view text) -> absl::Status {
                   ASSIGN_OR_RETURN(const double value, ParseNumber(text));
                   sampling->set_temperature(static_cast<float>(value));
                   return absl::OkStatus();
                 });
  set->Section("Policies (absent: the server's default)");
  set->Add("policies", &raw->policies,
           "compare these, with the same prompts: full,entropy,coverage or prefill/kv pairs");
  set->AddChoice("policy-order", &raw->policy_order, {"sequential", "interleaved"},
                 "one run for each, or all in one run");
  AddPolicyFlags(set, settings->request.mutable_policy());
}

void AddOutputFlags(FlagSet* set, BenchSettings* settings) {
  set->Section("Output");
  set->AddCustom("slo", "", "objectives in ms for goodput: ttft:1000,tpot:50,e2el:30000",
                 [settings](std::string_view text) -> absl::Status {
                   ASSIGN_OR_RETURN(settings->slo, ParseSlo(text));
                   return absl::OkStatus();
                 });
  set->Add("metrics-url", &settings->metrics_url,
           "the server's /metrics, read before and after; what grew is in the JSON");
  set->Add("json", &settings->json, "the JSON report on stdout instead of tables");
  set->Add("output-json", &settings->json_file, "write the JSON report here");
  set->Add("output-csv", &settings->csv_file, "write one line per row here");
  set->Add("html", &settings->html_file, "write a page with plots here; it loads nothing");
  set->Add("save-detailed", &settings->save_detailed,
           "every request: arrays in the JSON, and FILE.requests.csv beside --output-csv");
  set->Add("streams-per-connection", &settings->streams_per_connection,
           "below the server's --max-streams-per-connection");
}

absl::Status SetMode(const RawFlags& raw, BenchSettings* settings) {
  WorkloadSpec* workload = &settings->workload;
  const int modes = !raw.rate.empty() + !raw.concurrency.empty() + !raw.replay.empty();
  if (modes > 1) return absl::InvalidArgumentError("give one of --rate, --concurrency, --replay");
  const bool closed = raw.rate.empty() && raw.replay.empty();
  workload->mode = closed              ? LoadMode::kClosed
                   : !raw.rate.empty() ? LoadMode::kOpen
                                       : LoadMode::kTrace;
  const std::string levels = closed              ? (raw.concurrency.empty() ? "1" : raw.concurrency)
                             : !raw.rate.empty() ? raw.rate
                                                 : raw.replay_speed;
  const auto parsed = ParseLevels(levels, closed);
  if (!parsed.ok()) {
    const char* flag = closed ? "concurrency" : !raw.rate.empty() ? "rate" : "replay-speed";
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": ", parsed.status().message()));
  }
  settings->levels = *parsed;
  const bool any_infinite =
      std::any_of(parsed->begin(), parsed->end(), [](double level) { return std::isinf(level); });
  if (any_infinite && workload->mode != LoadMode::kOpen) {
    return absl::InvalidArgumentError("--replay-speed, --concurrency: expected finite numbers");
  }
  if (raw.ramp_from.has_value()) {
    if (workload->mode != LoadMode::kOpen || any_infinite || !(*raw.ramp_from >= 0) ||
        !std::isfinite(*raw.ramp_from)) {
      return absl::InvalidArgumentError("--ramp-from: expected a rate >= 0, with a finite --rate");
    }
    workload->ramp_from = *raw.ramp_from;
  }
  if (raw.replay.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::string text, ReadText("replay", raw.replay));
  const auto trace = ParseTrace(text);
  if (!trace.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--replay: ", raw.replay, ": ", trace.status().message()));
  }
  workload->trace = *trace;
  return absl::OkStatus();
}

absl::Status CheckRanges(const RawFlags& raw, const BenchSettings& settings) {
  const WorkloadSpec& workload = settings.workload;
  const std::pair<bool, const char*> checks[] = {
      {workload.conversations >= 1, "--requests: expected at least 1"},
      {workload.duration_seconds > 0, "--duration-seconds: expected more than 0"},
      {settings.max_concurrency >= 0, "--max-concurrency: expected 0 (no limit) or more"},
      {settings.warmup >= 0, "--warmup: expected 0 or more"},
      {raw.seed >= 0, "--seed: expected 0 or more"},
      {workload.cancel_share >= 0 && workload.cancel_share <= 1, "--cancel-share: expected 0 to 1"},
      {workload.slow_share >= 0 && workload.slow_share <= 1, "--slow-share: expected 0 to 1"},
      {raw.slow_pause_ms >= 0 && raw.slow_pause_ms <= 1e6,
       "--slow-pause-ms: expected 0 to 1000000"},
      {settings.streams_per_connection >= 1, "--streams-per-connection: expected at least 1"},
      {!settings.interleave || workload.mode != LoadMode::kTrace,
       "--policy-order: a trace is replayed for one policy after another"},
      {!settings.save_detailed || settings.json || !settings.json_file.empty() ||
           !settings.csv_file.empty(),
       "--save-detailed: needs --json, --output-json or --output-csv"}};
  for (const auto& [holds, message] : checks) {
    if (!holds) return absl::InvalidArgumentError(message);
  }
  return absl::OkStatus();
}

absl::Status Interpret(const RawFlags& raw, BenchSettings* settings) {
  WorkloadSpec* workload = &settings->workload;
  RETURN_IF_ERROR(SetMode(raw, settings));
  workload->poisson = raw.arrivals == "poisson";
  workload->seed = static_cast<uint64_t>(raw.seed);
  if (raw.duration_seconds.has_value()) workload->duration_seconds = *raw.duration_seconds;
  constexpr int64_t kDefaultRequests = 100, kAnyNumber = 10'000'000;
  // A stated duration alone bounds the run.
  workload->conversations = raw.requests.value_or(
      workload->mode == LoadMode::kTrace || raw.duration_seconds.has_value() ? kAnyNumber
                                                                             : kDefaultRequests);
  settings->slow_pause_seconds = raw.slow_pause_ms * 1e-3;
  settings->interleave = raw.policy_order == "interleaved";
  if (!raw.policies.empty()) {
    settings->policies = absl::StrSplit(raw.policies, ',', absl::SkipWhitespace());
  }
  if (settings->policies.empty()) return absl::InvalidArgumentError("--policies: expected names");
  RETURN_IF_ERROR(CheckRanges(raw, *settings));
  const bool endless = workload->mode == LoadMode::kOpen && !raw.requests.has_value() &&
                       std::isinf(settings->levels.back());
  if (endless && raw.duration_seconds.has_value()) {
    return absl::InvalidArgumentError("--rate=inf: needs --requests");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<double>> ParseLevels(std::string_view text, bool whole_numbers) {
  std::vector<double> levels;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const auto level = ParseNumber(std::string(part));
    const bool good = level.ok() && *level > 0 && (!whole_numbers || *level == std::floor(*level));
    if (!good || (whole_numbers && *level > 1e6)) {
      return absl::InvalidArgumentError(whole_numbers
                                            ? "expected whole numbers of 1 to 1000000, e.g. 1,8,32"
                                            : "expected numbers greater than 0, e.g. 1,2,4");
    }
    levels.push_back(*level);
  }
  return levels;
}

v1::GenerateRequest WithPolicy(v1::GenerateRequest request, const std::string& policy) {
  if (policy == "default") return request;
  const size_t slash = policy.find('/');
  const std::string prefill = policy.substr(0, slash);
  if (!prefill.empty()) request.mutable_policy()->mutable_prefill()->set_preset(prefill);
  if (slash != policy.npos) {
    request.mutable_policy()->mutable_kv()->set_preset(policy.substr(slash + 1));
  }
  return request;
}

bool ParseBenchFlags(const std::vector<std::string>& args, BenchSettings* settings,
                     int* exit_code) {
  RawFlags raw;
  FlagSet set(kUsage, kClientEnvPrefix);
  AddLoadFlags(&set, &raw, settings);
  AddPromptFlags(&set, &raw, settings);
  AddOutputFlags(&set, settings);
  AddConnectionFlags(&set, &settings->connection);
  std::vector<std::string> positional;
  if (!ParseCommandLine(&set, args, 0, &positional, exit_code)) return false;
  const absl::Status status = Interpret(raw, settings);
  if (status.ok()) return true;
  *exit_code = ReportUsage(std::string(status.message()));
  return false;
}

}  // namespace entropyserve
