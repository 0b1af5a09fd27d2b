// The one implementation of Checkpoint: a directory of tensors that lie in mapped files. The two
// formats differ in how they fill it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/dequant.h"
#include "engine/weights/gguf.h"
#include "engine/weights/safetensors.h"

namespace entropyserve {

class MappedCheckpoint : public Checkpoint {
 public:
  // A folder with config.json and model.safetensors, or the shards that
  // model.safetensors.index.json lists.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> OpenFolder(const std::string& path);
  // Takes a parsed GGUF file; `path` as in Checkpoint::path().
  static absl::StatusOr<std::unique_ptr<Checkpoint>> FromGguf(std::unique_ptr<GgufFile> file,
                                                              std::string path);

  bool Has(std::string_view name) const override { return Find(name) != nullptr; }
  absl::StatusOr<std::vector<int64_t>> Shape(std::string_view name) const override;
  absl::Status Read(std::string_view name, const std::vector<int64_t>& shape, int64_t row_begin,
                    int64_t row_end, DType dtype, void* out) const override;
  uint64_t Fingerprint() const override { return fingerprint_; }

 private:
  struct Tensor {
    StorageType type = StorageType::kF32;
    std::vector<int64_t> shape;        // [rows, columns] or [n]
    absl::Span<const uint8_t> data;    // all rows, packed
    const MappedFile* file = nullptr;  // that holds data; null in tests over memory
    // Rows (or a vector's elements) are stored in interleaved-pair RoPE order, this many heads; 0:
    // in our order.
    int interleaved_heads = 0;
  };
  using Directory = std::map<std::string, Tensor, std::less<>>;

  MappedCheckpoint() = default;
  const Tensor* Find(std::string_view name) const;
  absl::Status AddFile(std::unique_ptr<SafetensorsFile> file, const std::string& where);
  absl::Status AddShards(const std::string& folder);
  absl::Status AddGgufTensors(const std::string& where, bool interleaved);
  // The directory holds exactly what the configuration needs, in the right shapes.
  absl::Status CheckDirectory(const std::string& where) const;
  void ReadRows(const Tensor& tensor, int64_t row_begin, int64_t row_end, DType dtype,
                uint8_t* out) const;
  void ReadVector(const Tensor& tensor, DType dtype, uint8_t* out) const;
  uint64_t ComputeFingerprint() const;

  // Constant after construction.
  std::vector<std::unique_ptr<SafetensorsFile>> shards_;
  std::unique_ptr<GgufFile> gguf_;
  Directory tensors_;
  uint64_t fingerprint_ = 0;
};

}  // namespace entropyserve
