// The measuring half of `bench`, without a server or a clock: schedules, lengths, traces, records,
// percentiles and reports by exact values.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "client/bench/flags.h"
#include "client/bench/page.h"
#include "client/bench/plan.h"
#include "client/bench/prompts.h"
#include "client/bench/record.h"
#include "client/bench/report.h"
#include "client/bench/scrape.h"
#include "client/bench/summary.h"
#include "client/session_table.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using nlohmann::json;
using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- Random numbers and distributions ---

TEST(BenchRandomTest, IsTheSameEverywhere) {
  // SplitMix64's own sequence, keyed; computed with an independent script from its definition.
  Random random(1, RandomStream::kPrompt, 2);
  EXPECT_EQ(random.Bits(), 564320605974267171u);
  EXPECT_EQ(random.Bits(), 15506161704513123826u);
  EXPECT_NE(Random(1, RandomStream::kPrompt, 3).Bits(), Random(1, RandomStream::kPrompt, 2).Bits());
  EXPECT_NE(Random(1, RandomStream::kThink, 2).Bits(), Random(1, RandomStream::kPrompt, 2).Bits());
}

TEST(BenchRandomTest, HasTheStatedMoments) {
  Random random(7, RandomStream::kLengths, 0);
  double uniform = 0, exponential = 0, normal = 0, square = 0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    uniform += random.Uniform() / kDraws;
    exponential += random.Exponential() / kDraws;
    const double value = random.Normal();
    normal += value / kDraws;
    square += value * value / kDraws;
  }
  // Five deviations of each mean.
  EXPECT_NEAR(uniform, 0.5, 0.005);
  EXPECT_NEAR(exponential, 1, 0.016);
  EXPECT_NEAR(normal, 0, 0.016);
  EXPECT_NEAR(square, 1, 0.023);
}

std::set<int64_t> Draws(const char* text, int count = 300) {
  const auto distribution = Distribution::Parse(text);
  EXPECT_TRUE(distribution.ok()) << text;
  Random random(3, RandomStream::kLengths, 0);
  std::set<int64_t> values;
  for (int i = 0; i < count; ++i) values.insert(distribution->SampleCount(&random, 1));
  return values;
}

TEST(BenchDistributionTest, FormsMeanWhatTheySay) {
  EXPECT_THAT(Draws("512"), ElementsAre(512));
  EXPECT_THAT(Draws("fixed:7"), ElementsAre(7));
  EXPECT_THAT(Draws("uniform:3-5"), ElementsAre(3, 4, 5));
  EXPECT_THAT(Draws("list:9,1,4"), ElementsAre(1, 4, 9));
  EXPECT_THAT(Draws("normal:100,0"), ElementsAre(100));
  EXPECT_THAT(Draws("lognormal:100,0"), ElementsAre(100));
  EXPECT_EQ(*Draws("normal:0,10").begin(), 1);  // never below the least
  const auto lognormal = Draws("lognormal:100,1", 2000);
  EXPECT_LT(*lognormal.begin(), 20);
  EXPECT_GT(*lognormal.rbegin(), 500);
}

