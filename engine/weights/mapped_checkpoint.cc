#include "engine/weights/mapped_checkpoint.h"

#include <bit>
#include <cstring>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"
#include "engine/weights/tensor_names.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// Where row r of the half-split order lies in the interleaved-pair order: of each head's rows, the
// i-th of the first half is stored at 2i and the i-th of the second half at 2i + 1.
int64_t InterleavedRow(int64_t row, int64_t head_dim) {
  const int64_t head = row / head_dim, within = row % head_dim, half = head_dim / 2;
  return head * head_dim + 2 * (within % half) + within / half;
}

// FNV-1a, 64 bits.
class Digest {
 public:
  void Add(std::string_view bytes) {
    Add(int64_t(bytes.size()));
    for (const char c : bytes) AddByte(uint8_t(c));
  }
  void Add(int64_t x) {
    for (int i = 0; i < 8; ++i) AddByte(uint8_t(uint64_t(x) >> (8 * i)));
  }
  void Add(double x) { Add(std::bit_cast<int64_t>(x)); }
  uint64_t value() const { return value_; }

 private:
  void AddByte(uint8_t b) { value_ = (value_ ^ b) * 0x100000001b3u; }
  uint64_t value_ = 0xcbf29ce484222325u;
};

}  // namespace

const MappedCheckpoint::Tensor* MappedCheckpoint::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

absl::StatusOr<std::vector<int64_t>> MappedCheckpoint::Shape(std::string_view name) const {
  const Tensor* tensor = Find(name);
  if (tensor == nullptr) {
    return absl::NotFoundError(absl::StrCat("no tensor '", std::string(name), "'"));
  }
  return tensor->shape;
}

absl::Status MappedCheckpoint::Read(std::string_view name, const std::vector<int64_t>& shape,
                                    int64_t row_begin, int64_t row_end, DType dtype,
                                    void* out) const {
  const Tensor* tensor = Find(name);
  if (tensor == nullptr) {
    return absl::NotFoundError(absl::StrCat("no tensor '", std::string(name), "'"));
  }
  if (tensor->shape != shape) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", std::string(name), "' is ",
                                                   ShapeText(tensor->shape), ", expected ",
                                                   ShapeText(shape)));
  }
  const int64_t rows = shape.size() == 1 ? 1 : shape[0];
  if (row_begin < 0 || row_begin > row_end || row_end > rows) {
    return absl::InvalidArgumentError(absl::StrCat("tensor '", std::string(name), "' has ", rows,
                                                   " rows, not [", row_begin, ", ", row_end, ")"));
  }
  if (row_begin == row_end) return absl::OkStatus();
  auto* to = static_cast<uint8_t*>(out);
  if (shape.size() == 1) {
    ReadVector(*tensor, dtype, to);
  } else {
    ReadRows(*tensor, row_begin, row_end, dtype, to);
  }
  return absl::OkStatus();
}

void MappedCheckpoint::ReadRows(const Tensor& tensor, int64_t row_begin, int64_t row_end,
                                DType dtype, uint8_t* out) const {
  const int64_t rows = tensor.shape[0];
  const size_t columns = size_t(tensor.shape[1]);
  const size_t stored = RowBytes(tensor.type, columns), packed = columns * SizeOf(dtype);
  std::vector<float> scratch(dtype == DType::kF32 ? 0 : columns);
  for (int64_t row = row_begin; row < row_end; ++row, out += packed) {
    const int64_t from =
        tensor.interleaved_heads == 0 ? row : InterleavedRow(row, rows / tensor.interleaved_heads);
    ConvertRow(tensor.type, tensor.data.data() + size_t(from) * stored, columns, dtype, out,
               scratch.data());
  }
  if (tensor.file != nullptr) {
    tensor.file->Release(tensor.data.data() + size_t(row_begin) * stored,
                         size_t(row_end - row_begin) * stored);
  }
}

void MappedCheckpoint::ReadVector(const Tensor& tensor, DType dtype, uint8_t* out) const {
  const int64_t n = tensor.shape[0];
  std::vector<float> values(static_cast<size_t>(n));
  if (tensor.interleaved_heads == 0) {
    ConvertRow(tensor.type, tensor.data.data(), values.size(), dtype, out, values.data());
    return;
  }
  DequantizeRow(tensor.type, tensor.data.data(), values.size(), values.data());
  for (int64_t i = 0; i < n; ++i) {
    const float x = values[size_t(InterleavedRow(i, n / tensor.interleaved_heads))];
    if (dtype == DType::kF32) {
      reinterpret_cast<float*>(out)[i] = x;
    } else {
      reinterpret_cast<bf16_t*>(out)[i] = ToBF16(x);
    }
  }
}

absl::Status MappedCheckpoint::CheckDirectory(const std::string& where) const {
  std::set<std::string_view> expected;
  const std::vector<TensorSpec> specs = TensorsOf(config_);
  for (const TensorSpec& spec : specs) {
    expected.insert(spec.name);
    const Tensor* tensor = Find(spec.name);
    if (tensor == nullptr) {
      if (spec.optional) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": tensor '", spec.name, "' is missing (an incomplete download?)"));
    }
    if (tensor->shape != spec.shape) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": tensor '", spec.name, "' is ",
                                                     ShapeText(tensor->shape), ", expected ",
                                                     ShapeText(spec.shape)));
    }
  }
  // A tensor that nothing here would multiply with is maths we would leave out.
  for (const auto& [name, tensor] : tensors_) {
    if (expected.contains(name)) continue;
    return absl::UnimplementedError(absl::StrCat(where, ": tensor '", name,
                                                 "' does not belong to a ", config_.family,
                                                 " model of this configuration"));
  }
  return absl::OkStatus();
}

uint64_t MappedCheckpoint::ComputeFingerprint() const {
  Digest digest;
  const ModelConfig& c = config_;
  digest.Add(c.family);
  for (const int64_t x :
       {int64_t{c.layers}, int64_t{c.hidden}, int64_t{c.ffn}, int64_t{c.heads}, int64_t{c.kv_heads},
        int64_t{c.head_dim}, int64_t{c.vocab}, c.context, int64_t{c.qkv_bias}, int64_t{c.o_bias},
        int64_t{c.mlp_bias}, int64_t{c.qk_norm}, int64_t{c.tied_embeddings}}) {
    digest.Add(x);
  }
  const RopeConfig& r = c.rope;
  digest.Add(int64_t(r.scaling));
  digest.Add(int64_t{r.truncate});
  digest.Add(r.original_context);
  for (const double x : {double(c.norm_eps), r.theta, r.factor, r.low_freq_factor,
                         r.high_freq_factor, r.beta_fast, r.beta_slow, r.attention_factor}) {
    digest.Add(x);
  }
  for (const float f : r.freq_factors) digest.Add(double(f));
  for (const auto& [name, tensor] : tensors_) {
    digest.Add(name);
    for (const int64_t dim : tensor.shape) digest.Add(dim);
    digest.Add(int64_t(tensor.data.size()));
  }
  return digest.value();
}

}  // namespace entropyserve
