#include "server/service.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/utf8.h"
#include "entropyserve/v1/entropyserve.grpc.pb.h"
#include "server/call_owner.h"
#include "server/compare_call.h"
#include "server/convert.h"
#include "server/generate_call.h"
#include "server/service_core.h"
#include "server/status.h"
#include "server/wire.h"

namespace entropyserve {
namespace {

using grpc::ByteBuffer;
using grpc::CallbackServerContext;
using grpc::ServerUnaryReactor;
using grpc::ServerWriteReactor;

// Every method is raw: see server/wire.h.
template <typename Base>
using RawSessions = v1::EntropyServe::WithRawCallbackMethod_CreateSession<
    v1::EntropyServe::WithRawCallbackMethod_GetSession<
        v1::EntropyServe::WithRawCallbackMethod_ListSessions<
            v1::EntropyServe::WithRawCallbackMethod_ForkSession<
                v1::EntropyServe::WithRawCallbackMethod_DeleteSession<Base>>>>>;
template <typename Base>
using RawText = v1::EntropyServe::WithRawCallbackMethod_Tokenize<
    v1::EntropyServe::WithRawCallbackMethod_Detokenize<Base>>;
template <typename Base>
using RawInfo = v1::EntropyServe::WithRawCallbackMethod_GetModel<
    v1::EntropyServe::WithRawCallbackMethod_GetServer<Base>>;
template <typename Base>
using RawStreams = v1::EntropyServe::WithRawCallbackMethod_Generate<
    v1::EntropyServe::WithRawCallbackMethod_Compare<Base>>;
using RawService = RawSessions<RawText<RawInfo<RawStreams<v1::EntropyServe::Service>>>>;

absl::Status TokenizeText(const ServedModel& model, const v1::TokenizeRequest& request,
                          KeepGoing keep_going, v1::TokenizeResponse* response) {
  std::vector<int32_t> ids;
  switch (request.input_case()) {
    case v1::TokenizeRequest::kText: {
      EncodeOptions options;
      options.add_bos = request.add_bos() && model.tokenizer->add_bos();
      options.parse_special = request.parse_special();
      options.keep_going = std::move(keep_going);
      ASSIGN_OR_RETURN(ids, model.tokenizer->Encode(request.text(), options));
      break;
    }
    case v1::TokenizeRequest::kMessages: {
      ASSIGN_OR_RETURN(ids, EncodeMessages(request.messages(), model, /*first_turn=*/true,
                                           std::move(keep_going)));
      break;
    }
    case v1::TokenizeRequest::INPUT_NOT_SET:
      return absl::InvalidArgumentError("input: expected text or messages");
  }
  response->mutable_ids()->Add(ids.begin(), ids.end());
  if (!request.with_pieces()) return absl::OkStatus();
  constexpr size_t kMaxPieces = size_t{1} << 20;  // a byte of the message may become one of 60 here
  if (ids.size() > kMaxPieces) {
    return absl::InvalidArgumentError(absl::StrCat("with_pieces: the text has ", ids.size(),
                                                   " tokens of at most ", kMaxPieces,
                                                   "; send less at a time, or ask for ids only"));
  }
  for (const int32_t id : ids) response->add_pieces(std::string(model.tokenizer->TokenBytes(id)));
  return absl::OkStatus();
}

absl::Status DetokenizeIds(const ServedModel& model, const v1::DetokenizeRequest& request,
                           KeepGoing /*answers are bounded*/, v1::DetokenizeResponse* response) {
  RETURN_IF_ERROR(CheckIds(request.ids(), model.vocab_size(), "ids"));
  // A packed id is a byte or two on the wire and may be a long word: bound the answer, not the
  // message.
  constexpr size_t kMaxAnswerBytes = size_t{16} << 20;
  size_t bytes = 0;
  for (const int32_t id : request.ids()) bytes += model.tokenizer->TokenBytes(id).size();
  if (bytes > kMaxAnswerBytes) {
    return absl::InvalidArgumentError(absl::StrCat("ids: their text has ", bytes,
                                                   " bytes of at most ", kMaxAnswerBytes,
                                                   "; send fewer at a time"));
  }
  for (const int32_t id : request.ids()) {
    if (request.skip_special() && model.tokenizer->IsControl(id)) continue;
    response->mutable_raw()->append(model.tokenizer->TokenBytes(id));
  }
  response->set_text(SanitizeUtf8(response->raw()));
  return absl::OkStatus();
}

void LoadToProto(const ServerGauges& gauges, v1::Load* load) {
  const EngineStats& stats = gauges.engine;
  load->set_running(stats.running);
  load->set_waiting(stats.waiting);
  load->set_queued_tokens(stats.queued_tokens);
  load->set_sessions(stats.sessions);
  load->set_open_streams(gauges.open_streams);
  load->set_encoding_bytes(gauges.short_lane_bytes + gauges.long_lane_bytes +
                           gauges.session_lane_bytes);
  load->set_admitted(stats.admitted);
  load->set_completed(stats.completed);
  load->set_cancelled(stats.cancelled);
  load->set_failed(stats.failed);
  load->set_prompt_tokens(stats.prompt_tokens);
  load->set_generated_tokens(stats.generated_tokens);
  load->set_steps(stats.steps);
}

void MemoryToProto(const EngineStats& stats, v1::Memory* memory) {
  int64_t total = 0;
  for (const auto& [name, bytes] : {std::pair{"weights", stats.weight_bytes},
                                    std::pair{"kv_pages", stats.pages_total * stats.page_bytes},
                                    std::pair{"activations", stats.activation_bytes}}) {
    v1::Memory::Entry& entry = *memory->add_entries();
    entry.set_name(name);
    entry.set_bytes(bytes);
    total += bytes;
  }
  memory->set_total_bytes(total);
  memory->set_pages_total(stats.pages_total);
  memory->set_pages_used(stats.pages_used);
  memory->set_page_bytes(stats.page_bytes);
}

void LimitsToProto(const ServiceLimits& limits, const ServedModel* model, v1::Limits* proto) {
  proto->set_max_message_bytes(limits.max_message_bytes);
  proto->set_default_deadline_seconds(limits.default_deadline_seconds);
  proto->set_max_deadline_seconds(limits.max_deadline_seconds);
  if (model == nullptr) return;
  proto->set_max_queue_requests(model->options.max_queue_requests);
  proto->set_max_queue_tokens(model->options.max_queue_tokens);
  proto->set_max_sequences(model->options.max_sequences);
  proto->set_max_whole_prompt_tokens(model->options.max_whole_prompt_tokens);
}

class Service final : public RawService {
 public:
  explicit Service(ServiceCore* core) : core_(core) {}

