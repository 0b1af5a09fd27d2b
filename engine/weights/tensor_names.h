// The tensors that a model of a given configuration has, under Hugging Face's names, and their
// names in GGUF.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/weights/model_config.h"

namespace entropyserve {

struct TensorSpec {
  std::string name;            // canonical: "model.layers.0.self_attn.q_proj.weight"
  std::vector<int64_t> shape;  // [rows, columns] or [n]
  bool optional = false;  // may be there, and is then not used (lm_head beside tied embeddings)
  // Rows are heads of half-split RoPE order, q and k only: the head count, else 0.
  int rope_heads = 0;
};

std::vector<TensorSpec> TensorsOf(const ModelConfig& config);

// The canonical name of a GGUF tensor; empty when there is none.
std::string CanonicalName(std::string_view gguf_name);

}  // namespace entropyserve
