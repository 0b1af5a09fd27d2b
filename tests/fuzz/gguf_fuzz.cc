// Any bytes: the GGUF reader refuses them, or metadata, tokenizer, configuration and every tensor
// can be read.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "engine/weights/gguf.h"
#include "engine/weights/gguf_tokenizer.h"
#include "engine/weights/mapped_checkpoint.h"
#include "engine/weights/tensor_names.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

void ReadMetadata(const GgufFile& file) {
  for (const auto& [key, value] : file.metadata()) {
    const int kinds = file.Int(key).ok() + file.String(key).ok() + file.Strings(key).ok() +
                      file.Ints(key).ok() + file.Floats(key).ok() + file.BoolOr(key, false).ok();
    Check(kinds <= 1, "a value has one type");
    (void)file.Float(key).ok();
  }
  (void)ReadGgufTokenizer(file).ok();
}

void ReadTensors(const Checkpoint& checkpoint, size_t file_size) {
  std::vector<uint8_t> out;
  for (const TensorSpec& spec : TensorsOf(checkpoint.config())) {
    if (!checkpoint.Has(spec.name)) continue;
    const int64_t columns = spec.shape.back();
    const int64_t rows = spec.shape.size() == 1 ? 1 : spec.shape[0];
    // The smallest block spends half a byte on an element, so the file bounds what is read.
    Check(uint64_t(columns) * uint64_t(rows) <= 2 * uint64_t{file_size}, "the file holds it");
    out.resize(size_t(columns * rows) * 4);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      Check(checkpoint.Read(spec.name, spec.shape, 0, rows, dtype, out.data()).ok(), "readable");
    }
  }
}

}  // namespace
}  // namespace entropyserve

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace entropyserve;
  auto file = GgufFile::Parse({data, size}, "fuzz");
  if (!file.ok()) {
    Check(!file.status().message().empty(), "every refusal says why");
    return 0;
  }
  ReadMetadata(**file);
  const auto checkpoint = MappedCheckpoint::FromGguf(*std::move(file), "fuzz.gguf");
  if (checkpoint.ok()) ReadTensors(**checkpoint, size);
  return 0;
}
