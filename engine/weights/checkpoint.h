// A checkpoint on disk, whatever its format: a Hugging Face folder (config.json and safetensors,
// also sharded) or one GGUF file. Files are mapped, never copied whole; a tensor is converted row
// by row when the model asks for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/weights/model_config.h"
#include "kernels/tensor.h"

namespace entropyserve {

// Thread-compatible: const methods may run at the same time.
class Checkpoint {
 public:
  // `path`: a folder with config.json, or a .gguf file. Nothing is downloaded.
  // NOT_FOUND: no such path. INVALID_ARGUMENT: not a checkpoint, truncated, lying header; the
  // message names file and field. UNIMPLEMENTED: an architecture, a tensor type or a config field
  // that changes the maths and is not supported, by name.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& path);
  virtual ~Checkpoint() = default;

  const ModelConfig& config() const { return config_; }

  // Names are Hugging Face's in every format ("model.layers.0.self_attn.q_proj.weight"), shapes are
  // [rows, columns] or [n]; rows of Q and K are in half-split RoPE order in every format.
  virtual bool Has(std::string_view name) const = 0;

  // NOT_FOUND when the tensor is missing.
  virtual absl::StatusOr<std::vector<int64_t>> Shape(std::string_view name) const = 0;

  // Converts rows [row_begin, row_end) of tensor `name` (a vector is one row) to `dtype`, packed,
  // into `out`. `shape` is what the caller expects; INVALID_ARGUMENT names the tensor when it
  // differs. bf16 -> bf16 is exact; other types go through float and round to nearest even.
  virtual absl::Status Read(std::string_view name, const std::vector<int64_t>& shape,
                            int64_t row_begin, int64_t row_end, DType dtype, void* out) const = 0;

  // Set for synthetic weights: matrix `name` is not read but drawn by the backend (FillRandom) with this
  // seed, uniform in [-Range(cols), Range(cols)), which keeps activations at one scale.
  virtual std::optional<uint64_t> RandomSeed(std::string_view name) const {
    (void)name;
    return std::nullopt;
  }
  static float Range(int64_t cols) { return std::sqrt(3.0f / float(cols)); }

  // Files for the tokenizer: for a folder, the folder's path; for GGUF, the file itself
  // (see engine/text/tokenizer.h).
  const std::string& path() const { return path_; }
  bool is_gguf() const { return is_gguf_; }
  // A digest of config and tensor directory (names, shapes, sizes): tells whether a saved session
  // belongs to this model. Not a digest of the weights' bytes.
  virtual uint64_t Fingerprint() const = 0;

 protected:
  ModelConfig config_;
  std::string path_;
  bool is_gguf_ = false;
};

}  // namespace entropyserve
