#include "client/bench/plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using nlohmann::json;

constexpr int64_t kMaxTurns = 4096;

// A number >= `least` under `key`, or an error.
absl::StatusOr<double> Field(const json& line, const char* key, double least) {
  const auto found = line.find(key);
  if (found == line.end() || !found->is_number() || !(found->get<double>() >= least) ||
      found->get<double>() > 1e15) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", key, "\": expected a number of at least ", least));
  }
  return found->get<double>();
}

absl::StatusOr<TraceLine> ParseLine(std::string_view text) {
  const json line = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!line.is_object()) return absl::InvalidArgumentError("expected a JSON object");
  const auto timestamp = Field(line, "timestamp", 0);
  const auto input = Field(line, "input_length", 1);
  const auto output = Field(line, "output_length", 0);
  for (const auto* field : {&timestamp, &input, &output}) {
    if (!field->ok()) return field->status();
  }
  TraceLine result{.at_seconds = *timestamp * 1e-3,
                   .input_tokens = static_cast<int64_t>(*input),
                   .output_tokens = static_cast<int64_t>(*output)};
  const auto session = line.find("session");
  if (session == line.end() || session->is_null()) return result;
  if (session->is_object() || session->is_array()) {
    return absl::InvalidArgumentError("\"session\": expected a string or a number");
  }
  result.session = session->is_string() ? session->get<std::string>() : session->dump();
  return result;
}

// When the k-th event of a unit-rate process falls, at a rate that grows from `from` to `to` within
// `period` and stays there: the inverse of the integrated rate.
double InvertRate(double unit, double from, double to, double period) {
  if (unit == 0) return 0;
  const double in_ramp = 0.5 * (from + to) * period;
  if (unit >= in_ramp) return period + (unit - in_ramp) / to;
  const double slope = (to - from) / period;
  if (slope == 0) return unit / from;
  // from·t + slope·t²/2 = unit, in the form that is stable for small slopes.
  return 2 * unit / (from + std::sqrt(std::max(0.0, from * from + 2 * slope * unit)));
}

}  // namespace

absl::StatusOr<std::vector<TraceLine>> ParseTrace(std::string_view text) {
  std::vector<TraceLine> lines;
  int number = 0;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    const absl::string_view stripped = absl::StripAsciiWhitespace(part);
    if (stripped.empty()) continue;
    absl::StatusOr<TraceLine> line = ParseLine({stripped.data(), stripped.size()});
    if (!line.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, ": ", line.status().message()));
    }
    lines.push_back(*std::move(line));
  }
  if (lines.empty()) return absl::InvalidArgumentError("line 1: the trace is empty");
  std::stable_sort(lines.begin(), lines.end(), [](const TraceLine& a, const TraceLine& b) {
    return a.at_seconds < b.at_seconds;
  });
  const double first = lines[0].at_seconds;
  for (TraceLine& line : lines) line.at_seconds -= first;
  return lines;
}

Plan::Plan(WorkloadSpec spec) : spec_(std::move(spec)) {
  switch (spec_.mode) {
    case LoadMode::kOpen:
      PlanArrivals();
      break;
    case LoadMode::kTrace:
      PlanTrace();
      break;
    case LoadMode::kClosed:
      size_ = spec_.conversations * spec_.copies;
      break;
  }
}

void Plan::PlanArrivals() {
  const double to = spec_.level;
  const double from = spec_.ramp_from < 0 ? to : spec_.ramp_from;
  const int64_t count = spec_.conversations * spec_.copies;
  // A ramp ends with the run: at its duration, or when the expected number has arrived.
  const double period = std::isfinite(spec_.duration_seconds)
                            ? spec_.duration_seconds
                            : 2 * static_cast<double>(count) / (from + to);
  Random random(spec_.seed, RandomStream::kArrivals, 0);
  double unit = 0;
  for (int64_t i = 0; i < count; ++i) {
    unit = spec_.poisson ? unit + random.Exponential() : static_cast<double>(i);
    const double at = std::isinf(to) ? 0 : InvertRate(unit, from, to, period);
    if (at >= spec_.duration_seconds) break;
    starts_.push_back(at);
  }
  size_ = static_cast<int64_t>(starts_.size());
}