TEST(BenchDistributionTest, WrongFormsAreRefused) {
  for (const char* bad :
       {"", "x", "fixed:", "fixed:1,2", "uniform:5", "uniform:5-3", "normal:1", "normal:-1,2",
        "list:", "list:1,-2", "zipf:2", "nan", "inf", "uniform:1-2-3"}) {
    EXPECT_EQ(Distribution::Parse(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

// --- Plans ---

std::vector<double> Starts(const WorkloadSpec& spec) {
  const Plan plan(spec);
  std::vector<double> starts;
  for (int64_t i = 0; i < plan.size(); ++i) starts.push_back(plan.Get(i).start_seconds);
  return starts;
}

TEST(BenchPlanTest, ConstantArrivals) {
  WorkloadSpec spec{.level = 4, .poisson = false, .conversations = 3};
  EXPECT_THAT(Starts(spec), ElementsAre(0, 0.25, 0.5));
  spec.level = kInfinity;
  EXPECT_THAT(Starts(spec), ElementsAre(0, 0, 0));
  spec.level = 4;
  spec.conversations = 1000;
  spec.duration_seconds = 0.6;
  EXPECT_THAT(Starts(spec), ElementsAre(0, 0.25, 0.5));
}

TEST(BenchPlanTest, PoissonArrivalsKeepTheRateAndTheSeed) {
  WorkloadSpec spec{.level = 10, .conversations = 20000, .seed = 5};
  const std::vector<double> starts = Starts(spec);
  EXPECT_NEAR(starts.back(), 2000, 5 * std::sqrt(20000) / 10);
  EXPECT_TRUE(std::is_sorted(starts.begin(), starts.end()));
  // Of exponential gaps, 1 - 1/e are shorter than the mean.
  int shorter = 0;
  for (size_t i = 1; i < starts.size(); ++i) shorter += starts[i] - starts[i - 1] < 0.1;
  EXPECT_NEAR(shorter / 20000.0, 1 - std::exp(-1), 0.017);
  EXPECT_EQ(Starts(spec), starts);
  spec.seed = 6;
  EXPECT_NE(Starts(spec), starts);
}

TEST(BenchPlanTest, RampsGrowLinearly) {
  // From 0 to 4 per second over 2 · 8 / 4 = 4 seconds: t²/2 have arrived at t.
  WorkloadSpec spec{.level = 4, .ramp_from = 0, .poisson = false, .conversations = 8};
  std::vector<double> expected;
  for (int i = 0; i < 8; ++i) expected.push_back(std::sqrt(2.0 * i));
  const std::vector<double> starts = Starts(spec);
  ASSERT_EQ(starts.size(), 8u);
  for (size_t i = 0; i < 8; ++i) EXPECT_NEAR(starts[i], expected[i], 1e-12) << i;
  // Over a stated time: from 1 to 3 per second in 10 s, 20 have arrived, at the rate of their
  // place.
  spec = {
      .level = 3, .ramp_from = 1, .poisson = false, .conversations = 1000, .duration_seconds = 10};
  const std::vector<double> timed = Starts(spec);
  ASSERT_EQ(timed.size(), 20u);
  for (size_t i = 0; i < timed.size(); ++i) {
    EXPECT_NEAR(timed[i] + 0.1 * timed[i] * timed[i], static_cast<double>(i), 1e-9);
  }
  // A falling ramp is one too.
  spec = {.level = 1, .ramp_from = 3, .poisson = false, .conversations = 20};
  EXPECT_NEAR(Starts(spec)[19], (3 - std::sqrt(9 - 0.4 * 19)) / 0.2, 1e-9);
}

TEST(BenchPlanTest, RequestsAreAFunctionOfTheSeedAndTheirIndex) {
  WorkloadSpec spec{.mode = LoadMode::kClosed, .conversations = 50};
  spec.input_tokens = *Distribution::Parse("uniform:1-1000");
  spec.turns = *Distribution::Parse("uniform:1-3");
  const Plan forward(spec), backward(spec);
  std::set<uint64_t> seeds;
  std::set<int64_t> inputs;
  size_t turns = 0;
  for (int64_t i = 0; i < 50; ++i) {
    const Conversation a = forward.Get(i), b = backward.Get(i);
    ASSERT_EQ(a.turns.size(), b.turns.size());
    EXPECT_EQ(a.session, a.turns.size() > 1);
    for (size_t t = 0; t < a.turns.size(); ++t) {
      EXPECT_EQ(a.turns[t].input_tokens, b.turns[t].input_tokens);
      EXPECT_EQ(a.turns[t].seed, b.turns[t].seed);
      seeds.insert(a.turns[t].seed);
      inputs.insert(a.turns[t].input_tokens);
      ++turns;
    }
  }
  EXPECT_EQ(seeds.size(), turns);  // no prompt twice
  EXPECT_GT(inputs.size(), 40u);
}

TEST(BenchPlanTest, CopiesShareEverythingButTheirTurnToBeFirst) {
  WorkloadSpec spec{.level = 1, .poisson = false, .conversations = 4, .copies = 3};
  spec.input_tokens = *Distribution::Parse("uniform:1-1000000");
  const Plan plan(spec);
  ASSERT_EQ(plan.size(), 12);
  std::vector<int> firsts;
  for (int64_t i = 0; i < 12; i += 3) {
    std::set<int> copies;
    std::set<int64_t> inputs;
    for (int64_t k = i; k < i + 3; ++k) {
      copies.insert(plan.Get(k).copy);
      inputs.insert(plan.Get(k).turns[0].input_tokens);
      EXPECT_EQ(plan.Get(k).start_seconds, static_cast<double>(k));
    }
    EXPECT_THAT(copies, ElementsAre(0, 1, 2));
    EXPECT_EQ(inputs.size(), 1u);
    firsts.push_back(plan.Get(i).copy);
  }
  EXPECT_THAT(firsts, ElementsAre(0, 1, 2, 0));
}

TEST(BenchPlanTest, SharesAndCutsHold) {
  WorkloadSpec spec{.mode = LoadMode::kClosed, .conversations = 4000, .context_tokens = 600};
  spec.cancel_share = 0.25;
  spec.slow_share = 0.5;
  spec.input_tokens = *Distribution::Parse("list:100,550,5000");
  const Plan plan(spec);
  int cancelled = 0, slow = 0, cut = 0;
  for (int64_t i = 0; i < plan.size(); ++i) {
    const PlannedTurn turn = plan.Get(i).turns[0];
    cancelled += turn.cancel_after_tokens >= 0;
    EXPECT_LT(turn.cancel_after_tokens, 128);
    slow += turn.slow;
    cut += turn.cut;
    EXPECT_LE(turn.input_tokens + turn.output_tokens, 600);
    EXPECT_EQ(turn.cut, turn.input_tokens != 100) << turn.input_tokens;
  }
  EXPECT_NEAR(cancelled, 1000, 140);
  EXPECT_NEAR(slow, 2000, 160);
  EXPECT_GT(cut, 2000);
}

TEST(BenchPlanTest, TracesAreReplayedBySession) {
  const auto trace = ParseTrace(
      "{\"timestamp\": 3000, \"input_length\": 30, \"output_length\": 3, \"session\": \"a\"}\n"
      "\n"
      "{\"timestamp\": 1000, \"input_length\": 10, \"output_length\": 1, \"session\": \"a\", "
      "\"hash_ids\": [1]}\n"
      "{\"timestamp\": 2000, \"input_length\": 20, \"output_length\": 2}\r\n"
      "{\"timestamp\": 2500, \"input_length\": 25, \"output_length\": 2, \"session\": 7}\n");
  ASSERT_TRUE(trace.ok()) << trace.status();
  WorkloadSpec spec{.mode = LoadMode::kTrace, .level = 2, .conversations = 100, .trace = *trace};
  const Plan plan(spec);
  ASSERT_EQ(plan.size(), 3);
  const Conversation a = plan.Get(0);
  EXPECT_EQ(a.start_seconds, 0);
  ASSERT_EQ(a.turns.size(), 2u);
  EXPECT_TRUE(a.session);
  EXPECT_EQ(a.turns[1].input_tokens, 30);
  EXPECT_EQ(a.turns[1].output_tokens, 3);
  EXPECT_EQ(a.turns[1].not_before_seconds, 1);  // two seconds after the first, at twice the speed
  EXPECT_EQ(plan.Get(1).start_seconds, 0.5);
  EXPECT_FALSE(plan.Get(1).session);
  EXPECT_EQ(plan.Get(2).turns[0].input_tokens, 25);
}

TEST(BenchPlanTest, WrongTracesNameTheLine) {
  const std::string good = "{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1}\n";
  for (const auto& [line, part] :
       {std::pair("[1]", "line 2: expected a JSON object"), std::pair("{", "line 2: expected"),
        std::pair("{\"timestamp\": -1, \"input_length\": 1, \"output_length\": 1}",
                  "\"timestamp\""),
        std::pair("{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 1}",
                  "\"input_length\""),
        std::pair("{\"timestamp\": 0, \"input_length\": 1}", "\"output_length\""),
        std::pair("{\"timestamp\": 0, \"input_length\": 1, \"output_length\": 1, \"session\": []}",
                  "\"session\"")}) {
    const auto trace = ParseTrace(good + line);
    EXPECT_EQ(trace.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(trace.status().message()), HasSubstr(part));
  }
  EXPECT_FALSE(ParseTrace("\n\n").ok());
}

// --- Prompts ---

TEST(BenchPromptsTest, RandomPromptsComeFromTheVocabularyAndDoNotRepeat) {
  const PromptSource source = PromptSource::Random({5, 6, 9});
  const std::vector<int32_t> prompt = source.Make(1, 500);
  EXPECT_EQ(prompt.size(), 500u);
  EXPECT_THAT(std::set<int32_t>(prompt.begin(), prompt.end()), ElementsAre(5, 6, 9));
  EXPECT_EQ(source.Make(1, 500), prompt);
  EXPECT_NE(source.Make(2, 500), prompt);
}

TEST(BenchPromptsTest, WindowsOfATextWrapAround) {
  const PromptSource source = PromptSource::Windows({0, 1, 2, 3, 4});
  std::set<int32_t> firsts;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const std::vector<int32_t> prompt = source.Make(seed, 12);
    for (size_t i = 1; i < prompt.size(); ++i) EXPECT_EQ(prompt[i], (prompt[i - 1] + 1) % 5);
    firsts.insert(prompt[0]);
  }
  EXPECT_EQ(firsts.size(), 5u);
}

// --- Records and summaries ---

v1::GenerateEvent TokensEvent(int count) {
  v1::GenerateEvent event;
  event.mutable_tokens()->set_text("x");
  for (int i = 0; i < count; ++i) event.mutable_tokens()->add_ids(i);
  return event;
}

// Sent `late` after it should have been, first token after `ttft`, then one every `gap`.
RequestRecord Record(double intended, double late, double ttft, double gap, int tokens) {
  RequestRecorder recorder({.input_tokens = 100, .intended = intended});
  double now = intended + late;
  recorder.OnSent(now);
  now += ttft;
  for (int i = 0; i < tokens; ++i, now += gap) recorder.OnEvent(TokensEvent(1), now);
  v1::GenerateEvent finished;
  finished.mutable_finished()->mutable_receipt()->set_attention_flops_ratio(0.25);
  finished.mutable_finished()->mutable_receipt()->set_queue_seconds(ttft / 2);
  recorder.OnEvent(finished, now);
  recorder.OnEnd(absl::OkStatus(), false, false, now);
  return recorder.Take();
}

TEST(BenchRecorderTest, TimesCountFromTheirEvents) {
  RequestRecorder recorder({.planned_output_tokens = 9, .intended = 1});
  recorder.OnSent(1.5);
  v1::GenerateEvent accepted;
  accepted.mutable_accepted();
  recorder.OnEvent(accepted, 2);
  recorder.OnEvent(TokensEvent(1), 3);
  recorder.OnEvent(TokensEvent(0), 3.25);  // text only: no token came
  recorder.OnEvent(TokensEvent(3), 4);     // three joined by the server
  recorder.OnEvent(TokensEvent(1), 4.5);
  recorder.OnEnd(absl::OkStatus(), false, false, 5);
  const RequestRecord record = recorder.Take();
  EXPECT_EQ(record.QueueSeconds(), 0.5);
  EXPECT_EQ(record.Ttft(), 1.5);
  EXPECT_EQ(record.E2e(), 3.5);
  EXPECT_EQ(record.output_tokens, 5);
  EXPECT_EQ(record.Tpot(), 0.375);
  EXPECT_THAT(record.gaps, ElementsAre(1, 0.5));
  EXPECT_TRUE(record.IsSample());
  EXPECT_FALSE(record.has_receipt);
}

TEST(BenchRecorderTest, EndsAreToldApart) {
  const auto outcome = [](absl::Status status, bool cancelled, bool stopped) {
    RequestRecorder recorder({});
    recorder.OnEnd(status, cancelled, stopped, 1);
    return recorder.record().outcome;
  };
  const absl::Status cancelled = absl::CancelledError("");
  EXPECT_EQ(outcome(absl::OkStatus(), false, false), Outcome::kCompleted);
  EXPECT_EQ(outcome(cancelled, true, false), Outcome::kCancelled);
  EXPECT_EQ(outcome(absl::OkStatus(), true, false), Outcome::kCancelled);  // it was faster
  EXPECT_EQ(outcome(absl::InternalError(""), true, false), Outcome::kFailed);
  EXPECT_EQ(outcome(cancelled, false, true), Outcome::kUnfinished);
  EXPECT_EQ(outcome(cancelled, false, false), Outcome::kFailed);
  EXPECT_EQ(outcome(absl::UnavailableError(""), false, true), Outcome::kFailed);
}

TEST(BenchSummaryTest, PercentilesAreNumpys) {
  // numpy.percentile([1, 2, 3, 4, 10], [50, 90, 95, 99]), numpy.std.
  const Stat stat({10, 1, 3, 2, 4});
  EXPECT_EQ(stat.n(), 5);
  EXPECT_DOUBLE_EQ(stat.mean, 4);
  EXPECT_DOUBLE_EQ(stat.median, 3);
  EXPECT_DOUBLE_EQ(stat.p90, 7.6);
  EXPECT_DOUBLE_EQ(stat.p95, 8.8);
  EXPECT_DOUBLE_EQ(stat.p99, 9.76);
  EXPECT_DOUBLE_EQ(stat.deviation, std::sqrt(10));
  EXPECT_EQ(Stat({7}).p99, 7);
  EXPECT_EQ(Stat(std::vector<double>()).n(), 0);
}

TEST(BenchSummaryTest, CountsAndThroughput) {
  std::vector<RequestRecord> records;
  records.push_back(Record(0, 0, 1, 0.5, 3));     // ends at 2.5
  records.push_back(Record(0, 0.25, 2, 0.5, 3));  // ends at 3.75
  records.push_back(Record(2, 0, 1, 0, 1));       // one token: no time per token
  records.push_back(Record(0, 0, 50, 9, 4));
  records.back().slow = true;
  records.push_back(Record(0, 0, 1, 1, 2));
  records.back().outcome = Outcome::kCancelled;
  records.push_back(Record(1, 0, 1, 1, 1));
  records.back().outcome = Outcome::kFailed;
  records.back().status = absl::ResourceExhaustedError("queue full");
  records.push_back(records.back());
  const Summary s = Summarize(records, 10, {});
  EXPECT_EQ(s.completed, 4);
  EXPECT_EQ(s.slow, 1);
  EXPECT_EQ(s.cancelled, 1);
  EXPECT_EQ(s.failed, 2);
  EXPECT_THAT(s.errors, ElementsAre(Pair("RESOURCE_EXHAUSTED", 2)));
  EXPECT_EQ(s.error_examples.at("RESOURCE_EXHAUSTED"), "queue full");
  EXPECT_EQ(s.input_tokens, 400);
  EXPECT_EQ(s.output_tokens, 11);
  EXPECT_EQ(s.partial_output_tokens, 4);
  EXPECT_DOUBLE_EQ(s.RequestThroughput(), 0.4);
  EXPECT_DOUBLE_EQ(s.OutputThroughput(), 1.1);
  EXPECT_DOUBLE_EQ(s.TotalThroughput(), 41.1);
  EXPECT_THAT(s.ttft.sorted, ElementsAre(1, 1, 2));
  EXPECT_THAT(s.intended_ttft.sorted, ElementsAre(1, 1, 2.25));
  EXPECT_THAT(s.tpot.sorted, ElementsAre(0.5, 0.5));
  EXPECT_THAT(s.itl.sorted, ElementsAre(0.5, 0.5, 0.5, 0.5));
  EXPECT_THAT(s.e2el.sorted, ElementsAre(1, 2.5, 3.5));
  EXPECT_EQ(s.client_queue.n(), 7);
  EXPECT_EQ(s.client_queue.sorted.back(), 0.25);
  EXPECT_EQ(s.attention_share.n(), 4);
  EXPECT_DOUBLE_EQ(s.attention_share.mean, 0.25);
  EXPECT_EQ(s.kv_share.n(), 0);  // no receipt spoke of a cache
  EXPECT_EQ(s.session.n(), 0);
  EXPECT_EQ(s.max_concurrent, 7);  // all of them at 2
}

TEST(BenchSummaryTest, GoodputCountsFromTheIntendedTime) {
  const auto slo = ParseSlo("ttft:1500,tpot:500");
  ASSERT_TRUE(slo.ok());
  EXPECT_EQ(FormatSlo(*slo), "ttft 1500 ms, tpot 500 ms");
  const std::vector<RequestRecord> records = {
      Record(0, 0, 1, 0.5, 3),     // good
      Record(0, 0.75, 1, 0.5, 3),  // in time from when it was sent, late from when it was due
      Record(0, 0, 1, 0.75, 3),    // slow tokens
      Record(0, 0, 1.5, 0, 1),     // good: one token, on the bound
  };
  const Summary s = Summarize(records, 4, *slo);
  EXPECT_EQ(s.good, 2);
  EXPECT_DOUBLE_EQ(s.Goodput(), 0.5);
  EXPECT_EQ(Summarize(records, 4, *ParseSlo("e2el:2500")).good, 2);
  for (const char* bad : {"", "ttft", "ttft:", "ttft:-1", "ttft:1,ttft:2", "itl:5", "ttft:nan"}) {
    EXPECT_FALSE(ParseSlo(bad).ok()) << bad;
  }
}

// --- Reports ---

BenchReport Report() {
  BenchReport report;
  report.command = "bench --x=\"</script>\"";
  report.model = "m";
  report.slo.ttft = 1.5;
  for (const char* policy : {"full", "entropy"}) {
    BenchRow row;
    row.level = 2;
    row.policy = policy;
    row.conversations = 3;
    row.records = {Record(0, 0, 1, 0.5, 3), Record(0, 0.25, 2, 0.5, 3), Record(0, 0, 1, 0.5, 2)};
    row.records[2].outcome = Outcome::kFailed;
    row.records[2].status = absl::UnavailableError("gone, \"quite\"");
    row.summary = Summarize(row.records, 4, report.slo);
    row.server_counters["steps_total"] = 7;
    report.rows.push_back(row);
  }
  return report;
}

TEST(BenchReportTest, JsonHasTheKeysOfVllmsBench) {
  const json report = json::parse(ReportJson(Report(), true));
  const json& row = report["rows"][0];
  EXPECT_EQ(row["policy"], "full");
  EXPECT_EQ(row["num_prompts"], 3);
  EXPECT_EQ(row["request_rate"], 2.0);
  EXPECT_EQ(row["duration"], 4.0);
  EXPECT_EQ(row["completed"], 2);
  EXPECT_EQ(row["failed"], 1);
  EXPECT_EQ(row["total_input_tokens"], 200);
  EXPECT_EQ(row["total_output_tokens"], 6);
  EXPECT_EQ(row["request_throughput"], 0.5);
  EXPECT_EQ(row["request_goodput"], 0.25);
  EXPECT_EQ(row["output_throughput"], 1.5);
  EXPECT_EQ(row["total_token_throughput"], 51.5);
  EXPECT_EQ(row["mean_ttft_ms"], 1500.0);
  EXPECT_EQ(row["median_ttft_ms"], 1500.0);
  EXPECT_EQ(row["std_ttft_ms"], 500.0);
  EXPECT_EQ(row["p99_ttft_ms"], 1990.0);
  EXPECT_EQ(row["n_ttft"], 2);
  EXPECT_EQ(row["mean_intended_ttft_ms"], 1625.0);
  for (const char* latency : {"ttft", "tpot", "itl", "e2el"}) {
    for (const char* figure : {"mean", "median", "std", "p90", "p95", "p99"}) {
      EXPECT_TRUE(row[std::string(figure) + "_" + latency + "_ms"].is_number())
          << figure << latency;
    }
  }
  EXPECT_TRUE(row["mean_session_ms"].is_null());  // of no samples there is no mean
  EXPECT_EQ(row["errors_by_code"], json({{"UNAVAILABLE", 1}}));
  EXPECT_EQ(row["server_counters"]["steps_total"], 7.0);
  EXPECT_EQ(row["input_lens"], json({100, 100, 100}));
  EXPECT_EQ(row["output_lens"], json({3, 3, 2}));
  EXPECT_EQ(row["ttfts"], json({1.0, 2.0, 1.0}));
  EXPECT_EQ(row["itls"][0], json({0.5, 0.5}));
  EXPECT_EQ(row["errors"][0], "");
  EXPECT_FALSE(json::parse(ReportJson(Report(), false))["rows"][0].contains("ttfts"));
}

TEST(BenchReportTest, AnInfiniteRateIsWrittenAsVllmWritesIt) {
  BenchReport report = Report();
  report.rows[0].level = kInfinity;
  EXPECT_EQ(json::parse(ReportJson(report, false))["rows"][0]["request_rate"], "inf");
}

TEST(BenchReportTest, CsvHasOneLinePerRowAndPerRequest) {
  const std::string csv = ReportCsv(Report());
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 3);
  EXPECT_EQ(csv.rfind("mode,policy,num_prompts,request_rate", 0), 0u);
  EXPECT_THAT(csv, HasSubstr("\nopen,entropy,3,2.0,"));
  const std::string requests = RequestsCsv(Report());
  EXPECT_EQ(std::count(requests.begin(), requests.end(), '\n'), 7);
  EXPECT_THAT(requests, HasSubstr(",failed,UNAVAILABLE,"));
  EXPECT_THAT(requests, HasSubstr(",\"gone, \"\"quite\"\"\"\n"));
}

TEST(BenchReportTest, TextSaysItsSamples) {
  const BenchReport report = Report();
  const std::string text = FormatRow(report.rows[0], report.slo);
  EXPECT_THAT(text, HasSubstr("rate 2/s, policy full"));
  EXPECT_THAT(text, HasSubstr("0.250 requests/s: 1 of 2 within ttft 1500 ms"));
  EXPECT_THAT(text, HasSubstr("attention 25.0 % of dense (n 2)"));
  EXPECT_THAT(text, HasSubstr("UNAVAILABLE 1 times, such as: gone"));
  EXPECT_THAT(FormatSweep(report.rows), HasSubstr("entropy"));
}

TEST(BenchReportTest, ThePageHoldsTheDataAndFetchesNothing) {
  const std::string page = BenchPage(Report());
  EXPECT_THAT(page, HasSubstr("default-src 'none'"));
  EXPECT_THAT(page, HasSubstr("\\u003c/script>"));
  EXPECT_THAT(page, Not(HasSubstr("{{")));
  EXPECT_THAT(page, Not(HasSubstr("https://")));
  const std::string open = "<script type=\"application/json\" id=\"bench\">";
  const size_t begin = page.find(open) + open.size();
  const json data = json::parse(page.substr(begin, page.find("</script>", begin) - begin));
  ASSERT_EQ(data["rows"].size(), 2u);
  const json& ttft = data["rows"][0]["ttft"];
  EXPECT_EQ(ttft["n"], 2);
  ASSERT_EQ(ttft["curve"].size(), 201u);
  EXPECT_EQ(ttft["curve"][0], 1000.0);
  EXPECT_EQ(ttft["curve"][100], 1625.0);
  EXPECT_EQ(ttft["curve"][200], 2250.0);
}

// --- The server's counters ---

TEST(BenchScrapeTest, OnlyWhatGrowsIsCompared) {
  const auto before = ParseCounters(
      "# HELP a_total things\n# TYPE a_total counter\na_total{k=\"x y\"} 3\na_total{k=\"z\"} 5\n"
      "# TYPE g gauge\ng 9\n"
      "# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_sum 1.5\nh_count 2\n");
  EXPECT_THAT(before,
              UnorderedElementsAre(Pair("a_total{k=\"x y\"}", 3), Pair("a_total{k=\"z\"}", 5),
                                   Pair("h_sum", 1.5), Pair("h_count", 2)));
  auto after = before;
  after["a_total{k=\"x y\"}"] = 10;
  after["h_count"] = 1;  // the server was started anew
  after["new_total"] = 4;
  EXPECT_THAT(Growth(before, after),
              UnorderedElementsAre(Pair("a_total{k=\"x y\"}", 7), Pair("h_count", 1),
                                   Pair("new_total", 4)));
}

// --- Flags ---

TEST(BenchFlagsTest, SetTheWorkload) {
  BenchSettings settings;
  int exit_code = -1;
  ASSERT_TRUE(ParseBenchFlags({"--rate=1,inf", "--requests=7", "--input-len=list:3", "--slo=ttft:1",
                               "--policies=full,entropy/latent", "--prefill-base=600", "--seed=9"},
                              &settings, &exit_code));
  EXPECT_EQ(settings.workload.mode, LoadMode::kOpen);
  EXPECT_THAT(settings.levels, ElementsAre(1, kInfinity));
  EXPECT_EQ(settings.workload.conversations, 7);
  EXPECT_EQ(settings.workload.seed, 9u);
  EXPECT_EQ(settings.slo.ttft, 0.001);
  EXPECT_THAT(settings.policies, ElementsAre("full", "entropy/latent"));
  EXPECT_TRUE(settings.request.sampling().ignore_eos());
  const v1::Policy policy = WithPolicy(settings.request, "entropy/latent").policy();
  EXPECT_EQ(policy.prefill().preset(), "entropy");
  EXPECT_EQ(policy.prefill().base_tokens(), 600);
  EXPECT_EQ(policy.kv().preset(), "latent");
  EXPECT_FALSE(WithPolicy(settings.request, "default").policy().prefill().has_preset());
  EXPECT_FALSE(WithPolicy(settings.request, "/full").policy().prefill().has_preset());
}

TEST(BenchFlagsTest, ContradictionsAreWrongUsage) {
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{{"--rate=1", "--concurrency=2"},
                                             {"--rate=0"},
                                             {"--rate=x"},
                                             {"--concurrency=1.5"},
                                             {"--concurrency=inf"},
                                             {"--ramp-from=1"},
                                             {"--rate=inf", "--ramp-from=1"},
                                             {"--rate=1", "--ramp-from=-1"},
                                             {"--requests=0"},
                                             {"--cancel-share=2"},
                                             {"--replay=/no/such/file"},
                                             {"--rate=inf", "--duration-seconds=1"},
                                             {"--policies=,"},
                                             {"--save-detailed"},
                                             {"--input-len=-5"},
                                             {"--duration-seconds=nan"}}) {
    BenchSettings settings;
    int exit_code = -1;
    EXPECT_FALSE(ParseBenchFlags(args, &settings, &exit_code)) << args[0];
    EXPECT_EQ(exit_code, kExitUsage) << args[0];
  }
}

// --- Sessions' table ---

TEST(SessionTableTest, AlignsAndNamesTiers) {
  v1::Session session;
  session.set_id(std::string(32, 'a'));
  session.set_turns(3);
  session.set_positions(9000);
  session.set_kept_tokens(2048);
  session.set_kv_bytes(3 << 20);
  session.set_tier(v1::Session::TIER_HOST);
  session.set_kv_policy("latent");
  session.set_busy(true);
  const std::string table = FormatSessions({session, v1::Session()});
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 3);
  EXPECT_THAT(table, HasSubstr(std::string(32, 'a') + "      3       9000       2048"));
  EXPECT_THAT(table, HasSubstr("3.0 MiB host"));
  EXPECT_THAT(table, HasSubstr("latent  busy"));
}

}  // namespace
}  // namespace entropyserve
