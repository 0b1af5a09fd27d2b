// The contract, field by field: every sampling and policy field with its edges, and every call
// beside Generate.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "tests/server_testing.h"

namespace entropyserve {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr int64_t kMinInt = std::numeric_limits<int32_t>::min();
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

// Which edge values a field takes; all others are refused.
struct Edges {
  std::set<float> floats;  // of -1, 0, 1, max
  std::set<int64_t> ints;  // of min, -1, 0, max
};

class ContractTest : public ServerFixture {
 protected:
  void SetUp() override { StartServer(); }

  // Sends `request` and expects success, or an error that starts with `path`.
  void Expect(const v1::GenerateRequest& request, bool works, const std::string& path,
              const std::string& what) {
    const grpc::Status status = Generate(request).status;
    if (works) {
      EXPECT_TRUE(status.ok()) << path << " = " << what << ": " << status.error_message();
      return;
    }
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << path << " = " << what;
    EXPECT_THAT(status.error_message(), StartsWith(path)) << what;
  }

  // Tries every edge of `field` of `message`, which is a part of `request`.
  void TryField(v1::GenerateRequest* request, Message* message, const FieldDescriptor* field,
                const std::string& path, const Edges& edges) {
    const auto* reflection = message->GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_FLOAT:
        for (const float value : {kNan, kInf, -kInf, -1.0f, 0.0f, 1.0f, kMaxFloat}) {
          reflection->SetFloat(message, field, value);
          const bool works = std::isfinite(value) && edges.floats.contains(value);
          Expect(*request, works, path, std::to_string(value));
        }
        break;
      case FieldDescriptor::CPPTYPE_INT32:
        for (const int64_t value : {kMinInt, int64_t{-1}, int64_t{0}, kMaxInt}) {
          reflection->SetInt32(message, field, static_cast<int32_t>(value));
          Expect(*request, edges.ints.contains(value), path, std::to_string(value));
        }
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        for (const bool value : {false, true}) {
          reflection->SetBool(message, field, value);
          Expect(*request, true, path, value ? "true" : "false");
        }
        break;
      default:
        FAIL() << "no edges for " << path;
    }
    reflection->ClearField(message, field);
  }
};

// --- Sampling ---

TEST_F(ContractTest, EverySamplingScalarWorksOrIsNamed) {
  const std::map<std::string, Edges> edges = {
      {"temperature", {{0, 1}, {}}},
      {"top_p", {{1}, {}}},
      {"top_k", {{}, {0, kMaxInt}}},
      {"min_p", {{0, 1}, {}}},
      {"repetition_penalty", {{1}, {}}},
      {"presence_penalty", {{-1, 0, 1}, {}}},
      {"frequency_penalty", {{-1, 0, 1}, {}}},
      {"ignore_eos", {}},
      {"logprobs", {{}, {0}}},
  };
  // Tested below: 64 bits and lists.
  const std::set<std::string> others = {"seed",           "stop",           "stop_token_ids",
                                        "max_new_tokens", "min_new_tokens", "forced_token_ids"};
  v1::GenerateRequest request = TextRequest();
  v1::SamplingParams* sampling = request.mutable_sampling();
  const auto* descriptor = sampling->GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (others.contains(field->name())) continue;
    ASSERT_TRUE(edges.contains(field->name())) << "a field without a test: " << field->name();
    TryField(&request, sampling, field, "sampling." + field->name(), edges.at(field->name()));
  }
}

TEST_F(ContractTest, SixtyFourBitSamplingFields) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  for (const int64_t value : {kMin, int64_t{-1}, int64_t{0}, kMax}) {
    v1::GenerateRequest request = TextRequest();
    request.mutable_sampling()->set_max_new_tokens(value);
    Expect(request, value >= 0, "sampling.max_new_tokens", std::to_string(value));
    request = TextRequest();
    request.mutable_sampling()->set_min_new_tokens(value);
    Expect(request, value == 0, "sampling.min_new_tokens", std::to_string(value));
  }
  for (const uint64_t seed : {uint64_t{0}, std::numeric_limits<uint64_t>::max()}) {
    v1::GenerateRequest request = TextRequest();
    request.mutable_sampling()->set_seed(seed);
    const Result result = Generate(request);
    ASSERT_TRUE(result.status.ok());
    EXPECT_EQ(result.events.back().finished().receipt().seed(), seed);
  }
}

