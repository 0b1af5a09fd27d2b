// entropyserve-client bench: sends the plans of a sweep and reports how they were answered.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/bench/drive.h"
#include "client/bench/flags.h"
#include "client/bench/page.h"
#include "client/bench/prompts.h"
#include "client/bench/report.h"
#include "client/bench/scrape.h"
#include "client/command.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr int kWarmupConcurrency = 4;
constexpr int64_t kMaxConnections = 64;  // opened before a run; more come when they are needed

// One line on stderr, redrawn; nothing where it is no terminal.
class ProgressLine {
 public:
  void Show(const std::string& name, const DriveProgress& progress) {
    if (!enabled_) return;
    const double rate =
        progress.seconds > 0 ? static_cast<double>(progress.output_tokens) / progress.seconds : 0;
    std::fprintf(stderr,
                 "\r\x1b[K%s: %.0f s, %lld sent, %lld on their way, %lld done, %lld failed, "
                 "%.0f tokens/s",
                 name.c_str(), progress.seconds, static_cast<long long>(progress.started),
                 static_cast<long long>(progress.in_flight),
                 static_cast<long long>(progress.completed),
                 static_cast<long long>(progress.failed), rate);
    std::fflush(stderr);
    drawn_ = true;
  }
  void Clear() {
    if (drawn_) std::fputs("\r\x1b[K", stderr);
    drawn_ = false;
  }

 private:
  const bool enabled_ = isatty(STDERR_FILENO) != 0;
  bool drawn_ = false;
};

// The rows of a sweep, one run after another.
class Bench {
 public:
  Bench(BenchSettings settings, CancelToken* cancel)
      : settings_(std::move(settings)), cancel_(cancel) {}

  // What the report needs to know of the server, and prompts. UNAVAILABLE and others: the server's.
  absl::Status Prepare();
  // Up to the end of the plan or of the server; `report` has what was measured in either case.
  absl::Status Measure(BenchReport* report);

 private:
  absl::Status RunOnce(double level, const std::vector<std::string>& policies, BenchReport* report);
  absl::Status WarmUp(LoadDriver* driver);
  int Connections(double level) const;
  std::map<std::string, double> Counters() const;

  BenchSettings settings_;
  CancelToken* const cancel_;
  v1::GetModelResponse model_;
  v1::GetServerResponse server_;
  std::optional<PromptSource> prompts_;
  ProgressLine progress_;
};

absl::Status Bench::Prepare() {
  ASSIGN_OR_RETURN(const auto client, Client::Create(settings_.connection.options));
  const CallOptions call{0, cancel_};
  ASSIGN_OR_RETURN(model_, client->GetModel(call));
  ASSIGN_OR_RETURN(server_, client->GetServer(call));
  settings_.workload.context_tokens = std::max<int64_t>(1, model_.context_tokens());
  if (!settings_.metrics_url.empty()) {
    RETURN_IF_ERROR(FetchUrl(settings_.metrics_url).status());  // sooner than after an hour
  }
  if (settings_.text_file.empty()) {
    ASSIGN_OR_RETURN(std::vector<int32_t> ids, OrdinaryIds(model_, client.get()));
    prompts_ = PromptSource::Random(std::move(ids));
    return absl::OkStatus();
  }
  v1::TokenizeRequest request;
  ASSIGN_OR_RETURN(*request.mutable_text(), ReadText("text", settings_.text_file));
  ASSIGN_OR_RETURN(const v1::TokenizeResponse tokens, client->Tokenize(request, call));
  if (tokens.ids().empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--text: ", settings_.text_file, " is empty"));
  }
  prompts_ = PromptSource::Windows({tokens.ids().begin(), tokens.ids().end()});
  return absl::OkStatus();
}

