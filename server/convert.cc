#include "server/convert.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

absl::Status CheckRequestId(const std::string& id) {
  const bool printable =
      std::all_of(id.begin(), id.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (id.size() <= kMaxRequestIdBytes && printable) return absl::OkStatus();
  return absl::InvalidArgumentError("request_id: expected at most 128 printable ASCII characters");
}

std::string_view Name(Pooling pooling) { return pooling == Pooling::kMax ? "max" : "average"; }

absl::StatusOr<Pooling> ParsePooling(const std::string& name, std::string_view field) {
  if (name == "average") return Pooling::kAverage;
  if (name == "max") return Pooling::kMax;
  return absl::InvalidArgumentError(absl::StrCat(View(field), ": expected average or max"));
}

double Ratio(double part, double whole, double otherwise) {
  return whole > 0 ? part / whole : otherwise;
}

}  // namespace

absl::StatusOr<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto, int vocab_size) {
  SamplingParams params;
  if (proto.has_temperature()) params.temperature = proto.temperature();
  if (proto.has_top_p()) params.top_p = proto.top_p();
  if (proto.has_top_k()) params.top_k = proto.top_k();
  if (proto.has_min_p()) params.min_p = proto.min_p();
  if (proto.has_repetition_penalty()) params.repetition_penalty = proto.repetition_penalty();
  if (proto.has_presence_penalty()) params.presence_penalty = proto.presence_penalty();
  if (proto.has_frequency_penalty()) params.frequency_penalty = proto.frequency_penalty();
  if (proto.has_seed()) params.seed = proto.seed();
  params.stop.assign(proto.stop().begin(), proto.stop().end());
  params.stop_token_ids.assign(proto.stop_token_ids().begin(), proto.stop_token_ids().end());
  if (proto.has_max_new_tokens()) params.max_new_tokens = proto.max_new_tokens();
  if (proto.has_min_new_tokens()) params.min_new_tokens = proto.min_new_tokens();
  params.ignore_eos = proto.ignore_eos();
  if (proto.has_logprobs()) {
    if (proto.logprobs() < 0) {  // -1 means "none" inside; on the wire that is an absent field
      return absl::InvalidArgumentError(
          absl::StrCat("sampling.logprobs: expected 0 to ", kMaxLogprobs));
    }
    params.logprobs = proto.logprobs();
  }
  params.forced_token_ids.assign(proto.forced_token_ids().begin(), proto.forced_token_ids().end());
  RETURN_IF_ERROR(Validate(params, vocab_size));
  return params;
}

absl::StatusOr<PrefillPolicy> PrefillFromProto(const v1::PrefillPolicy& proto,
                                               const PrefillPolicy& defaults,
                                               std::string_view field) {
  const std::string prefix(field);
  PrefillPolicy policy = defaults;
  if (proto.has_preset()) {
    ASSIGN_OR_RETURN(policy, PrefillPreset(proto.preset(), prefix + ".preset"));
  }
  PrefillParams& params = policy.params;
  if (proto.has_estimator()) {
    ASSIGN_OR_RETURN(params.estimator, ParseEstimator(proto.estimator(), prefix + ".estimator"));
  }
  if (proto.has_budget()) {
    ASSIGN_OR_RETURN(params.budget, ParseBudgetRule(proto.budget(), prefix + ".budget"));
  }
  if (proto.has_forced()) params.forced = proto.forced();
  if (proto.has_correction()) params.correction = proto.correction();
  if (proto.has_segment_tokens()) params.segment = proto.segment_tokens();
  if (proto.has_block_tokens()) params.block = proto.block_tokens();
  if (proto.has_probe_stride()) params.probe_stride = proto.probe_stride();
  if (proto.has_dense_prefix_tokens()) params.dense_prefix = proto.dense_prefix_tokens();
  if (proto.has_dense_suffix_tokens()) params.dense_suffix = proto.dense_suffix_tokens();
  if (proto.has_first_sparse_layer()) params.first_sparse_layer = proto.first_sparse_layer();
  if (proto.has_base_tokens()) params.base = proto.base_tokens();
  if (proto.has_e_t()) params.e_t = proto.e_t();
  if (proto.has_delta()) params.delta = proto.delta();
  if (proto.has_alpha()) params.alpha = proto.alpha();
  if (proto.has_temperature()) params.temperature = proto.temperature();
  if (proto.has_coverage()) params.coverage = proto.coverage();
  if (proto.has_coverage_min_tokens()) params.coverage_min = proto.coverage_min_tokens();
  if (proto.has_coverage_max_tokens()) params.coverage_max = proto.coverage_max_tokens();
  RETURN_IF_ERROR(Validate(policy, prefix));
  return policy;
}

