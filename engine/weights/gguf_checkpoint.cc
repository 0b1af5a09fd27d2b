// A checkpoint from a GGUF file.
#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/config_gguf.h"
#include "engine/weights/mapped_checkpoint.h"
#include "engine/weights/tensor_names.h"

namespace entropyserve {
namespace {

// ggml's type codes that are read, then names of others for the message.
constexpr std::pair<uint32_t, StorageType> kStorageTypes[] = {
    {0, StorageType::kF32},   {1, StorageType::kF16},   {2, StorageType::kQ4_0},
    {3, StorageType::kQ4_1},  {6, StorageType::kQ5_0},  {7, StorageType::kQ5_1},
    {8, StorageType::kQ8_0},  {12, StorageType::kQ4_K}, {13, StorageType::kQ5_K},
    {14, StorageType::kQ6_K}, {30, StorageType::kBF16},
};

constexpr std::pair<uint32_t, const char*> kOtherTypes[] = {
    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},   {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"},
    {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},   {23, "IQ4_XS"},
    {24, "I8"},      {25, "I16"},   {26, "I32"},    {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},
    {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"},  {40, "NVFP4"}, {41, "Q1_0"},
};

absl::StatusOr<StorageType> StorageTypeOf(uint32_t code, const std::string& where) {
  for (const auto& [known, type] : kStorageTypes) {
    if (known == code) return type;
  }
  std::string name = absl::StrCat("number ", code);
  for (const auto& [other, other_name] : kOtherTypes) {
    if (other == code) name = other_name;
  }
  return absl::UnimplementedError(absl::StrCat(
      where, ": tensor type ", name,
      " is not supported; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and "
      "Q6_K are"));
}

// The tensor's bytes; its row must be whole blocks and it must lie inside the file.
absl::StatusOr<absl::Span<const uint8_t>> TensorBytes(const GgufTensor& tensor, StorageType type,
                                                      absl::Span<const uint8_t> data,
                                                      const std::string& where) {
  const BlockFormat& format = FormatOf(type);
  const int64_t columns = tensor.shape.back();
  if (columns % int64_t(format.elements) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        where, ": rows of ", columns, " elements are not whole ", format.name, " blocks"));
  }
  int64_t size = columns / int64_t(format.elements);
  bool overflow = __builtin_mul_overflow(size, int64_t(format.bytes), &size);
  for (size_t i = 0; i + 1 < tensor.shape.size(); ++i) {
    overflow |= __builtin_mul_overflow(size, tensor.shape[i], &size);
  }
  if (overflow || tensor.offset > data.size() || uint64_t(size) > data.size() - tensor.offset) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": beyond the end of the file (truncated?)"));
  }
  return data.subspan(size_t(tensor.offset), size_t(size));
}

// "blk.N.attn_rot_embd.weight"
bool IsRopeTable(std::string_view name) {
  constexpr std::string_view kSuffix = ".attn_rot_embd.weight";
  return name.size() > kSuffix.size() && name.substr(name.size() - kSuffix.size()) == kSuffix;
}

}  // namespace

absl::Status MappedCheckpoint::AddGgufTensors(const std::string& where, bool interleaved) {
  std::vector<std::pair<const uint8_t*, const uint8_t*>> extents;
  for (const auto& [gguf_name, entry] : gguf_->tensors()) {
    const std::string at = absl::StrCat(where, ": tensor '", gguf_name, "'");
    Tensor tensor;
    ASSIGN_OR_RETURN(tensor.type, StorageTypeOf(entry.type, at));
    ASSIGN_OR_RETURN(tensor.data, TensorBytes(entry, tensor.type, gguf_->data(), at));
    extents.emplace_back(tensor.data.data(), tensor.data.data() + tensor.data.size());
    // Part of the configuration, and a table of old files that follows from it.
    if (gguf_name == "rope_freqs.weight" || IsRopeTable(gguf_name)) continue;
    if (entry.shape.size() > 2) {
      return absl::InvalidArgumentError(absl::StrCat(at, ": neither a matrix nor a vector"));
    }
    tensor.shape = entry.shape;
    tensor.file = gguf_->file();
    std::string name = CanonicalName(gguf_name);
    if (name.empty()) {
      return absl::UnimplementedError(
          absl::StrCat(at, ": does not belong to a ", config_.family, " model"));
    }
    if (!tensors_.emplace(std::move(name), std::move(tensor)).second) {
      return absl::InvalidArgumentError(absl::StrCat(at, ": a second tensor for the same weight"));
    }
  }
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": the data of two tensors overlap"));
    }
  }
  if (!interleaved) return absl::OkStatus();
  for (const TensorSpec& spec : TensorsOf(config_)) {
    const auto it = tensors_.find(spec.name);
    if (it != tensors_.end()) it->second.interleaved_heads = spec.rope_heads;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> MappedCheckpoint::FromGguf(
    std::unique_ptr<GgufFile> file, std::string path) {
  std::unique_ptr<MappedCheckpoint> result(new MappedCheckpoint);
  ASSIGN_OR_RETURN(result->config_, ConfigFromGguf(*file));
  if (result->config_.name.empty()) {
    result->config_.name = std::filesystem::path(path).stem().string();
  }
  result->is_gguf_ = true;
  result->path_ = std::move(path);
  result->gguf_ = std::move(file);
  const std::string& where = result->gguf_->name();
  // GGUF's llama stores q and k for interleaved-pair RoPE; the other architectures keep Hugging
  // Face's half-split order.
  RETURN_IF_ERROR(result->AddGgufTensors(where, result->config_.family == "llama"));
  RETURN_IF_ERROR(result->CheckDirectory(where));
  result->fingerprint_ = result->ComputeFingerprint();
  return std::unique_ptr<Checkpoint>(std::move(result));
}

}  // namespace entropyserve
