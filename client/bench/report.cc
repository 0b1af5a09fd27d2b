#include "client/bench/report.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "client/terminal.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using Json = nlohmann::ordered_json;

// The latencies in the order in which they are shown.
struct LatencyField {
  const char* key;  // mean_KEY_ms
  const char* title;
  Stat Summary::*stat;
};
constexpr LatencyField kLatencies[] = {
    {"ttft", "time to first token", &Summary::ttft},
    {"tpot", "time per output token", &Summary::tpot},
    {"itl", "inter-token latency", &Summary::itl},
    {"e2el", "end to end", &Summary::e2el},
    {"intended_ttft", "first token, as intended", &Summary::intended_ttft},
    {"intended_e2el", "end to end, as intended", &Summary::intended_e2el},
    {"client_queue", "queueing in the client", &Summary::client_queue},
    {"session", "making a session", &Summary::session},
};

const char* ModeName(LoadMode mode) {
  switch (mode) {
    case LoadMode::kOpen:
      return "open";
    case LoadMode::kClosed:
      return "closed";
    case LoadMode::kTrace:
      return "trace";
  }
  return "";
}

// JSON has no infinity; vLLM writes it as this string too.
Json Rate(double rate) { return std::isinf(rate) ? Json("inf") : Json(rate); }

void AddLatencies(const Summary& summary, Json* row) {
  for (const LatencyField& field : kLatencies) {
    const Stat& stat = summary.*field.stat;
    const std::pair<const char*, double> figures[] = {
        {"mean", stat.mean}, {"median", stat.median}, {"std", stat.deviation},
        {"p90", stat.p90},   {"p95", stat.p95},       {"p99", stat.p99}};
    for (const auto& [figure, seconds] : figures) {
      (*row)[absl::StrCat(figure, "_", field.key, "_ms")] =
          stat.n() == 0 ? Json() : Json(seconds * 1e3);
    }
    (*row)[absl::StrCat("n_", field.key)] = stat.n();
  }
}

void AddMean(const char* key, const Stat& stat, Json* row) {
  (*row)[absl::StrCat("mean_", key)] = stat.n() == 0 ? Json() : Json(stat.mean);
  (*row)[absl::StrCat("n_", key)] = stat.n();
}

// Everything but arrays and nested objects: what JSON and CSV share.
Json FlatRow(const BenchRow& row) {
  const Summary& s = row.summary;
  Json out;
  out["mode"] = ModeName(row.mode);
  out["policy"] = row.policy;
  out["num_prompts"] = row.conversations;
  out["request_rate"] = row.mode == LoadMode::kOpen ? Rate(row.level) : Json();
  out["ramp_up_start_rps"] = row.ramp_from >= 0 ? Json(row.ramp_from) : Json();
  out["max_concurrency"] =
      row.mode == LoadMode::kClosed ? Json(static_cast<int64_t>(row.level)) : Json();
  out["trace_speed"] = row.mode == LoadMode::kTrace ? Json(row.level) : Json();
  out["duration"] = s.seconds;
  out["completed"] = s.completed;
  out["failed"] = s.failed;
  out["cancelled"] = s.cancelled;
  out["unfinished"] = s.unfinished;
  out["turns_not_sent"] = s.turns_not_sent;
  out["slow_readers"] = s.slow;
  out["cut_to_context"] = s.cut;
  out["total_input_tokens"] = s.input_tokens;
  out["total_output_tokens"] = s.output_tokens;
  out["partial_output_tokens"] = s.partial_output_tokens;
  out["request_throughput"] = s.RequestThroughput();
  out["request_goodput"] = s.has_slo ? Json(s.Goodput()) : Json();
  out["good"] = s.has_slo ? Json(s.good) : Json();
  out["output_throughput"] = s.OutputThroughput();
  out["total_token_throughput"] = s.TotalThroughput();
  out["max_concurrent_requests"] = s.max_concurrent;
  AddLatencies(s, &out);
  AddMean("attention_share", s.attention_share, &out);
  AddMean("kv_ratio", s.kv_share, &out);
  AddMean("queue_seconds", s.queue, &out);
  AddMean("server_ttft_seconds", s.server_ttft, &out);
  return out;
}

void AddDetails(const BenchRow& row, Json* out) {
  for (const char* key : {"start_times", "input_lens", "output_lens", "ttfts", "itls", "errors"}) {
    (*out)[key] = Json::array();
  }
  for (const RequestRecord& record : row.records) {
    (*out)["start_times"].push_back(record.sent);
    (*out)["input_lens"].push_back(record.input_tokens);
    (*out)["output_lens"].push_back(record.output_tokens);
    (*out)["ttfts"].push_back(record.output_tokens > 0 ? record.Ttft() : 0);
    (*out)["itls"].push_back(record.gaps);
    (*out)["errors"].push_back(record.status.ok() ? "" : std::string(record.status.ToString()));
  }
}