absl::Status Bench::Measure(BenchReport* report) {
  report->server_version = server_.version();
  report->backend = server_.backend();
  report->model = model_.name();
  report->dtype = model_.dtype();
  report->seed = settings_.workload.seed;
  report->poisson = settings_.workload.poisson;
  report->slo = settings_.slo;
  absl::Status status;
  for (const double level : settings_.levels) {
    if (settings_.interleave) {
      status = RunOnce(level, settings_.policies, report);
    }
    for (size_t i = 0; !settings_.interleave && status.ok() && i < settings_.policies.size(); ++i) {
      status = RunOnce(level, {settings_.policies[i]}, report);
    }
    if (!status.ok()) break;
  }
  report->ended = std::string(status.message());
  return status;
}

int Bench::Connections(double level) const {
  const WorkloadSpec& workload = settings_.workload;
  int64_t at_once = settings_.max_concurrency;
  if (workload.mode == LoadMode::kClosed) at_once = static_cast<int64_t>(level);
  at_once =
      std::min(at_once, workload.conversations * static_cast<int64_t>(settings_.policies.size()));
  const int64_t each = settings_.streams_per_connection;
  return static_cast<int>(std::clamp<int64_t>((at_once + each - 1) / each, 1, kMaxConnections));
}

std::map<std::string, double> Bench::Counters() const {
  if (settings_.metrics_url.empty()) return {};
  const absl::StatusOr<std::string> page = FetchUrl(settings_.metrics_url);
  return page.ok() ? ParseCounters(*page) : std::map<std::string, double>();
}

absl::Status Bench::WarmUp(LoadDriver* driver) {
  if (settings_.warmup == 0) return absl::OkStatus();
  WorkloadSpec spec = settings_.workload;
  spec.mode = LoadMode::kClosed;
  spec.level = kWarmupConcurrency;
  spec.conversations = settings_.warmup;
  spec.duration_seconds = std::numeric_limits<double>::infinity();
  spec.cancel_share = spec.slow_share = 0;
  spec.turns = Distribution(1);
  spec.seed = ~spec.seed;  // other prompts than the measured ones
  if (!spec.trace.empty()) {
    spec.input_tokens = Distribution(static_cast<double>(spec.trace[0].input_tokens));
    spec.output_tokens = Distribution(static_cast<double>(spec.trace[0].output_tokens));
  }
  return driver->Run(Plan(std::move(spec)), *prompts_).ended;
}

absl::Status Bench::RunOnce(double level, const std::vector<std::string>& policies,
                            BenchReport* report) {
  WorkloadSpec spec = settings_.workload;
  spec.level = level;
  spec.copies = static_cast<int>(policies.size());
  const Plan plan(spec);
  BenchRow row;
  row.mode = spec.mode;
  row.level = level;
  row.ramp_from = spec.ramp_from;
  row.conversations =
      spec.mode == LoadMode::kClosed ? spec.conversations : plan.size() / spec.copies;
  const std::string name = absl::StrCat(LevelName(row), ", ", absl::StrJoin(policies, "+"));

  DriveOptions options;
  options.client = settings_.connection.options;
  options.deadline_seconds = settings_.connection.deadline_seconds;
  options.max_concurrency = settings_.max_concurrency;
  options.slow_pause_seconds = settings_.slow_pause_seconds;
  options.streams_per_connection = settings_.streams_per_connection;
  for (const std::string& policy : policies) {
    options.requests.push_back(WithPolicy(settings_.request, policy));
  }
  options.on_progress = [this, &name](const DriveProgress& progress) {
    progress_.Show(name, progress);
  };
  options.cancel = cancel_;
  ASSIGN_OR_RETURN(const auto driver, LoadDriver::Create(std::move(options), Connections(level)));
  const absl::Status warm = WarmUp(driver.get());
  const std::map<std::string, double> before = Counters();
  DriveResult result;
  if (warm.ok()) result = driver->Run(plan, *prompts_);
  progress_.Clear();
  RETURN_IF_ERROR(warm);
  row.server_counters = Growth(before, Counters());
  row.counters_shared = policies.size() > 1;
  for (size_t i = 0; i < policies.size(); ++i) {
    BenchRow own = row;
    own.policy = policies[i];
    for (RequestRecord& record : result.records) {
      if (record.copy == static_cast<int>(i)) own.records.push_back(std::move(record));
    }
    own.summary = Summarize(own.records, result.seconds, settings_.slo);
    own.summary.turns_not_sent = result.turns_not_sent[i];
    report->rows.push_back(std::move(own));
  }
  return result.ended;
}