TEST_F(ContractTest, ListsOfSamplingAreChecked) {
  const auto with = [](auto set) {
    v1::GenerateRequest request = TextRequest();
    set(*request.mutable_sampling());
    return request;
  };
  const auto add_stops = [](int count, const std::string& stop) {
    return [=](v1::SamplingParams& s) {
      for (int i = 0; i < count; ++i) s.add_stop(stop);
    };
  };
  Expect(with(add_stops(16, "x")), true, "sampling.stop", "16");
  Expect(with(add_stops(17, "x")), false, "sampling.stop", "17");
  Expect(with(add_stops(1, "")), false, "sampling.stop", "empty");
  Expect(with(add_stops(1, std::string(1024, 'x'))), true, "sampling.stop", "1024");
  Expect(with(add_stops(1, std::string(1025, 'x'))), false, "sampling.stop", "1025");
  for (const int32_t id : {-1, 0, model_->vocab_size() - 1, model_->vocab_size()}) {
    const bool works = id >= 0 && id < model_->vocab_size();
    Expect(with([=](v1::SamplingParams& s) { s.add_stop_token_ids(id); }), works,
           "sampling.stop_token_ids", std::to_string(id));
    Expect(with([=](v1::SamplingParams& s) { s.add_forced_token_ids(id); }), works,
           "sampling.forced_token_ids", std::to_string(id));
  }
  for (const int count : {256, 257}) {
    Expect(with([=](v1::SamplingParams& s) { s.mutable_stop_token_ids()->Resize(count, 5); }),
           count == 256, "sampling.stop_token_ids", std::to_string(count));
  }
  for (const int32_t logprobs : {20, 21}) {
    Expect(with([=](v1::SamplingParams& s) { s.set_logprobs(logprobs); }), logprobs == 20,
           "sampling.logprobs", std::to_string(logprobs));
  }
}

TEST_F(ContractTest, SamplingFieldsReachTheEngine) {
  v1::GenerateRequest request = TextRequest();
  v1::SamplingParams& s = *request.mutable_sampling();
  s.set_temperature(0.5f);
  s.set_top_p(0.9f);
  s.set_top_k(40);
  s.set_min_p(0.1f);
  s.set_repetition_penalty(1.1f);
  s.set_presence_penalty(0.2f);
  s.set_frequency_penalty(-0.3f);
  s.set_seed(11);
  s.add_stop("END");
  s.add_stop_token_ids(5);
  s.set_max_new_tokens(77);
  s.set_min_new_tokens(3);
  s.set_ignore_eos(true);
  s.set_logprobs(4);
  s.add_forced_token_ids(9);
  ASSERT_TRUE(Generate(request).status.ok());
  const SamplingParams got = engine_->Requests()[0].sampling;
  EXPECT_FLOAT_EQ(got.temperature, 0.5f);
  EXPECT_FLOAT_EQ(got.top_p, 0.9f);
  EXPECT_EQ(got.top_k, 40);
  EXPECT_FLOAT_EQ(got.min_p, 0.1f);
  EXPECT_FLOAT_EQ(got.repetition_penalty, 1.1f);
  EXPECT_FLOAT_EQ(got.presence_penalty, 0.2f);
  EXPECT_FLOAT_EQ(got.frequency_penalty, -0.3f);
  EXPECT_EQ(got.seed, 11u);
  EXPECT_THAT(got.stop, ElementsAre("END"));
  EXPECT_THAT(got.stop_token_ids, ElementsAre(5));
  EXPECT_EQ(got.max_new_tokens, 77);
  EXPECT_EQ(got.min_new_tokens, 3);
  EXPECT_TRUE(got.ignore_eos);
  EXPECT_EQ(got.logprobs, 4);
  EXPECT_THAT(got.forced_token_ids, ElementsAre(9));
}

TEST_F(ContractTest, AbsentSamplingIsTheDocumentedDefault) {
  v1::GenerateRequest request;
  request.set_text("x");
  ASSERT_TRUE(Generate(request).status.ok());
  const SamplingParams got = engine_->Requests()[0].sampling;
  EXPECT_FLOAT_EQ(got.temperature, 1.0f);
  EXPECT_FLOAT_EQ(got.top_p, 1.0f);
  EXPECT_EQ(got.top_k, 0);
  EXPECT_EQ(got.max_new_tokens, 1024);
  EXPECT_EQ(got.logprobs, -1);
  EXPECT_FALSE(got.seed.has_value());
}

// --- Policies ---

