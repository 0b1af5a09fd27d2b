// The evaluation on text: windows, what Compare is asked and what becomes of it, the sweep's
// policies, and the page of all results.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <set>

#include "absl/strings/str_cat.h"
#include "client/eval/compare_runner.h"
#include "client/eval/page.h"
#include "client/eval/plot.h"
#include "client/eval/report.h"
#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;

std::vector<int32_t> Range(int32_t from, int32_t n) {
  std::vector<int32_t> ids(n);
  std::iota(ids.begin(), ids.end(), from);
  return ids;
}

TEST(EvalWindowsTest, AreSpreadOverTheTextAndDoNotOverlap) {
  const auto windows = CutWindows(Range(0, 100), -1, 20, 3);
  ASSERT_TRUE(windows.ok());
  EXPECT_THAT(*windows, ElementsAre(Range(0, 20), Range(33, 20), Range(66, 20)));
  EXPECT_THAT(*CutWindows(Range(0, 100), -1, 40, 8), SizeIs(2));
  // BOS begins each of them, where the text has it.
  const auto with_bos = CutWindows(Range(7, 41), 7, 21, 2);
  ASSERT_TRUE(with_bos.ok());
  ASSERT_THAT(*with_bos, SizeIs(2));
  EXPECT_EQ((*with_bos)[1].size(), 21u);
  EXPECT_EQ((*with_bos)[1][0], 7);
  EXPECT_EQ((*with_bos)[1][1], 28);
  EXPECT_EQ(CutWindows(Range(0, 19), -1, 20, 3).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(EvalSweepTest, AlternativesAreWalked) {
  std::vector<std::string> names;
  const auto four =
      ParsePolicySpecs("entropy|coverage:correction=0|32+full,entropy:correction=0+full");
  ASSERT_TRUE(four.ok());
  for (const PolicySpec& spec : *four) {
    names.push_back(spec.name);
  }
  EXPECT_THAT(names, ElementsAre("entropy:correction=0+full", "entropy:correction=32+full",
                                 "coverage:correction=0+full", "coverage:correction=32+full"));
  const auto sweep = ParsePolicySpecs(SweepPolicies("latent:budget=512"));
  ASSERT_TRUE(sweep.ok()) << sweep.status();
  std::set<std::pair<std::string, std::string>> rules;  // estimator, budget
  std::set<int> strides, prefixes, segments;
  for (const PolicySpec& spec : *sweep) {
    const v1::PrefillPolicy& p = spec.policy.prefill();
    EXPECT_EQ(spec.policy.kv().budget_tokens(), 512);
    const std::string own = p.preset() == "coverage" ? "coverage" : "entropy";
    if (p.preset() != "critiprefill") {
      rules.insert({p.preset() == "coverage" ? "probe" : "box", p.has_budget() ? p.budget() : own});
    }
    if (p.has_correction()) strides.insert(p.correction());
    prefixes.insert(p.dense_prefix_tokens());
    if (p.has_segment_tokens()) segments.insert(p.segment_tokens());
  }
  EXPECT_EQ(rules.size(), 6u);  // both estimators with all three rules
  EXPECT_THAT(strides, ElementsAre(0, 32, 64, 128));
  EXPECT_THAT(prefixes, ElementsAre(0, 1024, 4096));
  EXPECT_THAT(segments, ElementsAre(256, 1024));
}

class EvalCompareTest : public ServerFixture {
 protected:
  void SetUp() override {
    ServiceLimits limits;
    limits.allow_compare = true;
    StartServer(limits);
    ClientOptions options;
    options.server = address();
    options.max_attempts = 1;
    client_ = *Client::Create(options);
  }
  static CompareRun Run() {
    CompareRun run;
    run.text = "t";
    run.windows = {Range(0, 20), Range(100, 20)};
    run.policies = *ParsePolicySpecs("full+full,entropy+latent,coverage+full");
    run.score = 3;
    run.decode = 5;
    run.server = "s";
    return run;
  }
  std::unique_ptr<Client> client_;
};

TEST_F(EvalCompareTest, SplitsWhatIsReadFromWhatIsDecoded) {
  const auto records = *RecordFile::Open("", false, "s");
  ASSERT_TRUE(RunCompare(client_.get(), Run(), records.get()).ok());
  const auto asked = engine_->Compares();
  ASSERT_EQ(asked.size(), 4u);  // the reference is in every call
  EXPECT_EQ(asked[0].tokens, Range(0, 20));
  EXPECT_EQ(asked[3].tokens, Range(100, 20));
  EXPECT_EQ(asked[0].score_from, 12);
  EXPECT_EQ(asked[0].decode_from, 15);
  const std::vector<CompareRecord> done = records->compare_records();
  ASSERT_EQ(done.size(), 4u);
  // The fake engine: KL is the position, equal at even ones, log-probabilities -(next id) and
  // -position. Scored are 12 to 14 and 15 to 18.
  EXPECT_EQ(done[0].prompt.n, 3);
  EXPECT_DOUBLE_EQ(done[0].prompt.kl, 13);
  EXPECT_DOUBLE_EQ(done[0].prompt.top1, 2.0 / 3);
  EXPECT_EQ(done[0].decoded.n, 4);
  EXPECT_DOUBLE_EQ(done[0].decoded.kl, 16.5);
  EXPECT_DOUBLE_EQ(done[0].decoded.top1, 0.5);
  EXPECT_DOUBLE_EQ(done[0].decoded.nll_a, 17.5);
  EXPECT_DOUBLE_EQ(done[2].decoded.nll_a, 117.5);
  EXPECT_DOUBLE_EQ(done[0].decoded.nll_b, 16.5);
  EXPECT_EQ(done[0].flops_executed, 2);
  EXPECT_EQ(done[0].flops_dense, 3);
  EXPECT_EQ(done[0].prefill_seconds, 5);
  EXPECT_EQ(done[0].full_seconds, 4);
  EXPECT_EQ(done[0].kv_bytes, 7);
  EXPECT_EQ(done[0].kv_bytes_full, 6);

  ASSERT_TRUE(RunCompare(client_.get(), Run(), records.get()).ok());
  EXPECT_EQ(engine_->Compares().size(), 4u);  // nothing is measured twice
  CompareRun prompt_only = Run();
  prompt_only.decode = 0;
  prompt_only.score = 100;
  ASSERT_TRUE(RunCompare(client_.get(), prompt_only, records.get()).ok());
  EXPECT_EQ(engine_->Compares()[4].decode_from, 0);
  EXPECT_EQ(engine_->Compares()[4].score_from, 0);
  EXPECT_EQ(records->compare_records()[4].prompt.n, 19);
  EXPECT_EQ(records->compare_records()[4].decoded.n, 0);
}

TEST_F(EvalCompareTest, AFailureLeavesWhatWasMeasured) {
  const auto records = *RecordFile::Open("", false, "s");
  CompareRun run = Run();
  run.on_window = [this](int done, int all) {
    EXPECT_EQ(all, 4);
    if (done == 3) engine_->SetSubmitStatus(absl::UnavailableError("dead"));
  };
  EXPECT_EQ(RunCompare(client_.get(), run, records.get()).code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(records->compare_records(), SizeIs(3));
}

// --- sums and page ---

CompareRecord Record(const std::string& policy, int window, double kl, double attention,
                     double seconds) {
  CompareRecord r;
  r.text = "t";
  r.policy = policy;
  r.length = 20;
  r.window = window;
  r.prompt = {3, kl / 2, 1, 1, 1};
  r.decoded = {4, kl, 0.75, std::log(2.0), std::log(8.0)};
  r.flops_executed = attention;
  r.flops_dense = 1;
  r.prefill_seconds = seconds;
  r.full_seconds = 4;
  r.kv_bytes = 1;
  r.kv_bytes_full = 4;
  return r;
}

std::vector<CompareCell> Cells() {
  return CompareCells({Record("a+full", 0, 0.1, 0.4, 2), Record("b+full", 0, 0.2, 0.4, 1),
                       Record("a+full", 1, 0.3, 0.6, 4), Record("b+full", 1, 0.4, 0.8, 1)});
}

TEST(EvalCompareReportTest, SumsByHand) {
  const std::vector<CompareCell> cells = Cells();
  ASSERT_EQ(cells.size(), 2u);
  EXPECT_EQ(cells[0].policy, "a+full");
  EXPECT_EQ(cells[0].n, 2);
  EXPECT_EQ(cells[0].decoded.positions, 8);
  EXPECT_DOUBLE_EQ(cells[0].decoded.kl, 0.2);
  EXPECT_DOUBLE_EQ(cells[0].decoded.kl_interval.low, 0.1);  // of two windows: one or the other
  EXPECT_DOUBLE_EQ(cells[0].decoded.kl_interval.high, 0.3);
  EXPECT_DOUBLE_EQ(cells[0].prompt.kl, 0.1);
  EXPECT_DOUBLE_EQ(cells[0].decoded.perplexity_full, 2);
  EXPECT_DOUBLE_EQ(cells[0].decoded.perplexity, 8);
  EXPECT_DOUBLE_EQ(cells[0].attention_share, 0.5);
  EXPECT_DOUBLE_EQ(cells[0].prefill_seconds, 3);
  EXPECT_DOUBLE_EQ(cells[0].kv_share, 0.25);
  // a reads less and diverges less; b is faster.
  EXPECT_TRUE(cells[0].least_by_attention);
  EXPECT_FALSE(cells[1].least_by_attention);
  EXPECT_TRUE(cells[0].least_by_seconds);
  EXPECT_TRUE(cells[1].least_by_seconds);
  EXPECT_THAT(CompareTable(cells), HasSubstr("0.2000 [0.1000, 0.3000]"));
  EXPECT_THAT(CompareTable(CompareCells({Record("a+full", 0, 0.1, 0.4, 2)})),
              Not(HasSubstr("[")));  // one window has no interval
}

TEST(EvalPageTest, HoldsEveryCellAndLoadsNothing) {
  std::vector<TaskCell> tasks(2);
  tasks[0].task = tasks[1].task = "vt";
  tasks[0].policy = "full+full";
  tasks[1].policy = "x:budget=1+y";
  tasks[0].n = tasks[1].n = 7;
  tasks[1].score = 0.25;
  tasks[1].interval = {0.125, 0.5};
  const std::string page = EvalPage("server <b>", {"note & note"}, tasks, Cells());
  EXPECT_THAT(page, HasSubstr("x:budget=1+y: 0.250 [0.125, 0.500], n = 7"));
  EXPECT_THAT(page, HasSubstr("a+full: KL 0.20000 [0.10000, 0.30000], top-1 0.750, attention "
                              "50.0 %, prefill 3.000 s, n = 2 windows"));
  EXPECT_THAT(page, HasSubstr("server &lt;b&gt;"));
  EXPECT_THAT(page, HasSubstr("note &amp; note"));
  for (const char* part : {"<b>", "http:", "https:", "src=", "<script", "url(", "nan", "inf\""}) {
    EXPECT_THAT(page, Not(HasSubstr(part)));
  }
}

TEST(EvalPlotTest, PutsDotsWhereTheirValuesAre) {
  // Rows: the plot's scale is 420 wide from 330.
  const std::string rows = DotPlot("t", {{"g", "a", "n = 1", 0.5, {0.25, 0.75}, 0}});
  EXPECT_THAT(rows, HasSubstr("<circle cx=\"540.0\""));
  EXPECT_THAT(rows, HasSubstr("x1=\"435.0\""));
  EXPECT_THAT(rows, HasSubstr("x2=\"645.0\""));
  // x: 0 to 1 over 600 from 84. y: logarithmic, 0.01 to 1 over 330 from the foot at 342: 0.1 is
  // half way, 0 at the foot.
  const Axis x = {"x", true}, y = {"y", false, true};
  std::vector<Dot> dots(3);
  dots[0].x = 0.5;
  dots[0].y = 0.1;
  dots[0].y_interval = {0.01, 1};
  dots[1].x = 1;
  dots[1].y = 0;
  dots[2].x = 0.25;
  dots[2].y = 0.1;
  dots[2].y_interval = {0.1, 0.1};
  dots[0].front = dots[1].front = true;
  const std::string plot = ScatterPlot("t", x, y, dots);
  EXPECT_THAT(plot, HasSubstr("<circle cx=\"384.0\" cy=\"177.0\" r=\"5\""));
  EXPECT_THAT(plot, HasSubstr("<circle cx=\"684.0\" cy=\"342.0\" r=\"5\""));
  EXPECT_THAT(plot,
              HasSubstr("x1=\"384.0\" y1=\"177.0\" x2=\"684.0\" y2=\"177.0\" class=\"front\""));
  EXPECT_THAT(plot, HasSubstr(">100 %<"));
  EXPECT_THAT(ScatterPlot("none", x, y, {}), HasSubstr("</svg>"));
}

}  // namespace
}  // namespace entropyserve