std::string Csv(const Json& value) {
  if (value.is_null()) return "";
  const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
  if (text.find_first_of(",\"\n\r") == text.npos) return text;
  return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\"", "\"\""}}), "\"");
}

void AddCsvLine(const Json& row, bool heading, std::string* out) {
  std::vector<std::string> cells;
  for (const auto& [key, value] : row.items()) cells.push_back(heading ? key : Csv(value));
  absl::StrAppend(out, absl::StrJoin(cells, ","), "\n");
}

const char* OutcomeName(Outcome outcome) {
  switch (outcome) {
    case Outcome::kCompleted:
      return "completed";
    case Outcome::kFailed:
      return "failed";
    case Outcome::kCancelled:
      return "cancelled";
    case Outcome::kUnfinished:
      return "unfinished";
  }
  return "";
}

Json FlatRequest(const BenchRow& row, const RequestRecord& record) {
  const auto milliseconds = [](bool known, double seconds) {
    return known ? Json(seconds * 1e3) : Json();
  };
  const bool some = record.output_tokens > 0;
  Json out;
  out["level"] = Rate(row.level);
  out["policy"] = row.policy;
  out["conversation"] = record.conversation;
  out["turn"] = record.turn;
  out["outcome"] = OutcomeName(record.outcome);
  out["code"] = absl::StatusCodeToString(record.status.code());
  out["slow"] = record.slow;
  out["input_tokens"] = record.input_tokens;
  out["output_tokens"] = record.output_tokens;
  out["intended_s"] = record.intended;
  out["sent_s"] = record.sent;
  out["ended_s"] = record.ended;
  out["client_queue_ms"] = record.QueueSeconds() * 1e3;
  out["session_ms"] = record.session_seconds * 1e3;
  out["ttft_ms"] = milliseconds(some, record.Ttft());
  out["intended_ttft_ms"] = milliseconds(some, record.first_token - record.intended);
  out["tpot_ms"] = milliseconds(record.output_tokens > 1, record.Tpot());
  out["e2el_ms"] = record.E2e() * 1e3;
  const v1::Receipt& receipt = record.receipt;
  const bool known = record.has_receipt;
  out["attention_share"] = known ? Json(receipt.attention_flops_ratio()) : Json();
  out["kv_ratio"] = known ? Json(receipt.kv_bytes_ratio()) : Json();
  out["queue_ms"] = milliseconds(known, receipt.queue_seconds());
  out["prefill_ms"] = milliseconds(known, receipt.prefill_seconds());
  out["error"] = std::string(record.status.message());
  return out;
}

std::string LatencyLines(const Summary& summary) {
  std::string out = absl::StrFormat("  %-25s %7s %10s %10s %10s %10s %10s\n", "ms", "n", "mean",
                                    "median", "p90", "p95", "p99");
  for (const LatencyField& field : kLatencies) {
    const Stat& stat = summary.*field.stat;
    if (stat.n() == 0) continue;
    absl::StrAppendFormat(&out, "  %-25s %7d %10.2f %10.2f %10.2f %10.2f %10.2f\n", field.title,
                          stat.n(), stat.mean * 1e3, stat.median * 1e3, stat.p90 * 1e3,
                          stat.p95 * 1e3, stat.p99 * 1e3);
  }
  return out;
}

std::string RequestsLine(const Summary& s) {
  std::string out = absl::StrFormat("%d completed", s.completed);
  const std::pair<int64_t, const char*> others[] = {{s.failed, "failed"},
                                                    {s.cancelled, "cancelled as planned"},
                                                    {s.unfinished, "unfinished"},
                                                    {s.turns_not_sent, "turns not sent"},
                                                    {s.slow, "slow readers (no samples)"},
                                                    {s.cut, "cut to the context"}};
  for (const auto& [count, what] : others) {
    if (count > 0) absl::StrAppendFormat(&out, ", %d %s", count, what);
  }
  absl::StrAppendFormat(&out, "; %.2f s, at most %d at once", s.seconds, s.max_concurrent);
  return out;
}

std::string ReceiptsLine(const Summary& s) {
  std::vector<std::string> parts;
  const auto add = [&parts](const Stat& stat, const std::string& text) {
    if (stat.n() > 0) parts.push_back(absl::StrFormat("%s (n %d)", text, stat.n()));
  };
  add(s.attention_share,
      absl::StrFormat("attention %.1f %% of dense", s.attention_share.mean * 100));
  add(s.kv_share, absl::StrFormat("kv cache kept %.1f %%", s.kv_share.mean * 100));
  add(s.queue, absl::StrFormat("queue %.3f s", s.queue.mean));
  return absl::StrJoin(parts, ", ");
}

}  // namespace