TEST_F(ContractTest, EveryPrefillFieldWorksOrIsNamed) {
  // Under the default preset, `entropy`: segment 512, base 2048, correction 32, forced blocks.
  const std::map<std::string, Edges> edges = {
      {"forced", {}},
      {"correction", {{}, {0}}},
      {"segment_tokens", {}},
      {"block_tokens", {}},
      {"probe_stride", {}},
      {"dense_prefix_tokens", {{}, {0, kMaxInt}}},
      {"dense_suffix_tokens", {{}, {0, kMaxInt}}},
      {"first_sparse_layer", {{}, {0, kMaxInt}}},
      {"base_tokens", {{}, {kMaxInt}}},
      {"e_t", {{0, 1, kMaxFloat}, {}}},
      {"delta", {{0, 1, kMaxFloat}, {}}},
      {"alpha", {{0, 1, kMaxFloat}, {}}},
      {"temperature", {{1, kMaxFloat}, {}}},
      {"coverage", {{1, kMaxFloat}, {}}},
      {"coverage_min_tokens", {{}, {0}}},
      {"coverage_max_tokens", {{}, {kMaxInt}}},
  };
  v1::GenerateRequest request = TextRequest();
  v1::PrefillPolicy* policy = request.mutable_policy()->mutable_prefill();
  const auto* descriptor = policy->GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) continue;  // below
    ASSERT_TRUE(edges.contains(field->name())) << "a field without a test: " << field->name();
    // coverage_min above coverage_max is a contradiction that the latter names.
    const bool is_coverage_min = field->name() == "coverage_min_tokens";
    TryField(&request, policy, field,
             is_coverage_min ? "policy.prefill.coverage_m" : "policy.prefill." + field->name(),
             edges.at(field->name()));
  }
}

TEST_F(ContractTest, EveryKvFieldWorksOrIsNamed) {
  const std::map<std::string, Edges> edges = {
      {"budget_tokens", {{}, {kMaxInt}}},
      {"fraction", {{0, 1}, {}}},
      {"gap_tokens", {{}, {0, kMaxInt}}},
      {"window_tokens", {}},
      {"pool_before", {{}, {0}}},
      {"pool_after", {{}, {0}}},
      {"keep_sinks", {}},
      {"adakv_floor", {{0, 1}, {}}},
  };
  v1::GenerateRequest request = TextRequest();
  v1::KvPolicy* policy = request.mutable_policy()->mutable_kv();
  const auto* descriptor = policy->GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) continue;
    ASSERT_TRUE(edges.contains(field->name())) << "a field without a test: " << field->name();
    TryField(&request, policy, field, "policy.kv." + field->name(), edges.at(field->name()));
  }
}

TEST_F(ContractTest, NamesOfPoliciesAreChecked) {
  const auto prefill = [](auto set) {
    v1::GenerateRequest request = TextRequest();
    set(*request.mutable_policy()->mutable_prefill());
    return request;
  };
  const auto kv = [](auto set) {
    v1::GenerateRequest request = TextRequest();
    set(*request.mutable_policy()->mutable_kv());
    return request;
  };
  for (const std::string& name : PrefillPresetNames()) {
    Expect(prefill([&](v1::PrefillPolicy& p) { p.set_preset(name); }), true, "preset", name);
  }
  for (const std::string& name : KvPresetNames()) {
    Expect(kv([&](v1::KvPolicy& p) { p.set_preset(name); }), true, "preset", name);
  }
  for (const std::string name : {"", "Entropy", "no such"}) {
    Expect(prefill([&](v1::PrefillPolicy& p) { p.set_preset(name); }), false,
           "policy.prefill.preset", name);
    Expect(prefill([&](v1::PrefillPolicy& p) { p.set_estimator(name); }), false,
           "policy.prefill.estimator", name);
    Expect(prefill([&](v1::PrefillPolicy& p) { p.set_budget(name); }), name == "entropy",
           "policy.prefill.budget", name);
    Expect(kv([&](v1::KvPolicy& p) { p.set_preset(name); }), false, "policy.kv.preset", name);
    Expect(kv([&](v1::KvPolicy& p) { p.set_pooling(name); }), false, "policy.kv.pooling", name);
  }
}

