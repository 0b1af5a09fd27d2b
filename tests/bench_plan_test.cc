// What `bench` is going to do, without a server or a clock: lengths, arrivals, replayed traces,
// prompts and flags.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "client/bench/flags.h"
#include "client/bench/plan.h"
#include "client/bench/prompts.h"

namespace entropyserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

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

}  // namespace
}  // namespace entropyserve
