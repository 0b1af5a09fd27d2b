// Wire messages to the engine's types and back. Everything a caller can get wrong is found here or
// in the engine's Validate functions, as INVALID_ARGUMENT whose message starts with the field's
// path.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "entropyserve/v1/entropyserve.pb.h"
#include "server/served_model.h"

namespace entropyserve {

absl::StatusOr<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto, int vocab_size);

// Overrides on top of the proto's preset, or of `defaults` when it names none. `field`:
// "policy.prefill".
absl::StatusOr<PrefillPolicy> PrefillFromProto(const v1::PrefillPolicy& proto,
                                               const PrefillPolicy& defaults,
                                               std::string_view field);
absl::StatusOr<KvPolicy> KvFromProto(const v1::KvPolicy& proto, const KvPolicy& defaults,
                                     std::string_view field);

// Every parameter filled in.
void PolicyToProto(const PrefillPolicy& prefill, const KvPolicy& kv, v1::Policy* proto);

// Everything of a request but its prompt, owner and deadline.
absl::StatusOr<EngineRequest> RequestFromProto(const v1::GenerateRequest& proto,
                                               const ServedModel& model);

// The prompt's ids. `first_turn`: nothing is in the session yet. FAILED_PRECONDITION with
// NO_CHAT_TEMPLATE: `messages` with a model whose template is not known.
absl::StatusOr<std::vector<int32_t>> EncodePrompt(const v1::GenerateRequest& proto,
                                                  const ServedModel& model, bool first_turn,
                                                  KeepGoing keep_going);
absl::StatusOr<std::vector<int32_t>> EncodeMessages(const v1::Messages& proto,
                                                    const ServedModel& model, bool first_turn,
                                                    KeepGoing keep_going);
// Everything of a comparison but its deadline; what depends on the text's length is the engine's to
// check.
absl::StatusOr<CompareRequest> CompareFromProto(const v1::CompareRequest& proto,
                                                const ServedModel& model);
void ComparedToProto(const ComparePosition& position, v1::ComparedPosition* proto);
void CompareToProto(const CompareResult& result, v1::CompareSummary* proto);
// Each id in [0, vocab_size); `field` names the list.
absl::Status CheckIds(const google::protobuf::RepeatedField<int32_t>& ids, int vocab_size,
                      std::string_view field);

// Events.
void AcceptedToProto(const AcceptedEvent& event, v1::GenerateEvent* proto);
void TokensToProto(TokensEvent event, v1::GenerateEvent* proto);
void FinishedToProto(const FinishedEvent& event, const v1::Policy& policy,
                     v1::GenerateEvent* proto);
// A trace as events of bounded size: each holds one layer, or a part of a large one.
class TraceEvents {
 public:
  explicit TraceEvents(std::shared_ptr<const Trace> trace) : trace_(std::move(trace)) {}

  bool done() const { return layer_ >= trace_->layers; }
  void Next(v1::GenerateEvent* proto);  // not when done

 private:
  void TakeCells(v1::LayerTrace* to);
  void TakeKept(v1::LayerTrace* to);

  std::shared_ptr<const Trace> trace_;
  int32_t layer_ = 0;
  // What comes next of the layer.
  size_t cell_ = 0;
  size_t head_ = 0;
  size_t kept_ = 0;  // in the head's list
  size_t room_ = 0;  // numbers that fit into the event
};

void SessionToProto(const SessionInfo& info, v1::Session* proto);
void ModelToProto(const ServedModel& model, v1::GetModelResponse* proto);

}  // namespace entropyserve