std::string LevelName(const BenchRow& row) {
  switch (row.mode) {
    case LoadMode::kOpen:
      if (row.ramp_from >= 0) return absl::StrFormat("rate %g to %g/s", row.ramp_from, row.level);
      return std::isinf(row.level) ? "all at once" : absl::StrFormat("rate %g/s", row.level);
    case LoadMode::kClosed:
      return absl::StrFormat("%g at a time", row.level);
    case LoadMode::kTrace:
      return absl::StrFormat("trace at %gx", row.level);
  }
  return "";
}

std::string FormatRow(const BenchRow& row, const Slo& slo) {
  const Summary& s = row.summary;
  std::string out = absl::StrCat(LevelName(row), ", policy ", row.policy, "\n");
  const auto line = [&out](const char* name, const std::string& text) {
    if (!text.empty()) absl::StrAppendFormat(&out, "  %-12s %s\n", name, text);
  };
  line("requests", RequestsLine(s));
  line("tokens", absl::StrFormat("%d in, %d out of the completed (n %d)", s.input_tokens,
                                 s.output_tokens, s.completed));
  line("throughput",
       absl::StrFormat("%.3f requests/s, %.1f output tokens/s, %.1f tokens/s in all",
                       s.RequestThroughput(), s.OutputThroughput(), s.TotalThroughput()));
  if (s.has_slo) {
    line("goodput", absl::StrFormat("%.3f requests/s: %d of %d within %s", s.Goodput(), s.good,
                                    s.e2el.n(), FormatSlo(slo)));
  }
  line("receipts", ReceiptsLine(s));
  for (const auto& [code, count] : s.errors) {
    line("error",
         Printable(absl::StrCat(code, " ", count, " times, such as: ", s.error_examples.at(code))));
  }
  return out + LatencyLines(s);
}

std::string FormatSweep(const std::vector<BenchRow>& rows) {
  std::string out = absl::StrFormat("%-18s %-16s %6s %6s %9s %9s %9s %11s %11s %11s\n", "load",
                                    "policy", "n", "failed", "req/s", "good/s", "out tok/s",
                                    "p50 ttft ms", "p99 ttft ms", "p50 tpot ms");
  for (const BenchRow& row : rows) {
    const Summary& s = row.summary;
    absl::StrAppendFormat(&out, "%-18s %-16s %6d %6d %9.3f %9s %9.1f %11.1f %11.1f %11.2f\n",
                          LevelName(row), row.policy, s.completed, s.failed, s.RequestThroughput(),
                          s.has_slo ? absl::StrFormat("%.3f", s.Goodput()) : "-",
                          s.OutputThroughput(), s.intended_ttft.median * 1e3,
                          s.intended_ttft.p99 * 1e3, s.tpot.median * 1e3);
  }
  return out + "Times to first token count from the intended start.\n";
}

std::string ReportJson(const BenchReport& report, bool detailed) {
  Json out;
  out["date"] = report.date;
  out["command"] = report.command;
  out["server"] = {{"version", report.server_version}, {"backend", report.backend}};
  out["model_id"] = report.model;
  out["dtype"] = report.dtype;
  out["seed"] = report.seed;
  out["arrivals"] = report.poisson ? "poisson" : "constant";
  out["ended"] = report.ended.empty() ? Json() : Json(report.ended);
  out["slo_ms"] = Json::object();
  for (const auto& [name, value] :
       {std::pair("ttft", report.slo.ttft), {"tpot", report.slo.tpot}, {"e2el", report.slo.e2el}}) {
    if (value.has_value()) out["slo_ms"][name] = *value * 1e3;
  }
  out["rows"] = Json::array();
  for (const BenchRow& row : report.rows) {
    Json flat = FlatRow(row);
    flat["errors_by_code"] = row.summary.errors;
    if (!row.server_counters.empty()) {
      flat["server_counters"] = row.server_counters;
      flat["server_counters_shared"] = row.counters_shared;
    }
    if (detailed) AddDetails(row, &flat);
    out["rows"].push_back(std::move(flat));
  }
  return out.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string ReportCsv(const BenchReport& report) {
  std::string out;
  for (const BenchRow& row : report.rows) {
    Json flat = FlatRow(row);
    std::vector<std::string> errors;
    for (const auto& [code, count] : row.summary.errors) {
      errors.push_back(absl::StrCat(code, " ", count));
    }
    flat["errors_by_code"] = absl::StrJoin(errors, "; ");
    if (out.empty()) AddCsvLine(flat, true, &out);
    AddCsvLine(flat, false, &out);
  }
  return out;
}

std::string RequestsCsv(const BenchReport& report) {
  std::string out;
  for (const BenchRow& row : report.rows) {
    for (const RequestRecord& record : row.records) {
      const Json flat = FlatRequest(row, record);
      if (out.empty()) AddCsvLine(flat, true, &out);
      AddCsvLine(flat, false, &out);
    }
  }
  return out;
}

}  // namespace entropyserve