TEST_F(ContractTest, OverridesApplyToThePresetOrTheServersDefault) {
  model_->prefill.params.base = 3000;
  v1::GenerateRequest request = TextRequest();
  v1::PrefillPolicy& p = *request.mutable_policy()->mutable_prefill();
  p.set_estimator("probe");
  p.set_dense_prefix_tokens(1024);
  request.mutable_policy()->mutable_kv()->set_pooling("max");
  ASSERT_TRUE(Generate(request).status.ok());
  p.set_preset("coverage");
  p.set_coverage(0.5f);
  request.mutable_policy()->mutable_kv()->set_preset("snapkv");
  const Result result = Generate(request);
  ASSERT_TRUE(result.status.ok());
  const auto sent = engine_->Requests();
  EXPECT_EQ(sent[0].prefill.name, "entropy");
  EXPECT_EQ(sent[0].prefill.params.base, 3000);
  EXPECT_EQ(sent[0].prefill.params.estimator, Estimator::kProbe);
  EXPECT_EQ(sent[0].prefill.params.dense_prefix, 1024);
  EXPECT_EQ(sent[0].kv.params.pooling, Pooling::kMax);
  EXPECT_EQ(sent[1].prefill.name, "coverage");
  EXPECT_EQ(sent[1].prefill.params.budget, BudgetRule::kCoverage);
  EXPECT_FLOAT_EQ(sent[1].prefill.params.coverage, 0.5f);
  EXPECT_EQ(sent[1].prefill.params.base, 2048);
  EXPECT_EQ(sent[1].kv.params.rule, KvRule::kSnapKv);
  const v1::Policy& ran = result.events.back().finished().receipt().policy();
  EXPECT_EQ(ran.prefill().estimator(), "probe");
  EXPECT_FLOAT_EQ(ran.prefill().coverage(), 0.5f);
  EXPECT_EQ(ran.kv().gap_tokens(), 0);
}

// --- The other calls ---

TEST_F(ContractTest, TokenizeAndDetokenizeAreInverse) {
  v1::TokenizeRequest request;
  request.set_text("Hello, wörld 你好 <|im_end|>");
  request.set_with_pieces(true);
  v1::TokenizeResponse tokens;
  grpc::ClientContext first;
  ASSERT_TRUE(stub_->Tokenize(&first, request, &tokens).ok());
  EXPECT_EQ(tokens.pieces_size(), tokens.ids_size());
  v1::DetokenizeRequest back;
  *back.mutable_ids() = tokens.ids();
  v1::DetokenizeResponse text;
  grpc::ClientContext second;
  ASSERT_TRUE(stub_->Detokenize(&second, back, &text).ok());
  EXPECT_EQ(text.text(), request.text());
  EXPECT_EQ(text.raw(), request.text());
}

// A packed id is a byte or two and may stand for a long word: the answer is bounded too.
TEST_F(ContractTest, DetokenizeBoundsItsAnswer) {
  v1::TokenizeRequest request;
  request.set_text(" freedom");
  v1::TokenizeResponse tokens;
  grpc::ClientContext first;
  ASSERT_TRUE(stub_->Tokenize(&first, request, &tokens).ok());
  v1::DetokenizeRequest back;
  const size_t repeats = (size_t{17} << 20) / request.text().size();
  back.mutable_ids()->Reserve(static_cast<int>(repeats) * tokens.ids_size());
  for (size_t i = 0; i < repeats; ++i) {
    for (const int32_t id : tokens.ids()) back.add_ids(id);
  }
  v1::DetokenizeResponse text;
  grpc::ClientContext second;
  const grpc::Status status = stub_->Detokenize(&second, back, &text);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(status.error_message().find("ids:"), std::string::npos) << status.error_message();
}

// A byte of text may become a piece, which takes many bytes here.
TEST_F(ContractTest, TokenizeBoundsItsPieces) {
  v1::TokenizeRequest request;
  request.set_text(std::string((size_t{1} << 20) + 1, '\1'));
  v1::TokenizeResponse tokens;
  grpc::ClientContext first;
  first.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(5));
  ASSERT_TRUE(stub_->Tokenize(&first, request, &tokens).ok());
  ASSERT_EQ(tokens.ids_size(), static_cast<int>(request.text().size()));
  request.set_with_pieces(true);
  grpc::ClientContext second;
  const grpc::Status status = stub_->Tokenize(&second, request, &tokens);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(status.error_message().find("with_pieces:"), std::string::npos);
}

TEST_F(ContractTest, DetokenizeRepairsHalfCharactersAndChecksIds) {
  v1::TokenizeRequest request;
  request.set_text("\xF0\x93\x80\x80");  // a hieroglyph, which takes several tokens
  v1::TokenizeResponse tokens;
  grpc::ClientContext first;
  ASSERT_TRUE(stub_->Tokenize(&first, request, &tokens).ok());
  ASSERT_GT(tokens.ids_size(), 1);
  v1::DetokenizeRequest back;
  back.add_ids(tokens.ids(0));
  v1::DetokenizeResponse text;
  grpc::ClientContext second;
  ASSERT_TRUE(stub_->Detokenize(&second, back, &text).ok());
  EXPECT_EQ(text.text(), "\xEF\xBF\xBD");
  for (const int32_t id : {-1, model_->vocab_size()}) {
    back.set_ids(0, id);
    grpc::ClientContext context;
    const grpc::Status status = stub_->Detokenize(&context, back, &text);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), StartsWith("ids[0]:"));
  }
}