absl::StatusOr<KvPolicy> KvFromProto(const v1::KvPolicy& proto, const KvPolicy& defaults,
                                     std::string_view field) {
  const std::string prefix(field);
  KvPolicy policy = defaults;
  if (proto.has_preset()) {
    ASSIGN_OR_RETURN(policy, KvPreset(proto.preset(), prefix + ".preset"));
  }
  KvParams& params = policy.params;
  if (proto.has_budget_tokens()) params.budget = proto.budget_tokens();
  if (proto.has_fraction()) params.fraction = proto.fraction();
  if (proto.has_gap_tokens()) params.gap = proto.gap_tokens();
  if (proto.has_window_tokens()) params.window = proto.window_tokens();
  if (proto.has_pooling()) {
    ASSIGN_OR_RETURN(params.pooling, ParsePooling(proto.pooling(), prefix + ".pooling"));
  }
  if (proto.has_pool_before()) params.pool_before = proto.pool_before();
  if (proto.has_pool_after()) params.pool_after = proto.pool_after();
  if (proto.has_keep_sinks()) params.keep_sinks = proto.keep_sinks();
  if (proto.has_adakv_floor()) params.adakv_floor = proto.adakv_floor();
  RETURN_IF_ERROR(Validate(policy, prefix));
  return policy;
}

void PolicyToProto(const PrefillPolicy& prefill, const KvPolicy& kv, v1::Policy* proto) {
  v1::PrefillPolicy& p = *proto->mutable_prefill();
  p.set_preset(prefill.name);
  p.set_estimator(std::string(Name(prefill.params.estimator)));
  p.set_budget(std::string(Name(prefill.params.budget)));
  p.set_forced(prefill.params.forced);
  p.set_correction(prefill.params.correction);
  p.set_segment_tokens(prefill.params.segment);
  p.set_block_tokens(prefill.params.block);
  p.set_probe_stride(prefill.params.probe_stride);
  p.set_dense_prefix_tokens(prefill.params.dense_prefix);
  p.set_dense_suffix_tokens(prefill.params.dense_suffix);
  p.set_first_sparse_layer(prefill.params.first_sparse_layer);
  p.set_base_tokens(prefill.params.base);
  p.set_e_t(prefill.params.e_t);
  p.set_delta(prefill.params.delta);
  p.set_alpha(prefill.params.alpha);
  p.set_temperature(prefill.params.temperature);
  p.set_coverage(prefill.params.coverage);
  p.set_coverage_min_tokens(prefill.params.coverage_min);
  p.set_coverage_max_tokens(prefill.params.coverage_max);
  v1::KvPolicy& k = *proto->mutable_kv();
  k.set_preset(kv.name);
  k.set_budget_tokens(kv.params.budget);
  k.set_fraction(kv.params.fraction);
  k.set_gap_tokens(kv.params.gap);
  k.set_window_tokens(kv.params.window);
  k.set_pooling(std::string(Name(kv.params.pooling)));
  k.set_pool_before(kv.params.pool_before);
  k.set_pool_after(kv.params.pool_after);
  k.set_keep_sinks(kv.params.keep_sinks);
  k.set_adakv_floor(kv.params.adakv_floor);
}

absl::StatusOr<EngineRequest> RequestFromProto(const v1::GenerateRequest& proto,
                                               const ServedModel& model) {
  RETURN_IF_ERROR(CheckRequestId(proto.request_id()));
  if (proto.input_case() == v1::GenerateRequest::INPUT_NOT_SET) {
    return absl::InvalidArgumentError("input: expected text, token_ids or messages");
  }
  if (proto.keep_on_disconnect() && proto.session_id().empty()) {
    return absl::InvalidArgumentError("keep_on_disconnect: needs a session_id");
  }
  EngineRequest request;
  request.request_id = proto.request_id();
  request.session_id = proto.session_id();
  request.progress = proto.progress();
  request.trace = proto.trace();
  ASSIGN_OR_RETURN(request.sampling, SamplingFromProto(proto.sampling(), model.vocab_size()));
  if (!request.sampling.seed.has_value()) request.sampling.seed = model.seed;
  ASSIGN_OR_RETURN(request.prefill,
                   PrefillFromProto(proto.policy().prefill(), model.prefill, "policy.prefill"));
  ASSIGN_OR_RETURN(request.kv, KvFromProto(proto.policy().kv(), model.kv, "policy.kv"));
  if (proto.has_messages()) {
    request.strip_leading_space = true;
    if (model.chat.ok()) request.end_of_turn = model.chat->end_of_turn_ids();
  }
  return request;
}

