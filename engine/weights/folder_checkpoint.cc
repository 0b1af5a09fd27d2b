// A Hugging Face folder: config.json, generation_config.json, safetensors.
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/config_json.h"
#include "engine/weights/json_fields.h"
#include "engine/weights/mapped_checkpoint.h"

namespace entropyserve {
namespace {

namespace fs = std::filesystem;

// Files of one model; the largest published have about 200.
constexpr size_t kMaxShards = 4096;
constexpr size_t kMaxFileName = 255;  // bytes, Linux's limit

bool Exists(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error);
}

absl::StatusOr<StorageType> WeightType(const std::string& dtype, const std::string& where) {
  if (dtype == "F32") return StorageType::kF32;
  if (dtype == "F16") return StorageType::kF16;
  if (dtype == "BF16") return StorageType::kBF16;
  return absl::UnimplementedError(
      absl::StrCat(where, ": dtype ", dtype, " is not supported; F32, F16 and BF16 are"));
}

// Buffers that older files carry and that follow from the configuration.
bool IsDerivedBuffer(std::string_view name) {
  constexpr std::string_view kSuffix = ".rotary_emb.inv_freq";
  return name.size() >= kSuffix.size() && name.substr(name.size() - kSuffix.size()) == kSuffix;
}

std::string FolderName(const std::string& folder) {
  std::error_code error;
  const fs::path path = fs::absolute(folder, error).lexically_normal();
  return path.has_filename() ? path.filename().string() : path.parent_path().filename().string();
}

// The index's shards, each once and in order.
absl::StatusOr<std::set<std::string>> ShardNames(const nlohmann::json& index,
                                                 const std::string& where) {
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": weight_map: missing or not an object"));
  }
  std::set<std::string> names;
  for (const auto& [tensor, value] : map->items()) {
    const std::string name = value.is_string() ? value.get<std::string>() : "";
    // A plain name: an index must not lead out of its folder.
    if (name.empty() || name == "." || name == ".." || name.size() > kMaxFileName ||
        name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": weight_map: '", tensor, "': not a file name"));
    }
    names.insert(name);
    if (names.size() > kMaxShards) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": weight_map: too many files"));
    }
  }
  return names;
}

}  // namespace

absl::Status MappedCheckpoint::AddFile(std::unique_ptr<SafetensorsFile> file,
                                       const std::string& where) {
  for (const auto& [name, entry] : file->tensors()) {
    if (IsDerivedBuffer(name)) continue;
    const std::string at = absl::StrCat(where, ": tensor '", name, "'");
    Tensor tensor;
    ASSIGN_OR_RETURN(tensor.type, WeightType(entry.dtype, at));
    if (entry.shape.empty() || entry.shape.size() > 2) {
      return absl::InvalidArgumentError(absl::StrCat(at, ": neither a matrix nor a vector"));
    }
    tensor.shape = entry.shape;
    tensor.data = entry.data;
    tensor.file = file->file();
    if (!tensors_.emplace(name, std::move(tensor)).second) {
      return absl::InvalidArgumentError(absl::StrCat(at, ": also in another file"));
    }
  }
  shards_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::Status MappedCheckpoint::AddShards(const std::string& folder) {
  const std::string single = (fs::path(folder) / "model.safetensors").string();
  const std::string index_path = single + ".index.json";
  if (!Exists(index_path)) {
    if (!Exists(single)) {
      return absl::InvalidArgumentError(
          absl::StrCat(folder,
                       ": neither model.safetensors nor model.safetensors.index.json; other "
                       "weight files (.bin, .pth) are not read"));
    }
    ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(single));
    return AddFile(std::move(file), single);
  }
  ASSIGN_OR_RETURN(const nlohmann::json index, LoadJsonObject(index_path));
  ASSIGN_OR_RETURN(const std::set<std::string> names, ShardNames(index, index_path));
  for (const std::string& name : names) {
    const std::string path = (fs::path(folder) / name).string();
    ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
    RETURN_IF_ERROR(AddFile(std::move(file), path));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> MappedCheckpoint::OpenFolder(const std::string& path) {
  const std::string config_path = (fs::path(path) / "config.json").string();
  const std::string generation_path = (fs::path(path) / "generation_config.json").string();
  ASSIGN_OR_RETURN(const nlohmann::json config, LoadJsonObject(config_path));
  nlohmann::json generation = nlohmann::json::object();
  if (Exists(generation_path)) {
    ASSIGN_OR_RETURN(generation, LoadJsonObject(generation_path));
  }
  std::unique_ptr<MappedCheckpoint> result(new MappedCheckpoint);
  ASSIGN_OR_RETURN(result->config_,
                   ConfigFromJson(config, config_path, generation, generation_path));
  result->config_.name = FolderName(path);
  result->path_ = path;
  RETURN_IF_ERROR(result->AddShards(path));
  RETURN_IF_ERROR(result->CheckDirectory(path));
  result->fingerprint_ = result->ComputeFingerprint();
  return std::unique_ptr<Checkpoint>(std::move(result));
}

}  // namespace entropyserve
