// From a path to a running engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/engine.h"
#include "engine/model/model.h"
#include "engine/text/tokenizer.h"
#include "engine/weights/model_config.h"
#include "kernels/backend.h"

namespace entropyserve {

struct EngineConfig {
  std::string model_path;        // a Hugging Face folder or a .gguf file
  std::string backend = "auto";  // auto, cpu, cuda
  std::string dtype = "auto";    // auto, f32, bf16
  // Of the layers' linears: auto (as dtype), bf16, or fp8: weights and what they are multiplied
  // with in 8-bit floats, which a GPU must have.
  std::string linear_dtype = "auto";
  int threads = 0;  // CPU threads; 0: one per core
  EngineOptions options;
  // See MakeBackend.
  std::function<void(const std::string&)> on_device_error = nullptr;
  std::shared_ptr<EngineObserver> observer = nullptr;  // may be null
  // Takes the backend and gives the one that is used; null: it is used as it is.
  std::function<std::unique_ptr<Backend>(std::unique_ptr<Backend>)> wrap_backend = nullptr;
};

struct LoadedEngine {
  ModelConfig config;
  DType dtype = DType::kF32;
  DType linear_dtype = DType::kF32;
  std::string backend;              // "cpu" or "cuda"
  std::string backend_description;  // "CPU: 2 threads, avx512_bf16, amx"
  std::string gpu_unused;           // see BackendChoice
  int64_t parameters = 0;
  int64_t context = 0;    // tokens served; at most config.context
  EngineOptions options;  // as resolved
  std::shared_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Engine> engine;  // keeps the tokenizer alive; destroyed first
};

// NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED: the checkpoint (see Checkpoint::Open) or a field of
// `config`, named. RESOURCE_EXHAUSTED: it does not fit into memory. FAILED_PRECONDITION: cuda or
// fp8 was asked for and is not there.
absl::StatusOr<LoadedEngine> LoadEngine(const EngineConfig& config);

// The engine over any model and backend: what LoadEngine ends with, and what tests begin with.
struct EngineParts {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Model> model;  // made with `backend`
  std::shared_ptr<Tokenizer> tokenizer;
  std::shared_ptr<Clock> clock = std::make_shared<Clock>();
  EngineOptions options;
  int64_t pages = 0;                                   // of the KV pool
  std::shared_ptr<EngineObserver> observer = nullptr;  // null: nobody
  // Names the weights: a session file written under another identity is not read.
  std::string model_identity;
  // For tests: no thread is started; EngineImpl::RunOnce does its work.
  bool manual = false;
};
absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(EngineParts parts);

}  // namespace entropyserve
