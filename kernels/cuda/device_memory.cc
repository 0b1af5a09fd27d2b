#include "kernels/cuda/device_memory.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"

namespace entropyserve::cuda {

std::unique_ptr<DeviceMemory> DeviceMemory::Create(size_t bytes, cudaStream_t stream,
                                                   std::string* error) {
  void* base = nullptr;
  const cudaError_t status = cudaMalloc(&base, bytes);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // out of memory is not sticky
    *error = "cannot take " + std::to_string(bytes >> 20) +
             " MiB of device memory: " + cudaGetErrorString(status);
    return nullptr;
  }
  return std::unique_ptr<DeviceMemory>(new DeviceMemory(static_cast<char*>(base), bytes, stream));
}

DeviceMemory::DeviceMemory(char* base, size_t bytes, cudaStream_t stream)
    : base_(base), ranges_(bytes), stream_(stream) {
  CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&ring_), kSlots * kSlotBytes));
  for (cudaEvent_t& event : passed_) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
}

DeviceMemory::~DeviceMemory() {
  CUDA_CHECK(cudaStreamSynchronize(stream_));
  for (cudaEvent_t event : passed_) CUDA_CHECK(cudaEventDestroy(event));
  CUDA_CHECK(cudaFreeHost(ring_));
  CUDA_CHECK(cudaFree(base_));
}

void* DeviceMemory::Alloc(size_t bytes) {
  const size_t offset = ranges_.Alloc(bytes);
  if (offset == RangeAllocator::kNone) return nullptr;
  CUDA_CHECK(cudaMemsetAsync(base_ + offset, 0, bytes, stream_));
  return base_ + offset;
}

void DeviceMemory::Free(void* p) {
  if (p) ranges_.Free(static_cast<char*>(p) - base_);
}

char* DeviceMemory::TakeStaging(size_t bytes) {
  if (slot_used_ + bytes > kSlotBytes) {
    CUDA_CHECK(cudaEventRecord(passed_[slot_], stream_));
    slot_ = (slot_ + 1) % kSlots;
    slot_used_ = 0;
    CUDA_CHECK(cudaEventSynchronize(passed_[slot_]));  // at once if never recorded
  }
  char* staging = ring_ + slot_ * kSlotBytes + slot_used_;
  slot_used_ += (bytes + 15) / 16 * 16;
  return staging;
}

void DeviceMemory::CopyIn(void* dst, const void* src, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(bytes - done, kSlotBytes);
    char* staging = TakeStaging(piece);
    std::memcpy(staging, static_cast<const char*>(src) + done, piece);
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(dst) + done, staging, piece,
                               cudaMemcpyHostToDevice, stream_));
    done += piece;
  }
}

void DeviceMemory::CopyIn2D(void* dst, size_t dst_pitch, const void* src, size_t src_pitch,
                            size_t width, size_t height) {
  if (width == 0) return;
  if (width > kSlotBytes) {
    for (size_t row = 0; row < height; ++row) {
      CopyIn(static_cast<char*>(dst) + row * dst_pitch,
             static_cast<const char*>(src) + row * src_pitch, width);
    }
    return;
  }
  const size_t rows_per_slot = kSlotBytes / width;
  for (size_t done = 0; done < height;) {
    const size_t rows = std::min(height - done, rows_per_slot);
    char* staging = TakeStaging(rows * width);
    for (size_t row = 0; row < rows; ++row) {
      std::memcpy(staging + row * width, static_cast<const char*>(src) + (done + row) * src_pitch,
                  width);
    }
    CUDA_CHECK(cudaMemcpy2DAsync(static_cast<char*>(dst) + done * dst_pitch, dst_pitch, staging,
                                 width, width, rows, cudaMemcpyHostToDevice, stream_));
    done += rows;
  }
}

void DeviceMemory::CopyOut(void* dst, const void* src, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(bytes - done, kSlotBytes);
    char* staging = TakeStaging(piece);
    CUDA_CHECK(cudaMemcpyAsync(staging, static_cast<const char*>(src) + done, piece,
                               cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    std::memcpy(static_cast<char*>(dst) + done, staging, piece);
    done += piece;
  }
}

void DeviceMemory::CopyOutLater(void* dst, const void* src, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(bytes - done, kSlotBytes);
    // One slot is filled at a time: what waits in it must be handed over before it is used again.
    if (slot_used_ + piece > kSlotBytes) FinishCopiesOut();
    char* staging = TakeStaging(piece);
    CUDA_CHECK(cudaMemcpyAsync(staging, static_cast<const char*>(src) + done, piece,
                               cudaMemcpyDeviceToHost, stream_));
    copies_out_.push_back({static_cast<char*>(dst) + done, staging, piece});
    done += piece;
  }
}

void DeviceMemory::FinishCopiesOut() {
  if (copies_out_.empty()) return;
  CUDA_CHECK(cudaStreamSynchronize(stream_));
  for (const CopyOutPiece& copy : copies_out_) std::memcpy(copy.dst, copy.staging, copy.bytes);
  copies_out_.clear();
}

void DeviceMemory::Zero(void* p, size_t bytes) {
  if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, stream_));
}

}  // namespace entropyserve::cuda
