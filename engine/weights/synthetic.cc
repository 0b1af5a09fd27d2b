#include "engine/weights/synthetic.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/backend.h"

namespace entropyserve {
namespace {

struct PublishedShape {
  const char* name;
  const char* family;
  int layers, hidden, ffn, heads, kv_heads, head_dim, vocab;
  int64_t context;
  double theta;
  bool qkv_bias, o_bias, qk_norm;
  bool tied = false;
};

// Published config.json values. Contexts are raised to 1M where RoPE allows any: random weights
// have no trained length.
constexpr int64_t kLong = int64_t{1} << 20;
constexpr PublishedShape kShapes[] = {
    {"llama-3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, kLong, 5e5, false, false, false},
    {"qwen2.5-0.5b", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, kLong, 1e6, true, false, false,
     true},
    {"qwen2.5-7b", "qwen2", 28, 3584, 18944, 28, 4, 128, 152064, kLong, 1e6, true, false, false},
    {"qwen3-8b", "qwen3", 36, 4096, 12288, 32, 8, 128, 151936, kLong, 1e6, false, false, true},
    {"openpangu-7b", "pangu_embedded", 34, 4096, 12800, 32, 8, 128, 153376, kLong, 1.6e7, true,
     true, false},
    // For trying the server without any weights on any machine.
    {"tiny", "llama", 4, 256, 512, 8, 2, 64, 512, kLong, 5e5, false, false, false},
};

uint64_t HashName(std::string_view name) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  for (char c : name) hash = (hash ^ uint8_t(c)) * 1099511628211u;
  return hash;
}

class SyntheticCheckpoint final : public Checkpoint {
 public:
  explicit SyntheticCheckpoint(const PublishedShape& shape) {
    config_.family = shape.family;
    config_.name = absl::StrCat("synthetic-", shape.name);
    config_.layers = shape.layers;
    config_.hidden = shape.hidden;
    config_.ffn = shape.ffn;
    config_.heads = shape.heads;
    config_.kv_heads = shape.kv_heads;
    config_.head_dim = shape.head_dim;
    config_.vocab = shape.vocab;
    config_.context = shape.context;
    config_.qkv_bias = shape.qkv_bias;
    config_.o_bias = shape.o_bias;
    config_.qk_norm = shape.qk_norm;
    config_.tied_embeddings = shape.tied;
    config_.rope.theta = shape.theta;
    path_ = absl::StrCat(std::string(kSyntheticPrefix), shape.name);
  }

  bool Has(std::string_view) const override { return true; }
  absl::StatusOr<std::vector<int64_t>> Shape(std::string_view name) const override {
    return absl::UnimplementedError(
        absl::StrCat("synthetic weights take any shape: ", std::string(name)));
  }
  absl::Status Read(std::string_view name, const std::vector<int64_t>& shape, int64_t row_begin,
                    int64_t row_end, DType dtype, void* out) const override {
    const int64_t cols = shape.back();
    const int64_t n = (row_end - row_begin) * cols;
    const bool bias = name.ends_with(".bias"), norm = name.find("norm") != std::string_view::npos;
    for (int64_t i = 0; i < n; ++i) {
      float value = bias ? 0.0f : 1.0f;
      if (!bias && !norm)
        value = RandomUniform(HashName(name), uint64_t(row_begin * cols + i), Range(cols));
      if (dtype == DType::kF32) {
        static_cast<float*>(out)[i] = value;
      } else {
        static_cast<bf16_t*>(out)[i] = ToBF16(value);
      }
    }
    return absl::OkStatus();
  }
  std::optional<uint64_t> RandomSeed(std::string_view name) const override {
    return HashName(name);
  }
  uint64_t Fingerprint() const override { return HashName(path_); }
};

}  // namespace

std::vector<std::string> SyntheticNames() {
  std::vector<std::string> names;
  for (const PublishedShape& shape : kShapes) names.emplace_back(shape.name);
  return names;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenSynthetic(std::string_view name) {
  for (const PublishedShape& shape : kShapes) {
    if (name == shape.name) return std::make_unique<SyntheticCheckpoint>(shape);
  }
  return absl::InvalidArgumentError(absl::StrCat("--model: no synthetic model '", std::string(name),
                                                 "'; there are ",
                                                 absl::StrJoin(SyntheticNames(), ", ")));
}

}  // namespace entropyserve
