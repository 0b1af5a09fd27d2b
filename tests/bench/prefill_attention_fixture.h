// A prefill step with random contents for prefill_attention_bench: sequences over one shuffled
// pool, per-head pasts, block lists, probes; and a plain fp32 reference on the GPU. Everything that
// a kernel must not read is NaN.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <source_location>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace entropyserve::bench {

inline void Must(cudaError_t error,
                 const std::source_location& where = std::source_location::current()) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%u: %s\n", where.file_name(), unsigned(where.line()),
               cudaGetErrorString(error));
  std::exit(1);
}

struct Options {
  bool check = false, small = false, time = false;
  double ceiling = 790;  // TFLOP/s: a bf16 8192^3 product on an H200, random data
  std::vector<int32_t> lengths = {32768, 65536, 131072};  // tokens
  int32_t head_dim = 128;                                 // of what is timed
};
// [--check] [--small] [--time] [--ceiling=] [--lengths=,,] [--head_dim=64|128]; none of the first
// three: check and time. Exits with status 2 on anything else.
Options ParseOptions(int argc, char** argv);

// Median time of `run` on the default stream, after two warm-ups.
template <typename Function>
double MedianMilliseconds(Function run) {
  cudaEvent_t begin, end;
  Must(cudaEventCreate(&begin));
  Must(cudaEventCreate(&end));
  std::vector<float> times;
  constexpr int kWarmups = 2, kRuns = 9;
  for (int i = 0; i < kWarmups + kRuns; ++i) {
    Must(cudaEventRecord(begin));
    run();
    Must(cudaEventRecord(end));
    Must(cudaEventSynchronize(end));
    float ms = 0;
    Must(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmups) times.push_back(ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Device memory for one vector.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(size_t n) : size_(n) { Must(cudaMalloc(&data_, n * sizeof(T) + 16)); }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    Must(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  T* get() const { return data_; }
  size_t size() const { return size_; }
  void Fill(int byte) { Must(cudaMemset(data_, byte, size_ * sizeof(T))); }
  std::vector<T> Host() const {
    std::vector<T> host(size_);
    Must(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

struct ReferencePair {  // one (segment, query head) to compute
  int32_t segment, head;
};

struct SeqSpec {
  int32_t segment = 512, block = 8, correction = 0;
  int32_t appended = 0;  // turn tokens before the step; a multiple of segment
  int32_t rows = 0;
  int32_t max_past = 0;  // per head: uniform in [0, max_past]
  bool decode = false;   // its rows belong to no segment
};

// What the policy reads: blocks of (segment, kv head) as a share of the visible ones, or tokens.
struct ListSpec {
  double dense_share = 0.5;                    // of the (segment, kv head) pairs
  int32_t tokens = -1;                         // budget; -1: random
  int32_t dense_prefix = 0, dense_suffix = 0;  // tokens; as in PrefillParams
};

class Problem {
 public:
  Problem(const AttentionShape& shape, const std::vector<SeqSpec>& specs, const ListSpec& lists,
          uint32_t seed);
  Problem(const Problem&) = delete;  // params() points into it

  PrefillAttentionParams params() const { return params_; }
  const std::vector<BatchSegment>& segments() const { return segments_; }
  const std::vector<int32_t>& counts() const { return counts_; }
  int32_t Past(int32_t seq, int32_t kv_head) const {
    return lengths_[seq][params_.layer * shape_.kv_heads + kv_head].past;
  }
  const SeqSpec& spec(int32_t seq) const { return specs_[seq]; }
  // Stride of the probes of a segment; 0: it has none.
  int32_t StrideOf(const BatchSegment& segment) const;
  uint16_t* out() const { return out_.get(); }
  const float* probe_out() const { return probes_.get(); }
  void Poison();  // out: NaN everywhere
  std::vector<uint16_t> Out() const { return out_.Host(); }
  // Pairs inside the mask, times heads of a group, over all segments.
  double MaskedPairs() const;
  // Pairs of the correction's probes, times heads.
  double ProbePairs() const;
  // fp32 outputs, without the correction: [pairs, max_rows, head_dim]. dense: as if every segment
  // were.
  std::vector<float> Reference(const std::vector<ReferencePair>& pairs, int32_t max_rows,
                               bool dense = false) const;

 private:
  void MakeSequences(const ListSpec& lists, std::mt19937& random);
  void MakeLists(const ListSpec& lists, std::mt19937& random);

  AttentionShape shape_;
  std::vector<SeqSpec> specs_;
  uint32_t seed_;
  std::vector<std::vector<HeadLength>> lengths_;  // [seqs][layers * kv_heads]
  std::vector<BatchSeq> seqs_;
  std::vector<BatchSegment> segments_;
  std::vector<int32_t> counts_;
  Batch batch_;
  PrefillAttentionParams params_;
  std::vector<DeviceArray<int32_t>> tables_;
  std::vector<DeviceArray<HeadLength>> device_lengths_;
  DeviceArray<uint16_t> q_, out_, k_, v_;
  DeviceArray<int32_t> device_counts_, device_blocks_;
  DeviceArray<float> probes_;
  DeviceArray<BatchSeq> device_seqs_;
  DeviceArray<BatchSegment> device_segments_;
};

}  // namespace entropyserve::bench
