#include "server/model_loader.h"

#include <utility>

#include "engine/base/status_macros.h"
#include "engine/engine_factory.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/synthetic.h"
#include "proto/policy_flags.h"
#include "server/convert.h"

namespace entropyserve {
namespace {

EngineConfig ToEngineConfig(const ServerFlags& flags) {
  EngineConfig config;
  config.model_path = flags.model;
  config.backend = flags.backend;
  config.dtype = flags.dtype;
  config.linear_dtype = flags.linear_dtype;
  config.threads = flags.threads;
  config.options.max_context = flags.max_context;
  config.options.kv_bytes = flags.kv_bytes;
  config.options.max_sequences = flags.max_sequences;
  config.options.max_queue_requests = flags.max_queue_requests;
  config.options.max_queue_tokens = flags.max_queue_tokens;
  config.options.max_owner_requests = flags.max_key_requests;
  config.options.max_owner_queue_tokens = flags.max_key_queue_tokens;
  config.options.max_owner_sessions = flags.max_key_sessions;
  config.options.max_owner_session_bytes = flags.max_key_session_bytes;
  config.options.refuse_late = flags.refuse_late_requests;
  config.options.step_tokens = flags.step_tokens;
  config.options.lone_chunk_tokens = flags.lone_chunk_tokens;
  config.options.max_whole_prompt_tokens = flags.max_whole_prompt_tokens;
  config.options.session_ttl_seconds = flags.session_ttl_seconds;
  config.options.session_device_bytes = flags.session_device_bytes;
  config.options.session_host_bytes = flags.session_host_bytes;
  config.options.session_dir = flags.session_dir;
  config.options.session_dir_bytes = flags.session_dir_bytes;
  return config;
}

}  // namespace

absl::Status SetRequestDefaults(const ServerFlags& flags, ServedModel* model) {
  const auto prefill =
      PrefillFromProto(flags.policy.prefill(), PrefillPolicy(), "--prefill-policy");
  if (!prefill.ok()) return NameFlag(prefill.status());
  const auto kv = KvFromProto(flags.policy.kv(), KvPolicy(), "--kv-policy");
  if (!kv.ok()) return NameFlag(kv.status());
  model->prefill = *prefill;
  model->kv = *kv;
  if (flags.seed.has_value()) model->seed = static_cast<uint64_t>(*flags.seed);
  return absl::OkStatus();
}

absl::Status CheckModelFiles(const ServerFlags& flags) {
  if (flags.model.starts_with(kSyntheticPrefix)) {
    return OpenSynthetic(flags.model.substr(kSyntheticPrefix.size())).status();
  }
  return Checkpoint::Open(flags.model).status();
}

absl::StatusOr<std::unique_ptr<ServedModel>> LoadServedModel(
    const ServerFlags& flags, std::shared_ptr<EngineObserver> observer,
    std::function<void(const std::string&)> on_device_error) {
  auto model = std::make_unique<ServedModel>();
  RETURN_IF_ERROR(SetRequestDefaults(flags, model.get()));
  EngineConfig config = ToEngineConfig(flags);
  config.on_device_error = std::move(on_device_error);
  config.observer = std::move(observer);
  ASSIGN_OR_RETURN(LoadedEngine loaded, LoadEngine(config));
  model->name = flags.model_name.empty() ? loaded.config.name : flags.model_name;
  model->config = std::move(loaded.config);
  model->dtype = loaded.dtype == DType::kBF16 ? "bf16" : "f32";
  model->linear_dtype = loaded.linear_dtype == DType::kE4M3 ? "fp8" : model->dtype;
  model->backend = loaded.backend;
  model->gpu_unused = loaded.gpu_unused;
  model->parameters = loaded.parameters;
  model->context_tokens = loaded.context;
  model->options = loaded.options;
  model->tokenizer = std::move(loaded.tokenizer);
  model->chat = ChatTemplate::Create(*model->tokenizer);
  model->engine = std::move(loaded.engine);
  return model;
}

}  // namespace entropyserve
