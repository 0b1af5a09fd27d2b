// What each policy costs and loses on a real model: answers, share of attention executed, KV kept,
// seconds; and the KL divergence of next-token distributions from dense attention's.
//
//   policy_bench --model=models/SmolLM2-135M-Instruct.Q4_1.gguf [--document=FILE]
//   [--part=answers|kl|all]
//
// `--dense_prefix` and `--base` are lowered to 1024 by default so that policies act on a short
// context. Prints Markdown.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "engine/engine_factory.h"
#include "engine/text/chat_template.h"
#include "tests/model_testing.h"

namespace entropyserve {
namespace {

[[noreturn]] void Die(const std::string& message) {
  std::fprintf(stderr, "policy_bench: %s\n", message.c_str());
  std::exit(2);
}

using Flags = std::map<std::string, std::string>;

Flags ParseFlags(int argc, char** argv) {
  Flags flags = {{"model", "models/SmolLM2-135M-Instruct.Q4_1.gguf"},
                 {"document", "/usr/share/common-licenses/GPL-3"},
                 {"dense_prefix", "1024"},
                 {"base", "1024"},
                 {"kv_budget", "1024"},
                 {"part", "all"},
                 {"threads", "0"},
                 {"tokens", "8000"},
                 {"runs", "3"}};
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t equals = arg.find('=');
    if (!arg.starts_with("--") || equals == std::string::npos ||
        !flags.count(arg.substr(2, equals - 2))) {
      Die("unknown flag " + arg);
    }
    flags[arg.substr(2, equals - 2)] = arg.substr(equals + 1);
  }
  return flags;
}

int ToInt(const std::string& text) {
  int value = 0;
  if (!absl::SimpleAtoi(text, &value)) Die("not a number: " + text);
  return value;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) Die("cannot read " + path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class Sink final : public EventSink {
 public:
  void OnAccepted(const AcceptedEvent&) override {}
  void OnProgress(int64_t, int64_t) override {}
  void OnTokens(TokensEvent event) override { text += event.text; }
  void OnFinished(FinishedEvent event) override { done.set_value(std::move(event)); }
  std::string text;
  std::promise<FinishedEvent> done;
};

PrefillPolicy Acting(const std::string& preset, const Flags& flags) {
  PrefillPolicy policy = *PrefillPreset(preset, "policy");
  policy.params.dense_prefix = ToInt(flags.at("dense_prefix"));
  policy.params.base = ToInt(flags.at("base"));
  return policy;
}

std::string OneLine(std::string text) {
  for (char& c : text) {
    if (c == '\n' || c == '|') c = ' ';
  }
  constexpr size_t kShown = 110;
  return text.size() > kShown ? text.substr(0, kShown) + " ..." : text;
}

void Answers(const Flags& flags) {
  EngineConfig config;
  config.model_path = flags.at("model");
  config.threads = ToInt(flags.at("threads"));
  auto loaded = LoadEngine(config);
  if (!loaded.ok()) Die(loaded.status().ToString());
  auto chat = ChatTemplate::Create(*loaded->tokenizer);
  if (!chat.ok()) Die(chat.status().ToString());
  std::printf("%s, %s, %s; dense prefix %s, base %s, kv budget %s\n\n", loaded->config.name.c_str(),
              loaded->backend_description.c_str(), Name(loaded->dtype),
              flags.at("dense_prefix").c_str(), flags.at("base").c_str(),
              flags.at("kv_budget").c_str());
  const std::string document = ReadFile(flags.at("document"));
  const std::string needle = "\nThe secret number of the walled garden is 7481.\n";
  std::string hidden = document.substr(0, document.size() * 9 / 10);
  hidden.insert(hidden.find('\n', hidden.size() / 2), needle);
  const std::vector<std::pair<std::string, std::string>> prompts = {
      {"GPL-3", document + "\n\nIn one sentence: what freedoms does this license protect?"},
      {"needle", hidden + "\n\nWhat is the secret number of the walled garden?"}};
  for (const auto& [name, content] : prompts) {
    std::printf(
        "| %s | kv | prompt | prefill, s | attention share | KV kept | answer "
        "|\n|---|---|---|---|---|---|---|\n",
        name.c_str());
    for (const std::string& prefill : PrefillPresetNames()) {
      for (const std::string& kv : KvPresetNames()) {
        EngineRequest request;
        const std::vector<ChatMessage> messages = {{"user", content}};
        request.prompt = *chat->Render(messages);
        request.strip_leading_space = true;
        request.sampling.temperature = 0;
        request.sampling.max_new_tokens = 48;
        request.sampling.min_new_tokens = 20;  // past the gap, so that compression happens
        request.prefill = Acting(prefill, flags);
        request.kv = *KvPreset(kv, "kv");
        request.kv.params.budget = ToInt(flags.at("kv_budget"));
        auto sink = std::make_shared<Sink>();
        if (auto id = loaded->engine->Submit(request, sink); !id.ok()) Die(id.status().ToString());
        const FinishedEvent end = sink->done.get_future().get();
        if (!end.status.ok()) Die(end.status.ToString());
        const Receipt& r = end.receipt;
        std::printf("| %s | %s | %ld | %.2f | %.1f %% | %.1f %% | %s |\n", prefill.c_str(),
                    kv.c_str(), long(r.prompt_tokens), r.prefill_seconds,
                    100 * r.attention_flops_executed / r.attention_flops_dense,
                    100.0 * double(r.kv_bytes_after) / double(r.kv_bytes_before),
                    OneLine(sink->text).c_str());
        std::fflush(stdout);
      }
    }
    std::printf("\n");
  }
}

struct Scored {
  double seconds = 0;
  double share = 0;
  std::vector<float> logits;  // of the last kScored rows
};

constexpr int64_t kScored = 256;

Scored Prefill(TestModel* model, const std::vector<int32_t>& tokens, const PrefillPolicy& policy) {
  const int64_t n = int64_t(tokens.size()), vocab = model->model->config().vocab;
  TestSequence sequence(model, tokens, policy, *KvPreset("full", "kv"), 0);
  Scored scored;
  // Whole-prompt policies take one step; others chunks of 1024, the last one with logits.
  const int64_t chunk = policy.params.whole_prompt && !policy.params.full ? n : 1024;
  const auto begin = std::chrono::steady_clock::now();
  while (sequence.left() > 0) {
    const int64_t step = std::min(chunk, sequence.left());
    const int64_t wanted = step == sequence.left() ? std::min(kScored, step) : 0;
    const std::vector<float> rows = RunStep(model, {{&sequence, step}}, wanted)[0];
    scored.logits.insert(scored.logits.end(), rows.begin(), rows.end());
  }
  scored.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const SeqCounters counters = sequence.cache().ReadCounters();
  const AttentionShape shape = model->model->shape();
  scored.share = double(counters.pairs + counters.box_blocks) /
                 (double(shape.heads) * shape.layers * double(n) * (n + 1) / 2);
  if (int64_t(scored.logits.size()) % vocab != 0) Die("logits of partial rows");
  return scored;
}

// Mean over rows of KL(p || q), nats, and the share of rows with the same first choice.
std::pair<double, double> Compare(const std::vector<float>& p, const std::vector<float>& q,
                                  int64_t vocab) {
  double kl = 0, agree = 0;
  const int64_t rows = int64_t(p.size()) / vocab;
  auto log_sum = [&](const float* x) {
    const double top = *std::max_element(x, x + vocab);
    double sum = 0;
    for (int64_t i = 0; i < vocab; ++i) sum += std::exp(double(x[i]) - top);
    return top + std::log(sum);
  };
  for (int64_t row = 0; row < rows; ++row) {
    const float *a = p.data() + row * vocab, *b = q.data() + row * vocab;
    const double za = log_sum(a), zb = log_sum(b);
    for (int64_t i = 0; i < vocab; ++i) kl += std::exp(a[i] - za) * ((a[i] - za) - (b[i] - zb));
    agree += std::max_element(a, a + vocab) - a == std::max_element(b, b + vocab) - b;
  }
  return {kl / double(rows), agree / double(rows)};
}

void KlTable(const Flags& flags) {
  constexpr int64_t kRows = 8192, kPages = 30000;
  TestModel model = LoadTestModel(flags.at("model"), MakeCpuBackend(1)->AutoDType(), 1024, kPages);
  EngineConfig config;
  config.model_path = flags.at("model");
  auto loaded = LoadEngine(config);  // for its tokenizer
  if (!loaded.ok()) Die(loaded.status().ToString());
  std::vector<int32_t> tokens = *loaded->tokenizer->Encode(ReadFile(flags.at("document")));
  const size_t wanted = size_t(std::min<int64_t>(ToInt(flags.at("tokens")), kRows));
  while (tokens.size() < wanted) tokens.insert(tokens.end(), tokens.begin(), tokens.begin() + 512);
  tokens.resize(wanted);
  const int64_t vocab = model.model->config().vocab;
  std::printf("%s, %s: %zu tokens; KL of the last %ld next-token distributions from dense\n\n",
              model.backend->Description().c_str(), Name(model.model->dtype()), tokens.size(),
              long(kScored));
  std::printf(
      "| prefill | dense prefix | base | prefill, s | against dense | attention share | KL | same "
      "first choice |\n");
  std::printf("|---|---|---|---|---|---|---|---|\n");
  struct Row {
    std::string preset;
    int dense_prefix, base;
  };
  std::vector<Row> rows = {{"full", 0, 0}};
  for (const char* preset : {"entropy", "coverage", "entropy_paper", "critiprefill"}) {
    rows.push_back({preset, 4096, 2048});
    rows.push_back({preset, ToInt(flags.at("dense_prefix")), ToInt(flags.at("base"))});
  }
  Scored dense;
  for (const Row& row : rows) {
    PrefillPolicy policy = *PrefillPreset(row.preset, "policy");
    if (!policy.params.full) {
      policy.params.dense_prefix = row.dense_prefix;
      policy.params.base = row.base;
    }
    std::vector<double> seconds;
    Scored scored;
    for (int run = 0; run < ToInt(flags.at("runs")); ++run) {
      scored = Prefill(&model, tokens, policy);
      seconds.push_back(scored.seconds);
    }
    std::sort(seconds.begin(), seconds.end());
    scored.seconds = seconds[seconds.size() / 2];
    if (policy.params.full) dense = scored;
    const auto [kl, agree] = Compare(dense.logits, scored.logits, vocab);
    std::printf("| %s | %d | %d | %.2f | %.2fx | %.1f %% | %.4f | %.1f %% |\n", row.preset.c_str(),
                row.dense_prefix, row.base, scored.seconds, dense.seconds / scored.seconds,
                100 * scored.share, kl, 100 * agree);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace entropyserve

int main(int argc, char** argv) {
  const entropyserve::Flags flags = entropyserve::ParseFlags(argc, argv);
  if (flags.at("part") != "kl") entropyserve::Answers(flags);
  if (flags.at("part") != "answers") entropyserve::KlTable(flags);
  return 0;
}
