#include "tests/bench/engine_load.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace entropyserve::bench {

constexpr char kOwner[] = "bench";

void Die(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(2);
}

Flags ParseFlags(int argc, char** argv, Flags defaults) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t equals = arg.find('=');
    if (!arg.starts_with("--") || equals == std::string::npos ||
        !defaults.count(arg.substr(2, equals - 2))) {
      std::string known;
      for (const auto& [name, value] : defaults) known += " --" + name + "=" + value;
      Die("unknown flag " + arg + "; flags and defaults:" + known);
    }
    defaults[arg.substr(2, equals - 2)] = arg.substr(equals + 1);
  }
  return defaults;
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
    const int32_t value = int32_t(ToInt(parts[i].substr(1)));
    switch (parts[i][0]) {
      case 'r':
        policy.params.correction = value;
        break;
      case 'l':
        policy.params.first_sparse_layer = value;
        break;
      default:
        Die("unknown part " + parts[i]);
    }
  }
  return policy;
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, size_t(q * double(values.size())))];
}

std::vector<double> TimingSink::gaps() const {
  std::vector<double> seconds;
  for (size_t i = 1; i < tokens_.size(); ++i)
    seconds.push_back(Seconds(tokens_[i - 1], tokens_[i]));
  return seconds;
}

EngineLoad::EngineLoad(const EngineConfig& config) : random_(20261122) {
  auto loaded = LoadEngine(config);
  if (!loaded.ok()) Die(loaded.status().ToString());
  loaded_ = *std::move(loaded);
  std::printf("%s, %s, %s, linears %s, %.2fe9 parameters\n", loaded_.config.name.c_str(),
              loaded_.backend_description.c_str(), Name(loaded_.dtype), Name(loaded_.linear_dtype),
              double(loaded_.parameters) * 1e-9);
  if (absl::Status status = loaded_.engine->WarmUp(); !status.ok()) Die(status.ToString());
}

EngineRequest EngineLoad::Request(int64_t prompt_tokens, int64_t max_new) {
  EngineRequest request;
  request.owner = kOwner;
  std::uniform_int_distribution<int32_t> id(0, loaded_.config.vocab - 1);
  for (int64_t i = 0; i < prompt_tokens; ++i) request.prompt.push_back(id(random_));
  request.sampling.temperature = 0;
  request.sampling.ignore_eos = true;
  request.sampling.max_new_tokens = max_new;
  return request;
}

std::shared_ptr<TimingSink> EngineLoad::Start(const EngineRequest& request) {
  auto sink = std::make_shared<TimingSink>();
  if (auto id = engine().Submit(request, sink); !id.ok()) Die(id.status().ToString());
  return sink;
}

FinishedEvent EngineLoad::Run(const EngineRequest& request) {
  FinishedEvent end = Start(request)->Wait();
  if (!end.status.ok()) Die(end.status.ToString());
  return end;
}

SessionInfo EngineLoad::ReadSession(int64_t context, const PrefillPolicy& prefill,
                                    const KvPolicy& kv) {
  const auto session = engine().CreateSession(kOwner);
  if (!session.ok()) Die(session.status().ToString());
  EngineRequest read = Request(context, 0);
  read.prefill = prefill;
  read.kv = kv;
  read.session_id = session->id;
  Run(read);
  return Session(session->id);
}

SessionInfo EngineLoad::Session(const std::string& session) {
  auto info = engine().GetSession(kOwner, session);
  if (!info.ok()) Die(info.status().ToString());
  return *info;
}

std::string EngineLoad::Fork(const std::string& session) {
  auto fork = engine().ForkSession(kOwner, session);
  if (!fork.ok()) Die(fork.status().ToString());
  return fork->id;
}

void EngineLoad::Delete(const std::string& session) {
  engine().DeleteSession(kOwner, session).IgnoreError();
}

void Table::Print(const std::string& title) const {
  std::vector<size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::printf("\n%s\n\n", title.c_str());
  for (size_t r = 0; r < rows_.size(); ++r) {
    for (size_t i = 0; i < widths.size(); ++i)
      std::printf("| %-*s ", int(widths[i]), rows_[r][i].c_str());
    std::printf("|\n");
    for (size_t i = 0; r == 0 && i < widths.size(); ++i)
      std::printf("|%s", std::string(widths[i] + 2, '-').c_str());
    if (r == 0) std::printf("|\n");
  }
  std::fflush(stdout);
}

}  // namespace entropyserve::bench
