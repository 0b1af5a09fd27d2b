// Device memory and copies: one pool taken at start, and a pinned ring through which host data
// passes, so that a caller's buffer is free again as soon as CopyIn returns and nothing waits for
// the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/range_allocator.h"

namespace entropyserve::cuda {

// Not thread-safe. All work goes to one stream.
class DeviceMemory {
 public:
  // Takes `bytes` of the current device. Null, with a reason, when that fails.
  static std::unique_ptr<DeviceMemory> Create(size_t bytes, cudaStream_t stream,
                                              std::string* error);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* Alloc(size_t bytes);  // zeroed, 256-byte aligned; null when there is not enough
  void Free(void* p);         // null is allowed; p may be in use by work already on the stream
  size_t largest_free() const { return ranges_.largest_free(); }

  void CopyIn(void* dst, const void* src, size_t bytes);
  // `height` rows of `width` bytes; pitches in bytes.
  void CopyIn2D(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                size_t height);
  void CopyOut(void* dst, const void* src, size_t bytes);  // waits for the stream
  // Many small copies with one wait for the stream each 4 MiB: `dst` is written when
  // FinishCopiesOut returns, at the latest.
  void CopyOutLater(void* dst, const void* src, size_t bytes);
  void FinishCopiesOut();
  void Zero(void* p, size_t bytes);

 private:
  struct CopyOutPiece {
    char* dst;
    const char* staging;
    size_t bytes;
  };
  // The ring's slots. A slot is written again only after the copy that read it has passed.
  static constexpr size_t kSlotBytes = size_t{4} << 20;  // large enough for full host link speed
  static constexpr int kSlots = 4;

  DeviceMemory(char* base, size_t bytes, cudaStream_t stream);
  // A piece of pinned memory of at most kSlotBytes that nothing reads any more.
  char* TakeStaging(size_t bytes);

  char* const base_;
  RangeAllocator ranges_;
  const cudaStream_t stream_;
  char* ring_ = nullptr;  // pinned, [kSlots, kSlotBytes]
  cudaEvent_t passed_[kSlots] = {};
  int slot_ = 0;
  size_t slot_used_ = 0;
  std::vector<CopyOutPiece> copies_out_;  // in the current slot, not handed over yet
};

}  // namespace entropyserve::cuda