void Plan::PlanTrace() {
  for (TraceLine& line : spec_.trace) line.at_seconds /= spec_.level;
  std::map<std::string, size_t> sessions;
  for (size_t i = 0; i < spec_.trace.size(); ++i) {
    const TraceLine& line = spec_.trace[i];
    if (static_cast<int64_t>(i) >= spec_.conversations ||
        line.at_seconds >= spec_.duration_seconds) {
      break;
    }
    const auto [found, added] = sessions.try_emplace(line.session, trace_lines_.size());
    if (line.session.empty() || added) {
      trace_lines_.push_back({i});
    } else {
      trace_lines_[found->second].push_back(i);
    }
  }
  size_ = static_cast<int64_t>(trace_lines_.size());
}

PlannedTurn Plan::MakeTurn(int64_t index, int turn) const {
  const auto key = static_cast<uint64_t>(index * kMaxTurns + turn);
  Random lengths(spec_.seed, RandomStream::kLengths, key);
  Random think(spec_.seed, RandomStream::kThink, key);
  Random behaviour(spec_.seed, RandomStream::kBehaviour, key);
  PlannedTurn result;
  if (spec_.mode == LoadMode::kTrace) {
    const TraceLine& line = spec_.trace[trace_lines_[index][turn]];
    result.input_tokens = line.input_tokens;
    result.output_tokens = line.output_tokens;
    result.not_before_seconds = line.at_seconds;
  } else {
    result.input_tokens = spec_.input_tokens.SampleCount(&lengths, 1);
    result.output_tokens = spec_.output_tokens.SampleCount(&lengths, 1);
    if (turn > 0) result.think_seconds = spec_.think_seconds.Sample(&think);
  }
  const bool cancelled = behaviour.Uniform() < spec_.cancel_share;
  result.slow = behaviour.Uniform() < spec_.slow_share;
  // Anywhere: 0 is while the prompt is read.
  const auto place = static_cast<int64_t>(
      behaviour.Below(static_cast<uint64_t>(std::max<int64_t>(1, result.output_tokens))));
  if (cancelled) result.cancel_after_tokens = place;
  result.seed = Random(spec_.seed, RandomStream::kSampling, key).Bits();
  return result;
}

Conversation Plan::Get(int64_t index) const {
  Conversation result;
  result.index = index;
  const int64_t original = index / spec_.copies;
  // Which copy goes first changes from one to the next, so that none is always ahead.
  result.copy = static_cast<int>((original + index % spec_.copies) % spec_.copies);
  int64_t turns = 1;
  if (spec_.mode == LoadMode::kTrace) {
    turns = static_cast<int64_t>(trace_lines_[original].size());
  } else {
    Random random(spec_.seed, RandomStream::kThink, ~static_cast<uint64_t>(original));
    turns = spec_.turns.SampleCount(&random, 1);
  }
  turns = std::min(turns, kMaxTurns);
  result.session = turns > 1;
  // Of sessions the server adds the pending token and the template's end of turn: a few a turn.
  constexpr int64_t kSpare = 16;
  int64_t left = spec_.context_tokens;
  for (int turn = 0; turn < turns; ++turn) {
    PlannedTurn next = MakeTurn(original, turn);
    const PlannedTurn drawn = next;
    if (turns > 1) left -= kSpare;
    next.input_tokens = std::min(next.input_tokens, left - 1);
    if (next.input_tokens < 1 && turn > 0) break;
    next.input_tokens = std::max<int64_t>(1, next.input_tokens);
    next.output_tokens = std::clamp<int64_t>(left - next.input_tokens, 0, next.output_tokens);
    next.cut = next.input_tokens < drawn.input_tokens || next.output_tokens < drawn.output_tokens;
    left -= next.input_tokens + next.output_tokens;
    result.turns.push_back(next);
  }
  if (spec_.mode == LoadMode::kOpen) result.start_seconds = starts_[index];
  if (spec_.mode == LoadMode::kTrace) result.start_seconds = result.turns[0].not_before_seconds;
  return result;
}

}  // namespace entropyserve
