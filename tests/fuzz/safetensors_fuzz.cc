// Any bytes: the safetensors reader refuses them or every tensor it lists can be read.
#include <cstddef>
#include <cstdint>

#include "engine/weights/safetensors.h"
#include "kernels/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace entropyserve;
  const auto file = SafetensorsFile::Parse({data, size}, "fuzz");
  if (!file.ok()) {
    Check(!file.status().message().empty(), "every refusal says why");
    return 0;
  }
  size_t bytes = 0;
  for (const auto& [name, entry] : (*file)->tensors()) {
    bytes += entry.data.size();
    const auto floats = (*file)->ReadFloats(name);
    const auto ints = (*file)->ReadInts(name);
    Check(!(floats.ok() && ints.ok()), "a tensor is floats or integers");
    if (floats.ok()) Check(floats->size() == size_t(entry.elements), "all elements are read");
  }
  Check(bytes <= size, "tensors do not share bytes");
  return 0;
}