  ServerWriteReactor<ByteBuffer>* Generate(CallbackServerContext* context,
                                           const ByteBuffer* request) override {
    return StartGenerateCall(core_, context, *request);
  }

  ServerWriteReactor<ByteBuffer>* Compare(CallbackServerContext* context,
                                          const ByteBuffer* request) override {
    return StartCompareCall(core_, context, *request);
  }

  ServerUnaryReactor* Tokenize(CallbackServerContext* context, const ByteBuffer* request,
                               ByteBuffer* response) override {
    return InLane<v1::TokenizeRequest, v1::TokenizeResponse>("Tokenize", context, request, response,
                                                             TokenizeText);
  }

  ServerUnaryReactor* Detokenize(CallbackServerContext* context, const ByteBuffer* request,
                                 ByteBuffer* response) override {
    return InLane<v1::DetokenizeRequest, v1::DetokenizeResponse>("Detokenize", context, request,
                                                                 response, DetokenizeIds);
  }

  ServerUnaryReactor* GetModel(CallbackServerContext* context, const ByteBuffer* request,
                               ByteBuffer* response) override {
    return Unary<v1::GetModelRequest, v1::GetModelResponse>(
        "GetModel", context, request, response, [this](const auto&, const auto&, auto* out) {
          ASSIGN_OR_RETURN(const ServedModel* model, core_->Model());
          ModelToProto(*model, out);
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* GetServer(CallbackServerContext* context, const ByteBuffer* request,
                                ByteBuffer* response) override {
    return Unary<v1::GetServerRequest, v1::GetServerResponse>(
        "GetServer", context, request, response, [this](const auto&, const auto&, auto* out) {
          FillServer(out);
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* CreateSession(CallbackServerContext* context, const ByteBuffer* request,
                                    ByteBuffer* response) override {
    return InSessionLane<v1::CreateSessionRequest, v1::Session>(
        "CreateSession", context, request, response,
        [this](const std::string& owner, const auto&, v1::Session* out) {
          RETURN_IF_ERROR(core_->CheckAccepting());
          return Session([&](Engine& engine) { return engine.CreateSession(owner); }, out);
        });
  }

  ServerUnaryReactor* GetSession(CallbackServerContext* context, const ByteBuffer* request,
                                 ByteBuffer* response) override {
    return InSessionLane<v1::GetSessionRequest, v1::Session>(
        "GetSession", context, request, response,
        [this](const std::string& owner, const auto& in, v1::Session* out) {
          return Session([&](Engine& engine) { return engine.GetSession(owner, in.session_id()); },
                         out);
        });
  }

  ServerUnaryReactor* ListSessions(CallbackServerContext* context, const ByteBuffer* request,
                                   ByteBuffer* response) override {
    return InSessionLane<v1::ListSessionsRequest, v1::ListSessionsResponse>(
        "ListSessions", context, request, response,
        [this](const std::string& owner, const auto&, v1::ListSessionsResponse* out) {
          ASSIGN_OR_RETURN(const ServedModel* model, core_->Model());
          for (const SessionInfo& info : model->engine->ListSessions(owner)) {
            SessionToProto(info, out->add_sessions());
          }
          return absl::OkStatus();
        });
  }

  ServerUnaryReactor* ForkSession(CallbackServerContext* context, const ByteBuffer* request,
                                  ByteBuffer* response) override {
    return InSessionLane<v1::ForkSessionRequest, v1::Session>(
        "ForkSession", context, request, response,
        [this](const std::string& owner, const auto& in, v1::Session* out) {
          RETURN_IF_ERROR(core_->CheckAccepting());
          return Session([&](Engine& engine) { return engine.ForkSession(owner, in.session_id()); },
                         out);
        });
  }

  ServerUnaryReactor* DeleteSession(CallbackServerContext* context, const ByteBuffer* request,
                                    ByteBuffer* response) override {
    return InSessionLane<v1::DeleteSessionRequest, v1::DeleteSessionResponse>(
        "DeleteSession", context, request, response,
        [this](const std::string& owner, const auto& in, auto*) {
          ASSIGN_OR_RETURN(const ServedModel* model, core_->Model());
          return model->engine->DeleteSession(owner, in.session_id());
        });
  }

 private:
  absl::StatusOr<std::string> Owner(const CallbackServerContext& context) const {
    return CallOwner(context, core_->authenticator());
  }

  const absl::Status& Count(const char* method, const absl::Status& status) {
    core_->metrics().CountRequest(method, absl::StatusCodeToString(status.code()));
    return status;
  }

  // Answers at once, on gRPC's thread.
  template <typename Request, typename Response, typename Handle>
  ServerUnaryReactor* Unary(const char* method, CallbackServerContext* context,
                            const ByteBuffer* request, ByteBuffer* response, Handle handle) {
    ServerUnaryReactor* reactor = context->DefaultReactor();
    const absl::StatusOr<std::string> owner = Owner(*context);
    const absl::Status status =
        owner.ok() ? Answer<Request, Response>(*owner, request, response, handle) : owner.status();
    reactor->Finish(ToGrpcStatus(Count(method, status)));
    return reactor;
  }

  // The same on an encode lane, for work that grows with the message.
  template <typename Request, typename Response>
  ServerUnaryReactor* InLane(const char* method, CallbackServerContext* context,
                             const ByteBuffer* request, ByteBuffer* response,
                             absl::Status (*handle)(const ServedModel&, const Request&, KeepGoing,
                                                    Response*)) {
    const auto post = [this](int64_t bytes, auto job) {
      return core_->lanes().Post(bytes, std::move(job));
    };
    return Posted<Request, Response>(
        method, context, request, response, post,
        [=, this](const std::string&, const Request& in, Response* out) -> absl::Status {
          ASSIGN_OR_RETURN(const ServedModel* model, core_->Model());
          return handle(
              *model, in, [context] { return StillWanted(*context); }, out);
        });
  }

  // The same on the session lane, for work that waits for the engine.
  template <typename Request, typename Response, typename Handle>
  ServerUnaryReactor* InSessionLane(const char* method, CallbackServerContext* context,
                                    const ByteBuffer* request, ByteBuffer* response,
                                    Handle handle) {
    const auto post = [this](int64_t bytes, auto job) {
      return core_->lanes().PostSession(bytes, std::move(job));
    };
    return Posted<Request, Response>(method, context, request, response, post, handle);
  }

  template <typename Request, typename Response, typename Post, typename Handle>
  ServerUnaryReactor* Posted(const char* method, CallbackServerContext* context,
                             const ByteBuffer* request, ByteBuffer* response, Post post,
                             Handle handle) {
    ServerUnaryReactor* reactor = context->DefaultReactor();
    const absl::StatusOr<std::string> owner = Owner(*context);
    absl::Status status = owner.status();
    if (status.ok()) {
      // gRPC keeps context, request and response until Finish.
      status = post(static_cast<int64_t>(request->Length()),
                    [this, method, context, request, response, reactor, handle, owner = *owner] {
                      absl::Status done = StillWanted(*context);
                      if (done.ok()) {
                        done = Answer<Request, Response>(owner, request, response, handle);
                      }
                      reactor->Finish(ToGrpcStatus(Count(method, done)));
                    });
    }
    if (!status.ok()) reactor->Finish(ToGrpcStatus(Count(method, status)));
    return reactor;
  }

  static absl::Status StillWanted(const CallbackServerContext& context) {
    return context.IsCancelled() ? absl::CancelledError("cancelled by the caller")
                                 : absl::OkStatus();
  }

  // Parses, runs `handle(owner, request, response)`, serializes.
  template <typename Request, typename Response, typename Handle>
  static absl::Status Answer(const std::string& owner, const ByteBuffer* request,
                             ByteBuffer* response, const Handle& handle) {
    Request in;
    RETURN_IF_ERROR(ParseMessage(*request, Request::descriptor()->name().c_str(), &in));
    Response out;
    RETURN_IF_ERROR(handle(owner, in, &out));
    *response = SerializeMessage(out);
    return absl::OkStatus();
  }

  template <typename Call>
  absl::Status Session(Call call, v1::Session* out) {
    ASSIGN_OR_RETURN(const ServedModel* model, core_->Model());
    ASSIGN_OR_RETURN(const SessionInfo info, call(*model->engine));
    SessionToProto(info, out);
    return absl::OkStatus();
  }

  void FillServer(v1::GetServerResponse* out) {
    const absl::StatusOr<const ServedModel*> model = core_->Model();
    out->set_version(ENTROPYSERVE_VERSION);
    out->set_uptime_seconds(core_->uptime_seconds());
    out->set_state(core_->draining() ? v1::GetServerResponse::STATE_DRAINING
                   : model.ok()      ? v1::GetServerResponse::STATE_SERVING
                                     : v1::GetServerResponse::STATE_STARTING);
    const ServerGauges gauges = core_->Gauges();
    LoadToProto(gauges, out->mutable_load());
    MemoryToProto(gauges.engine, out->mutable_memory());
    LimitsToProto(core_->limits(), model.ok() ? *model : nullptr, out->mutable_limits());
    if (model.ok()) out->set_backend((*model)->backend);
  }

  ServiceCore* const core_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeService(ServiceCore* core) {
  return std::make_unique<Service>(core);
}

}  // namespace entropyserve
