#include "engine/engine_factory.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/cache/page_pool.h"
#include "engine/make_backend.h"
#include "engine/model/transformer.h"
#include "engine/model_identity.h"
#include "engine/text/byte_tokenizer.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/gguf_tokenizer.h"
#include "engine/weights/synthetic.h"

namespace entropyserve {
namespace {

constexpr int64_t kLargestSegment = 1024;  // tokens; see engine/policy/policy.cc

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenCheckpoint(const std::string& path) {
  if (path.starts_with(kSyntheticPrefix))
    return OpenSynthetic(path.substr(kSyntheticPrefix.size()));
  return Checkpoint::Open(path);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> OpenTokenizer(const Checkpoint& checkpoint) {
  if (checkpoint.path().starts_with(kSyntheticPrefix))
    return MakeByteTokenizer(checkpoint.config().vocab);
  if (!checkpoint.is_gguf()) return LoadTokenizer(checkpoint.path());
  ASSIGN_OR_RETURN(GgufTokenizerData data, ReadGgufTokenizer(checkpoint.path()));
  return MakeGgufTokenizer(std::move(data));
}

absl::StatusOr<DType> ResolveDType(const std::string& name, const Backend& backend) {
  if (name == "auto") return backend.AutoDType();
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  return absl::InvalidArgumentError(absl::StrCat("--dtype: '", name, "' is not auto, f32 or bf16"));
}

absl::StatusOr<DType> ResolveLinearDType(const std::string& name, DType dtype,
                                         const Backend& backend) {
  if (name == "auto") return dtype;
  if (name != "bf16" && name != "fp8") {
    return absl::InvalidArgumentError(
        absl::StrCat("--linear-dtype: '", name, "' is not auto, bf16 or fp8"));
  }
  if (dtype != DType::kBF16) {
    return absl::InvalidArgumentError(
        absl::StrCat("--linear-dtype: ", name, " goes with --dtype=bf16, not ", Name(dtype)));
  }
  if (name == "bf16") return dtype;
  if (!backend.HasFastE4M3()) {
    return absl::FailedPreconditionError(
        absl::StrCat("--linear-dtype=fp8 needs a GPU of compute capability 9.0 (Hopper); this is ",
                     backend.Description()));
  }
  return DType::kE4M3;
}

// Steps are sized for at most about a second: a GPU reads ten thousand tokens in that time, a CPU
// of a few cores a thousand.
EngineOptions ResolveOptions(EngineOptions options, const ModelConfig& config, bool cpu) {
  constexpr int64_t kCpuStep = 512, kCpuLoneChunk = 1024, kGpuStep = 4096, kGpuLoneChunk = 16384;
  if (options.step_tokens == 0) options.step_tokens = cpu ? kCpuStep : kGpuStep;
  if (options.lone_chunk_tokens == 0)
    options.lone_chunk_tokens = cpu ? kCpuLoneChunk : kGpuLoneChunk;
  // A step holds every decoding sequence and one segment at least.
  options.step_tokens = std::max<int64_t>(options.step_tokens, options.max_sequences + 1);
  options.lone_chunk_tokens = std::max(options.lone_chunk_tokens, kLargestSegment);
  if (options.max_context == 0) options.max_context = config.context;
  return options;
}

// Pages of the KV pool: as asked for, or what a machine at hand can spare.
absl::StatusOr<int64_t> ResolvePages(const EngineOptions& options, const Model& model,
                                     const Backend& backend, bool cpu) {
  const int64_t page_bytes = PagePool::PageBytes(model.dtype(), model.config().head_dim);
  const AttentionShape shape = model.shape();
  const int64_t heads = int64_t{shape.layers} * shape.kv_heads;
  int64_t bytes = options.kv_bytes;
  const int64_t available = int64_t(backend.FreeMemory());
  if (bytes > available) {
    return absl::ResourceExhaustedError(
        absl::StrCat("--kv-bytes: ", bytes, " bytes are asked for, ", available, " are free"));
  }
  if (bytes == 0) {
    // A CPU's memory is shared with everything else: at most a few whole contexts, and half of it.
    constexpr int64_t kCpuContexts = 4;
    const int64_t contexts =
        kCpuContexts * heads * (options.max_context / kPageTokens + 8) * page_bytes;
    bytes = cpu ? std::min(available / 2, contexts) : available / 100 * 95;
  }
  const int64_t pages = std::min<int64_t>(bytes / page_bytes, (int64_t{1} << 31) - 1);
  // A short conversation must fit: one page of tokens, bounds and window queries in every head.
  constexpr int64_t kFewestPagesPerHead = 6;
  if (pages < kFewestPagesPerHead * heads) {
    return absl::ResourceExhaustedError(
        absl::StrCat("--kv-bytes: ", bytes, " bytes are too few for this model; it takes ",
                     kFewestPagesPerHead * heads * page_bytes, " at least"));
  }
  return pages;
}

}  // namespace

absl::StatusOr<LoadedEngine> LoadEngine(const EngineConfig& config) {
  ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, OpenCheckpoint(config.model_path));
  ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, OpenTokenizer(*checkpoint));
  ASSIGN_OR_RETURN(BackendChoice choice,
                   MakeBackend(config.backend, config.threads, config.on_device_error));
  if (config.wrap_backend) choice.backend = config.wrap_backend(std::move(choice.backend));
  ASSIGN_OR_RETURN(const DType dtype, ResolveDType(config.dtype, *choice.backend));

  LoadedEngine loaded;
  loaded.config = checkpoint->config();
  loaded.dtype = dtype;
  ASSIGN_OR_RETURN(loaded.linear_dtype,
                   ResolveLinearDType(config.linear_dtype, dtype, *choice.backend));
  loaded.backend = choice.name;
  loaded.gpu_unused = choice.gpu_unused;
  loaded.backend_description = choice.backend->Description();
  const bool cpu = choice.name == "cpu";
  loaded.options = ResolveOptions(config.options, loaded.config, cpu);
  if (loaded.options.max_context > loaded.config.context) {
    return absl::InvalidArgumentError(absl::StrCat("--max-context: ", loaded.options.max_context,
                                                   " is more than the model's ",
                                                   loaded.config.context));
  }
  loaded.context = loaded.options.max_context;
  ASSIGN_OR_RETURN(
      std::unique_ptr<Transformer> model,
      Transformer::Load(
          *checkpoint, choice.backend.get(),
          {.dtype = dtype,
           .e4m3_linears = loaded.linear_dtype == DType::kE4M3,
           // Every decode and one segment fit without growing.
           .step_rows = std::max({loaded.options.step_tokens, loaded.options.lone_chunk_tokens,
                                  loaded.options.max_sequences + kLargestSegment}),
           .max_context = loaded.context,
           .max_seqs = loaded.options.max_sequences}));
  loaded.parameters = model->parameters();
  ASSIGN_OR_RETURN(const int64_t pages, ResolvePages(loaded.options, *model, *choice.backend, cpu));
  std::string identity;
  if (!loaded.options.session_dir.empty()) {
    ASSIGN_OR_RETURN(identity, ModelIdentity(*checkpoint, dtype));
  }
  loaded.tokenizer = std::move(tokenizer);
  ASSIGN_OR_RETURN(loaded.engine, MakeEngine({.backend = std::move(choice.backend),
                                              .model = std::move(model),
                                              .tokenizer = loaded.tokenizer,
                                              .options = loaded.options,
                                              .pages = pages,
                                              .observer = config.observer,
                                              .model_identity = std::move(identity)}));
  return loaded;
}

}  // namespace entropyserve
