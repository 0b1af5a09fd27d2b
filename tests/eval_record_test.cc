// The evaluation's records: their files, and sums, tables and plots over them.
#include <gmock/gmock.h>

#include <set>

#include "client/eval/page.h"
#include "client/eval/plot.h"
#include "client/eval/report.h"
#include "tests/eval_testing.h"

namespace entropyserve {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TaskRecord Record(const std::string& task, const std::string& policy, int index, double score) {
  TaskRecord r;
  r.server = "s";
  r.task = task;
  r.policy = policy;
  r.haystack = "own";
  r.format = "chat";
  r.length = 4096;
  r.index = index;
  r.score = score;
  r.seed = 0xffffffffffffffff;
  r.turn_scores = {score};
  r.answers = {"\"quoted\"\n\xff"};
  r.expected = {"1 | 2"};
  r.flops_executed = 1.5e15;
  r.flops_dense = 3e15;
  r.kv_bytes_before = 1000;
  r.kv_bytes_after = 250;
  r.compressed = true;
  r.prefill_seconds = 0.125;
  return r;
}

TEST(EvalRecordFileTest, ComesBackAsItWas) {
  const TempFile file;
  {
    auto records = RecordFile::Open(file.path(), false, "s");
    ASSERT_TRUE(records.ok()) << records.status();
    ASSERT_TRUE((*records)->Add(Record("vt", "a", 3, 0.6)).ok());
    CompareRecord compare;
    compare.server = "s";
    compare.policy = "b";
    compare.window = 2;
    compare.decoded.kl = 0.25;
    ASSERT_TRUE((*records)->Add(compare).ok());
  }
  EXPECT_EQ(Lines(file.Read()), 2u);
  EXPECT_EQ(RecordFile::Open(file.path(), false, "s").status().code(),
            absl::StatusCode::kAlreadyExists);
  auto again = RecordFile::Open(file.path(), true, "s");
  ASSERT_TRUE(again.ok()) << again.status();
  ASSERT_EQ((*again)->task_records().size(), 1u);
  TaskRecord expected = Record("vt", "a", 3, 0.6);
  expected.answers = {"\"quoted\"\n\uFFFD"};  // what is no character cannot be in JSON
  EXPECT_EQ(ToJsonLine((*again)->task_records()[0]), ToJsonLine(expected));
  EXPECT_TRUE((*again)->Has(KeyOf(expected)));
  EXPECT_FALSE((*again)->Has(KeyOf(Record("vt", "a", 4, 0.6))));
  ASSERT_EQ((*again)->compare_records().size(), 1u);
  EXPECT_DOUBLE_EQ((*again)->compare_records()[0].decoded.kl, 0.25);
}

TEST(EvalRecordFileTest, ReadsFilesFromBeforeGivenAnswers) {
  std::string line = ToJsonLine(Record("vt", "a", 0, 1)) + "\n";
  for (const char* field : {"\"answer_nll\":0.0,", "\"answer_nll_tokens\":0"}) {
    const size_t at = line.find(field);
    ASSERT_NE(at, std::string::npos) << line;
    line.erase(at, std::string(field).size());
  }
  line.erase(line.rfind(','), 1);
  const TempFile file(line);
  auto records = RecordFile::Open(file.path(), true, "s");
  ASSERT_TRUE(records.ok()) << records.status();
  EXPECT_EQ((*records)->task_records().size(), 1u);
}

TEST(EvalRecordFileTest, DropsOnlyAnUnfinishedLastLine) {
  const std::string line = ToJsonLine(Record("vt", "a", 0, 1)) + "\n";
  const TempFile file(line + line + line.substr(0, 50));
  {
    auto records = RecordFile::Open(file.path(), true, "s");
    ASSERT_TRUE(records.ok()) << records.status();
    EXPECT_EQ((*records)->task_records().size(), 1u);
    ASSERT_TRUE((*records)->Add(Record("vt", "a", 1, 1)).ok());
  }
  EXPECT_EQ(file.Read(), line + ToJsonLine(Record("vt", "a", 1, 1)) + "\n");
}

TEST(EvalRecordFileTest, RefusesWhatItCannotGoOnFrom) {
  const auto error = [](const std::string& text) {
    const TempFile file(text);
    const auto status = RecordFile::Open(file.path(), true, "s").status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(file.Read(), text);  // and leaves it
    return std::string(status.message());
  };
  const std::string line = ToJsonLine(Record("vt", "a", 0, 1)) + "\n";
  EXPECT_THAT(error(line + "{}\n"), HasSubstr("line 2: expected a record"));
  EXPECT_THAT(error("notes\n"), HasSubstr("line 1: expected a record"));
  TaskRecord other = Record("vt", "a", 1, 1);
  other.server = "another";
  EXPECT_THAT(error(line + ToJsonLine(other) + "\n"), HasSubstr("it is of \"another\""));
  EXPECT_EQ(RecordFile::Open("/no/such/folder/x", false, "s").status().code(),
            absl::StatusCode::kNotFound);
}

// --- sums ---

TEST(EvalReportTest, SumsByHand) {
  std::vector<TaskRecord> records;
  for (int i = 0; i < 4; ++i) {
    records.push_back(Record("vt", "full+full", i, 1));
    records.push_back(Record("vt", "x+y", i, i == 0 ? 1 : 0.2));
    records.push_back(Record("cwe", "x+y", i, 0.5));
  }
  for (TaskRecord& r : records) {
    if (r.policy == "full+full") {
      r.compressed = false;
      r.kv_bytes_after = 1000;
      r.flops_executed = r.flops_dense;
    }
  }
  records[1].flops_executed = 0;  // of x+y: 0 + 3 * 1.5e15 of 4 * 3e15
  const std::vector<TaskCell> cells = TaskCells(records);
  ASSERT_EQ(cells.size(), 5u);
  EXPECT_EQ(cells[0].policy, "full+full");
  EXPECT_DOUBLE_EQ(cells[0].attention_share, 1);
  EXPECT_EQ(cells[0].compressed, 0);
  const TaskCell& cell = cells[1];
  EXPECT_EQ(cell.task + cell.policy, "vtx+y");
  EXPECT_EQ(cell.n, 4);
  EXPECT_DOUBLE_EQ(cell.score, 0.4);
  EXPECT_DOUBLE_EQ(cell.interval.low, Wilson(0.4, 4).low);
  EXPECT_EQ(cell.pairs, 4);
  EXPECT_DOUBLE_EQ(cell.difference, -0.6);
  EXPECT_DOUBLE_EQ(cell.attention_share, 0.375);
  EXPECT_DOUBLE_EQ(cell.kv_share, 0.25);
  EXPECT_DOUBLE_EQ(cell.prefill_seconds, 0.125);
  EXPECT_EQ(cell.compressed, 4);
  EXPECT_EQ(cells[2].task, "cwe");
  EXPECT_EQ(cells[2].pairs, 0);  // nothing to compare with
  EXPECT_EQ(cells[4].task, kAllTasks);
  EXPECT_EQ(cells[4].n, 8);
  EXPECT_EQ(cells[4].pairs, 4);
  EXPECT_DOUBLE_EQ(cells[4].score, 0.45);
  EXPECT_DOUBLE_EQ(cells[4].difference, -0.6);
  const std::string table = TaskTable(cells);
  EXPECT_THAT(table, HasSubstr("-0.60 ["));
  EXPECT_EQ(Lines(table), 6u);
}

TEST(EvalReportTest, GivenAnswersArePairedByPrompt) {
  std::vector<TaskRecord> records;
  for (int i = 0; i < 4; ++i) {
    for (const char* policy : {"full+full", "x+y"}) {
      records.push_back(Record("vt", policy, i, 1));
      records.back().answer_nll = i + (policy[0] == 'x' ? 0.5 : 0);
      records.back().answer_nll_tokens = 7;
    }
  }
  const std::vector<TaskCell> cells = TaskCells(records);
  ASSERT_EQ(cells.size(), 2u);
  EXPECT_EQ(cells[1].nll_n, 4);
  EXPECT_DOUBLE_EQ(cells[1].nll, 2);
  EXPECT_EQ(cells[1].nll_pairs, 4);
  // Prompts differ by more than policies do; the paired difference does not see it.
  EXPECT_DOUBLE_EQ(cells[1].nll_difference, 0.5);
  EXPECT_DOUBLE_EQ(cells[1].nll_difference_interval.high, 0.5);
  EXPECT_THAT(TaskTable(cells), HasSubstr("+0.500 [+0.500, +0.500]"));
  EXPECT_THAT(TaskTable({cells[0]}), HasSubstr("nats/token"));
  EXPECT_THAT(TaskTable(TaskCells({Record("vt", "x+y", 0, 1)})), Not(HasSubstr("nats/token")));
}

TEST(EvalPlotTest, DrawsDifferencesOfOneReadingBesideEachOther) {
  std::vector<TaskRecord> records;
  for (const char* policy : {"full+full", "full+latent", "full+<snapkv>"}) {
    for (int i = 0; i < 3; ++i)
      records.push_back(Record("vt", policy, i, policy[5] == 'f' ? 1 : 0));
  }
  const std::string plot = DifferencePlot(TaskCells(records));
  std::set<std::string> places;
  for (size_t at = plot.find("<circle"); at != plot.npos; at = plot.find("<circle", at + 1)) {
    const size_t x = plot.find("cx=", at);
    places.insert(plot.substr(x, plot.find(' ', x) - x));
  }
  EXPECT_EQ(places.size(), 4u);  // with the legend's, although all took 0.125 s
  EXPECT_THAT(plot, HasSubstr(">-100</text>"));
  EXPECT_THAT(plot, HasSubstr("&lt;snapkv&gt;, 25 %"));
  const std::string file = PlotFile(plot);
  EXPECT_TRUE(file.starts_with("<svg xmlns="));
  EXPECT_TRUE(file.ends_with("</svg>\n"));
  EXPECT_EQ(file.find("<figure"), file.npos);
  EXPECT_EQ(DifferencePlot(TaskCells({Record("vt", "x+y", 0, 1)})), "");
}

TEST(EvalReportTest, OnlyLikePromptsArePaired) {
  std::vector<TaskRecord> records = {Record("vt", "full+full", 0, 1), Record("vt", "x+y", 1, 0),
                                     Record("vt", "x+y", 0, 1)};
  records[2].format = "text";
  for (const TaskCell& cell : TaskCells(records)) {
    EXPECT_EQ(cell.pairs, cell.policy == "x+y" ? 0 : 1);
  }
}

}  // namespace
}  // namespace entropyserve