absl::StatusOr<CompareRequest> CompareFromProto(const v1::CompareRequest& proto,
                                                const ServedModel& model) {
  CompareRequest request;
  const auto& ids = proto.token_ids().ids();
  RETURN_IF_ERROR(CheckIds(ids, model.vocab_size(), "token_ids"));
  request.tokens.assign(ids.begin(), ids.end());
  request.score_from = proto.score_from();
  request.decode_from = proto.decode_from();
  const v1::Policy &a = proto.policy_a(), &b = proto.policy_b();
  ASSIGN_OR_RETURN(request.prefill_a,
                   PrefillFromProto(a.prefill(), model.prefill, "policy_a.prefill"));
  ASSIGN_OR_RETURN(request.kv_a, KvFromProto(a.kv(), model.kv, "policy_a.kv"));
  ASSIGN_OR_RETURN(request.prefill_b,
                   PrefillFromProto(b.prefill(), model.prefill, "policy_b.prefill"));
  ASSIGN_OR_RETURN(request.kv_b, KvFromProto(b.kv(), model.kv, "policy_b.kv"));
  return request;
}

void ComparedToProto(const ComparePosition& position, v1::ComparedPosition* proto) {
  proto->set_position(position.position);
  proto->set_kl(position.kl);
  proto->set_top1_equal(position.top1_equal);
  proto->set_logprob_a(position.logprob_a);
  proto->set_logprob_b(position.logprob_b);
}

void CompareToProto(const CompareResult& result, v1::CompareSummary* proto) {
  proto->set_attention_flops_a(result.attention_flops_a);
  proto->set_attention_flops_b(result.attention_flops_b);
  proto->set_attention_flops_dense(result.attention_flops_dense);
  proto->set_prefill_seconds_a(result.prefill_seconds_a);
  proto->set_prefill_seconds_b(result.prefill_seconds_b);
  proto->set_kv_bytes_a(result.kv_bytes_a);
  proto->set_kv_bytes_b(result.kv_bytes_b);
}

absl::Status CheckIds(const google::protobuf::RepeatedField<int32_t>& ids, int vocab_size,
                      std::string_view field) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(View(field), "[", i, "]: ", ids[i], " is not in [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> EncodeMessages(const v1::Messages& proto,
                                                    const ServedModel& model, bool first_turn,
                                                    KeepGoing keep_going) {
  if (!model.chat.ok()) return WithReason(model.chat.status(), kNoChatTemplate);
  constexpr int kMaxMessages = 65536;  // an empty one takes 2 bytes on the wire and 80 here
  if (proto.messages_size() > kMaxMessages) {
    return absl::InvalidArgumentError(
        absl::StrCat("messages: ", proto.messages_size(), " of at most ", kMaxMessages));
  }
  if (proto.messages_size() > 0 && proto.messages().rbegin()->role() == "assistant") {
    return absl::InvalidArgumentError(absl::StrCat("messages[", proto.messages_size() - 1,
                                                   "].role: the last message is the assistant's; "
                                                   "the model answers a user's"));
  }
  std::vector<ChatMessage> messages;
  messages.reserve(proto.messages_size());
  for (const v1::Message& message : proto.messages()) {
    messages.push_back({message.role(), message.content()});
  }
  RenderOptions options;
  options.first_turn = first_turn;
  options.keep_going = std::move(keep_going);
  if (proto.has_enable_thinking()) options.enable_thinking = proto.enable_thinking();
  return model.chat->Render(messages, options);
}