// "20261122-185530".
std::string UtcStamp() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y%m%d-%H%M%S", &utc);
  return text;
}

// As it was given, but for the key.
std::string CommandLine(const std::vector<std::string>& args) {
  std::string line = "entropyserve-client bench";
  bool hide = false;
  for (const std::string& arg : args) {
    absl::StrAppend(&line, " ",
                    hide                                  ? "***"
                    : absl::StartsWith(arg, "--api-key=") ? "--api-key=***"
                                                          : arg);
    hide = arg == "--api-key";
  }
  return line;
}

std::vector<std::pair<const char*, std::string>> OutputFiles(const BenchSettings& settings) {
  std::vector<std::pair<const char*, std::string>> files = {{"output-json", settings.json_file},
                                                            {"output-csv", settings.csv_file},
                                                            {"html", settings.html_file}};
  if (settings.save_detailed && !settings.csv_file.empty() && settings.csv_file != "-") {
    files.emplace_back("output-csv", settings.csv_file + ".requests.csv");
  }
  std::erase_if(files, [](const auto& file) { return file.second.empty(); });
  return files;
}

// Sooner than after the run.
absl::Status CheckFiles(const BenchSettings& settings) {
  for (const auto& [flag, path] : OutputFiles(settings)) {
    RETURN_IF_ERROR(CheckWritable(flag, path));
  }
  return absl::OkStatus();
}

// Prints and writes the report; the first error of a file.
absl::Status Publish(const BenchSettings& settings, const BenchReport& report) {
  if (settings.json) {
    std::fputs(ReportJson(report, settings.save_detailed).c_str(), stdout);
  } else {
    for (const BenchRow& row : report.rows) std::printf("%s\n", FormatRow(row, report.slo).c_str());
    if (report.rows.size() > 1) std::fputs(FormatSweep(report.rows).c_str(), stdout);
  }
  std::fflush(stdout);
  absl::Status status;
  for (const auto& [flag, path] : OutputFiles(settings)) {
    const std::string_view name = flag;
    status.Update(WriteFile(flag, path,
                            name == "html"              ? BenchPage(report)
                            : name == "output-json"     ? ReportJson(report, settings.save_detailed)
                            : path == settings.csv_file ? ReportCsv(report)
                                                        : RequestsCsv(report)));
  }
  return status;
}

}  // namespace

int RunBench(const std::vector<std::string>& args) {
  BenchSettings settings;
  int exit_code = kExitOk;
  if (!ParseBenchFlags(args, &settings, &exit_code)) return exit_code;
  if (const absl::Status status = CheckFiles(settings); !status.ok()) {
    return ReportUsage(std::string(status.message()));
  }
  InterruptGuard guard(/*terminate=*/true);
  CancelToken cancel;
  guard.Watch(&cancel);
  Bench bench(settings, &cancel);
  const absl::Status prepared = bench.Prepare();
  if (!prepared.ok()) {
    guard.Watch(nullptr);
    return cancel.cancelled() ? kExitInterrupted : Report(prepared);
  }
  BenchReport report;
  report.date = UtcStamp();
  report.command = CommandLine(args);
  const absl::Status ended = bench.Measure(&report);
  guard.Watch(nullptr);
  const absl::Status published = Publish(settings, report);
  if (cancel.cancelled()) return kExitInterrupted;
  if (!ended.ok()) return Report(ended);
  if (!published.ok()) return Report(published);
  int64_t completed = 0, failed = 0;
  for (const BenchRow& row : report.rows) {
    completed += row.summary.completed + row.summary.cancelled;
    failed += row.summary.failed;
  }
  if (completed > 0 || failed == 0) return kExitOk;
  return Report(absl::FailedPreconditionError("no request was completed"));
}

}  // namespace entropyserve
