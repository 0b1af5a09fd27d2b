// What `bench` has measured, without a server or a clock: records, percentiles, reports and the
// server's counters by exact values.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "client/bench/page.h"
#include "client/bench/record.h"
#include "client/bench/report.h"
#include "client/bench/scrape.h"
#include "client/bench/summary.h"
#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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

}  // namespace
}  // namespace entropyserve
