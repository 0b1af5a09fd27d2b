#include "engine/weights/checkpoint.h"

#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/mapped_checkpoint.h"

namespace entropyserve {
namespace {

namespace fs = std::filesystem;

// The folder's only .gguf file; empty when there is none or more than one.
absl::StatusOr<std::string> OnlyGguf(const std::string& folder) {
  std::error_code error;
  std::string found;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() != ".gguf") continue;
    if (!found.empty()) return std::string();
    found = it->path().string();
  }
  if (error) return absl::InternalError(absl::StrCat(folder, ": ", error.message()));
  return found;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGguf(const std::string& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<GgufFile> file, GgufFile::Open(path));
  return MappedCheckpoint::FromGguf(std::move(file), path);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status))
    return absl::NotFoundError(absl::StrCat(path, ": no such file or folder"));
  if (!fs::is_directory(status)) return OpenGguf(path);
  if (fs::exists(fs::path(path) / "config.json", error)) return MappedCheckpoint::OpenFolder(path);
  ASSIGN_OR_RETURN(const std::string gguf, OnlyGguf(path));
  if (!gguf.empty()) return OpenGguf(gguf);
  return absl::InvalidArgumentError(absl::StrCat(
      path, ": not a checkpoint: neither config.json nor exactly one .gguf file in it"));
}

}  // namespace entropyserve