absl::StatusOr<std::vector<int32_t>> EncodePrompt(const v1::GenerateRequest& proto,
                                                  const ServedModel& model, bool first_turn,
                                                  KeepGoing keep_going) {
  std::vector<int32_t> ids;
  switch (proto.input_case()) {
    case v1::GenerateRequest::kText: {
      EncodeOptions options;
      options.add_bos = first_turn && model.tokenizer->add_bos();
      options.parse_special = proto.parse_special();
      options.text_start = first_turn;
      options.keep_going = std::move(keep_going);
      ASSIGN_OR_RETURN(ids, model.tokenizer->Encode(proto.text(), options));
      if (proto.text().empty()) return absl::InvalidArgumentError("text: empty");
      break;
    }
    case v1::GenerateRequest::kTokenIds:
      if (proto.token_ids().ids().empty()) return absl::InvalidArgumentError("token_ids: empty");
      RETURN_IF_ERROR(CheckIds(proto.token_ids().ids(), model.vocab_size(), "token_ids.ids"));
      ids.assign(proto.token_ids().ids().begin(), proto.token_ids().ids().end());
      break;
    case v1::GenerateRequest::kMessages: {
      ASSIGN_OR_RETURN(ids,
                       EncodeMessages(proto.messages(), model, first_turn, std::move(keep_going)));
      break;
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      return absl::InvalidArgumentError("input: expected text, token_ids or messages");
  }
  if (static_cast<int64_t>(ids.size()) > model.context_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt: ", ids.size(), " tokens, the context holds ", model.context_tokens));
  }
  return ids;
}

void AcceptedToProto(const AcceptedEvent& event, v1::GenerateEvent* proto) {
  v1::Accepted& accepted = *proto->mutable_accepted();
  accepted.set_prompt_tokens(event.prompt_tokens);
  accepted.set_session_tokens(event.session_tokens);
  accepted.set_queue_position(event.queue_position);
  accepted.set_estimated_ttft_seconds(event.estimated_ttft_seconds);
}

void TokensToProto(TokensEvent event, v1::GenerateEvent* proto) {
  v1::Tokens& tokens = *proto->mutable_tokens();
  tokens.mutable_ids()->Add(event.ids.begin(), event.ids.end());
  tokens.set_text(std::move(event.text));
  for (const TokenLogprobs& from : event.logprobs) {
    v1::TokenLogprobs& to = *tokens.add_logprobs();
    to.set_logprob(from.logprob);
    for (const auto& [id, logprob] : from.top) {
      v1::TokenLogprob& top = *to.add_top();
      top.set_id(id);
      top.set_logprob(logprob);
    }
  }
}

namespace {

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kStopString:
      return v1::FINISH_REASON_STOP_STRING;
    case FinishReason::kStopToken:
      return v1::FINISH_REASON_STOP_TOKEN;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
    case FinishReason::kError:
      return v1::FINISH_REASON_ERROR;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

}  // namespace

void FinishedToProto(const FinishedEvent& event, const v1::Policy& policy,
                     v1::GenerateEvent* proto) {
  v1::Finished& finished = *proto->mutable_finished();
  finished.set_reason(ToProto(event.reason));
  finished.set_stop_string(event.stop_string);
  const Receipt& from = event.receipt;
  v1::Receipt& to = *finished.mutable_receipt();
  to.set_prompt_tokens(from.prompt_tokens);
  to.set_cached_tokens(from.cached_tokens);
  to.set_generated_tokens(from.generated_tokens);
  to.set_queue_seconds(from.queue_seconds);
  to.set_prefill_seconds(from.prefill_seconds);
  to.set_ttft_seconds(from.ttft_seconds);
  to.set_decode_seconds(from.decode_seconds);
  to.set_total_seconds(from.total_seconds);
  to.set_attention_flops_executed(from.attention_flops_executed);
  to.set_attention_flops_dense(from.attention_flops_dense);
  to.set_attention_flops_ratio(Ratio(from.attention_flops_executed, from.attention_flops_dense, 1));
  to.set_rigid_share(from.rigid_share);
  to.set_kv_bytes_before(from.kv_bytes_before);
  to.set_kv_bytes_after(from.kv_bytes_after);
  to.set_kv_bytes_ratio(Ratio(static_cast<double>(from.kv_bytes_after),
                              static_cast<double>(from.kv_bytes_before), 1));
  to.set_compressed(from.compressed);
  to.set_seed(from.seed);
  *to.mutable_policy() = policy;
}

void TraceEvents::Next(v1::GenerateEvent* proto) {
  // Numbers in one event. The longest, -1, takes 10 bytes; gRPC's clients take 4 MiB by default.
  constexpr size_t kNumbers = 1 << 17;
  room_ = kNumbers;
  v1::LayerTrace* const to = proto->mutable_trace();
  to->set_layer(layer_);
  to->set_layers(trace_->layers);
  to->set_kv_heads(trace_->kv_heads);
  to->set_segments(trace_->segments);
  to->set_segment_tokens(trace_->segment);
  to->set_block_tokens(trace_->block);
  TakeCells(to);
  TakeKept(to);
  if (room_ == 0) return;  // there may be more
  ++layer_;
  cell_ = head_ = kept_ = 0;
}

void TraceEvents::TakeCells(v1::LayerTrace* to) {
  const size_t row = static_cast<size_t>(trace_->kv_heads) * trace_->segments;
  const size_t count = std::min(row - cell_, room_ / 3);
  const auto take = [&](const auto& values, auto* out) {
    const size_t begin = std::min(values.size(), row * layer_ + cell_);
    const size_t end = std::min(values.size(), begin + count);
    out->Add(values.begin() + begin, values.begin() + end);
  };
  take(trace_->entropy, to->mutable_entropy());
  take(trace_->budget, to->mutable_budget());
  take(trace_->selected, to->mutable_selected());
  cell_ += count;
  room_ = cell_ < row ? 0 : room_ - 3 * count;
}

void TraceEvents::TakeKept(v1::LayerTrace* to) {
  const size_t heads = trace_->kept_positions.empty() ? 0 : trace_->kv_heads;
  to->set_continues_kept(kept_ > 0);
  for (; head_ < heads && room_ > 0; ++head_, kept_ = 0) {
    const std::vector<int32_t>& all = trace_->kept_positions[layer_ * heads + head_];
    const size_t count = std::min(all.size() - kept_, room_);
    to->add_kept()->mutable_positions()->Add(all.begin() + kept_, all.begin() + kept_ + count);
    kept_ += count;
    room_ -= count;
    if (kept_ < all.size()) return;
  }
}

namespace {

v1::Session::Tier ToProto(SessionTier tier) {
  switch (tier) {
    case SessionTier::kDevice:
      return v1::Session::TIER_DEVICE;
    case SessionTier::kHost:
      return v1::Session::TIER_HOST;
    case SessionTier::kDisk:
      return v1::Session::TIER_DISK;
  }
  return v1::Session::TIER_UNSPECIFIED;
}

}  // namespace

void SessionToProto(const SessionInfo& info, v1::Session* proto) {
  proto->set_id(info.id);
  proto->set_positions(info.positions);
  proto->set_kept_tokens(info.kept_tokens);
  proto->set_kv_bytes(info.kv_bytes);
  proto->set_turns(info.turns);
  proto->set_busy(info.busy);
  proto->set_idle_seconds(info.idle_seconds);
  proto->set_kv_policy(info.kv_policy);
  proto->set_tier(ToProto(info.tier));
}

void ModelToProto(const ServedModel& model, v1::GetModelResponse* proto) {
  const ModelConfig& config = model.config;
  proto->set_name(model.name);
  proto->set_architecture(config.family);
  proto->set_dtype(model.dtype);
  proto->set_parameters(model.parameters);
  proto->set_layers(config.layers);
  proto->set_heads(config.heads);
  proto->set_kv_heads(config.kv_heads);
  proto->set_head_dim(config.head_dim);
  proto->set_hidden_size(config.hidden);
  proto->set_vocab_size(config.vocab);
  proto->set_context_tokens(model.context_tokens);
  proto->set_model_context_tokens(config.context);
  if (model.chat.ok()) proto->set_chat_template(std::string(model.chat->family_name()));
  const std::vector<int32_t>& ends = model.tokenizer->eos_ids();
  proto->mutable_end_token_ids()->Add(ends.begin(), ends.end());
  proto->set_bos_token_id(model.tokenizer->bos_id().value_or(-1));
  PolicyToProto(model.prefill, model.kv, proto->mutable_default_policy());
  for (const std::string& name : PrefillPresetNames()) proto->add_prefill_presets(name);
  for (const std::string& name : KvPresetNames()) proto->add_kv_presets(name);
}

}  // namespace entropyserve