TEST_F(ContractTest, TokenizeCountsWhatGenerateReads) {
  v1::TokenizeRequest request;
  v1::Message& message = *request.mutable_messages()->add_messages();
  message.set_role("user");
  message.set_content("What is entropy?");
  v1::TokenizeResponse tokens;
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->Tokenize(&context, request, &tokens).ok());
  v1::GenerateRequest generate;
  *generate.mutable_messages() = request.messages();
  ASSERT_TRUE(Generate(generate).status.ok());
  EXPECT_THAT(engine_->Requests()[0].prompt,
              ::testing::ElementsAreArray(tokens.ids().begin(), tokens.ids().end()));
}

TEST_F(ContractTest, GetModelTellsShapeAndDefaults) {
  v1::GetModelResponse model;
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->GetModel(&context, {}, &model).ok());
  EXPECT_EQ(model.name(), "fake");
  EXPECT_EQ(model.architecture(), "qwen2");
  EXPECT_EQ(model.kv_heads(), 2);
  EXPECT_EQ(model.chat_template(), "ChatML");
  EXPECT_EQ(model.default_policy().prefill().preset(), "entropy");
  EXPECT_EQ(model.default_policy().prefill().segment_tokens(), 512);
  EXPECT_EQ(model.default_policy().kv().preset(), "latent");
  EXPECT_THAT(model.prefill_presets(), Contains("entropy_paper"));
  EXPECT_THAT(model.kv_presets(), Contains("adakv"));
}

TEST_F(ContractTest, GetServerCountsAndItsLedgerAddsUp) {
  ASSERT_TRUE(Generate(TextRequest()).status.ok());
  FakeEngine::WaitFor([this] { return core_->Idle(); });
  v1::GetServerResponse server;
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->GetServer(&context, {}, &server).ok());
  EXPECT_EQ(server.state(), v1::GetServerResponse::STATE_SERVING);
  EXPECT_EQ(server.backend(), "cpu");
  EXPECT_EQ(server.load().completed(), 1);
  EXPECT_EQ(server.load().admitted(), 1);
  int64_t sum = 0;
  for (const v1::Memory::Entry& entry : server.memory().entries()) sum += entry.bytes();
  EXPECT_EQ(sum, server.memory().total_bytes());
  EXPECT_EQ(sum, 12345 + 1000 * 4096);
  EXPECT_EQ(server.limits().max_message_bytes(), 32 << 20);
}

TEST_F(ContractTest, SessionsBelongToTheEngine) {
  v1::Session session;
  grpc::ClientContext create;
  ASSERT_TRUE(stub_->CreateSession(&create, {}, &session).ok());
  v1::ForkSessionRequest fork;
  fork.set_session_id(session.id());
  v1::Session forked;
  grpc::ClientContext fork_context;
  ASSERT_TRUE(stub_->ForkSession(&fork_context, fork, &forked).ok());
  EXPECT_NE(forked.id(), session.id());
  v1::ListSessionsResponse list;
  grpc::ClientContext list_context;
  ASSERT_TRUE(stub_->ListSessions(&list_context, {}, &list).ok());
  EXPECT_EQ(list.sessions_size(), 2);
  v1::DeleteSessionRequest remove;
  remove.set_session_id(session.id());
  v1::DeleteSessionResponse removed;
  grpc::ClientContext delete_context;
  ASSERT_TRUE(stub_->DeleteSession(&delete_context, remove, &removed).ok());
  v1::GetSessionRequest get;
  get.set_session_id(session.id());
  grpc::ClientContext get_context;
  EXPECT_EQ(stub_->GetSession(&get_context, get, &session).error_code(),
            grpc::StatusCode::NOT_FOUND);
  v1::GenerateRequest request = TextRequest();
  request.set_session_id("no such session");
  EXPECT_EQ(Generate(request).status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ContractTest, CallsThatAreNotServedSaySo) {
  engine_->SetSessionsImplemented(false);
  v1::Session session;
  grpc::ClientContext create;
  EXPECT_EQ(stub_->CreateSession(&create, {}, &session).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  grpc::ClientContext compare;
  const auto reader = stub_->Compare(&compare, v1::CompareRequest());
  v1::CompareEvent event;
  EXPECT_FALSE(reader->Read(&event));
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_FALSE(status.error_message().empty());
}

}  // namespace
}  // namespace entropyserve
