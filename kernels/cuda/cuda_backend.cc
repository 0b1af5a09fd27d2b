#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/cuda/attend.h"
#include "kernels/cuda/compare_logits.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/qkv_post.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/select_blocks.h"
#include "kernels/cuda/select_tokens.h"
#include "kernels/cuda/sm90/prefill_attention.h"
#include "kernels/cuda/step_graphs.h"
#include "kernels/kv_view.h"

namespace entropyserve {
namespace {

using namespace cuda;  // NOLINT: this file joins the two

constexpr int64_t kMaxBias = int64_t{1} << 18;  // outputs of a linear with bias
constexpr int64_t kMinSegment = 128;            // tokens, of the policy

struct Device {
  int ordinal = 0;
  cudaDeviceProp properties = {};
  int capability() const { return properties.major * 10 + properties.minor; }
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const Device& device, const CudaOptions& options, cudaStream_t stream,
              std::unique_ptr<const CublasLt> cublaslt, std::unique_ptr<DeviceMemory> memory)
      : device_(device),
        portable_only_(options.portable_only),
        stream_(stream),
        cublaslt_(std::move(cublaslt)),
        memory_(std::move(memory)),
        linear_(cublaslt_.get(), options.cublaslt_only) {}

  ~CudaBackend() override {
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    if (results_) CUDA_CHECK(cudaFreeHost(results_));
    memory_.reset();
    CUDA_CHECK(cudaStreamDestroy(stream_));
  }

  std::string Description() const override {
    return std::string("CUDA: ") + device_.properties.name + ", compute capability " +
           std::to_string(device_.properties.major) + "." +
           std::to_string(device_.properties.minor);
  }
  DType AutoDType() const override { return DType::kBF16; }
  bool HasFastE4M3() const override { return linear_.SupportsE4M3(); }

  void* Alloc(size_t bytes) override { return memory_->Alloc(bytes); }
  void Free(void* p) override { memory_->Free(p); }
  size_t FreeMemory() const override { return memory_->largest_free(); }
  void CopyIn(void* dst, const void* host_src, size_t bytes) override {
    memory_->CopyIn(dst, host_src, bytes);
  }
  void CopyIn2D(void* dst, size_t dst_pitch, const void* host_src, size_t src_pitch, size_t width,
                size_t height) override {
    memory_->CopyIn2D(dst, dst_pitch, host_src, src_pitch, width, height);
  }
  void CopyOut(void* host_dst, const void* src, size_t bytes) override {
    memory_->CopyOut(host_dst, src, bytes);
  }
  void CopyPagesOut(void* host_dst, const KvPool& pool, std::span<const int32_t> pages) override {
    auto* to = static_cast<char*>(host_dst);
    for (const int32_t page : pages) {
      for (const PagePart& part : PageParts(pool, page)) {
        memory_->CopyOutLater(to, part.data, part.bytes);
        to += part.bytes;
      }
    }
    memory_->FinishCopiesOut();
  }
  void CopyPagesIn(const KvPool& pool, std::span<const int32_t> pages,
                   const void* host_src) override {
    const auto* from = static_cast<const char*>(host_src);
    for (const int32_t page : pages) {
      for (const PagePart& part : PageParts(pool, page)) {
        memory_->CopyIn(part.data, from, part.bytes);
        from += part.bytes;
      }
    }
  }
  void Zero(void* p, size_t bytes) override { memory_->Zero(p, bytes); }
  void FillRandom(void* p, DType dtype, int64_t n, float range, uint64_t seed) override {
    LaunchFillRandom(p, dtype, n, range, seed, stream_);
  }

  void Synchronize() override {
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    for (const PendingResults& pending : pending_) {
      std::copy_n(results_ + pending.begin, pending.n, pending.host);
    }
    pending_.clear();
    results_used_ = 0;
  }

  size_t Reserve(const Limits& limits) override;

  void Embed(const EmbedParams& p) override { LaunchEmbed(p, stream_); }
  void RmsNorm(const RmsNormParams& p) override { LaunchRmsNorm(p, stream_); }
  void Linear(const LinearParams& p) override {
    Check(!p.bias || p.w.rows <= kMaxBias, "a linear with bias has at most 2^18 outputs");
    linear_.Run(p, workspace_, bias16_, stream_);
  }
  void SwiGlu(const SwiGluParams& p) override { LaunchSwiGlu(p, stream_); }
  void Quantize(const QuantizeParams& p) override { LaunchQuantize(p, stream_); }
  void GatherRows(const GatherRowsParams& p) override { LaunchGatherRows(p, stream_); }
  void QkvPost(const QkvParams& p) override { LaunchQkvPost(p, stream_); }
  void SelectBlocks(const SelectParams& p) override;
  void PrefillAttention(const PrefillAttentionParams& p) override;
  void DecodeAttention(const DecodeAttentionParams& p) override {
    LaunchDecodeAttention(p, decode_scratch_, limits_.max_seqs, stream_);
  }
  void SelectTokens(const SelectTokensParams& p) override {
    RunSelectTokens(p, scratch_, scratch_bytes_, stream_);
  }
  void Compact(const CompactParams& p) override { LaunchCompact(p, stream_); }
  void Sample(const SampleParams& p) override;
  void CompareLogits(const CompareLogitsParams& p) override { LaunchCompareLogits(p, stream_); }
  void Replay(uint64_t key, const std::function<void()>& step) override {
    graphs_.Run(key, step, stream_);
  }

 private:
  // Results that Synchronize() hands over.
  struct PendingResults {
    SampleResult* host;
    size_t begin;  // in results_
    int32_t n;
  };
  static constexpr size_t kMaxPendingRows = 1024;

  // Memory of Reserve(); never freed before the backend.
  void* Take(size_t bytes) {
    void* p = memory_->Alloc(bytes);
    Check(p != nullptr, "no device memory for scratch: give the pool more, or lower the limits");
    reserved_ += bytes;
    return p;
  }
  // The longest stride of a correction in the batch's sparse segments; 0: none is corrected.
  int32_t LongestCorrection(const Batch& batch, int32_t layer) const;
  AttendParams Attend(const Batch& batch, const KvPool& pool, const AttentionShape& shape,
                      int32_t layer, const void* q) const;
  bool UseMma(const AttentionShape& shape, DType dtype) const { return CanAttendMma(shape, dtype); }

  const Device device_;
  const bool portable_only_;
  const cudaStream_t stream_;
  const std::unique_ptr<const CublasLt> cublaslt_;
  std::unique_ptr<DeviceMemory> memory_;
  LinearRunner linear_;
  StepGraphs graphs_;

  Limits limits_;
  size_t reserved_ = 0;
  void* scratch_ = nullptr;  // one operator at a time
  size_t scratch_bytes_ = 0;
  void* decode_scratch_ = nullptr;
  float* differences_ = nullptr;  // [max segments, kMaxFarProbes, heads, head_dim]
  void *workspace_ = nullptr, *bias16_ = nullptr;
  float* adjusted_ = nullptr;               // [kSampleRows, vocab]
  int32_t* sample_ids_ = nullptr;           // the same
  SampleRow* sample_rows_ = nullptr;        // [kMaxPendingRows], device
  SampleResult* device_results_ = nullptr;  // the same
  SampleResult* results_ = nullptr;         // the same, pinned
  size_t results_used_ = 0;
  std::vector<PendingResults> pending_;
};

size_t CudaBackend::Reserve(const Limits& limits) {
  Check(reserved_ == 0, "Reserve is called once");
  limits_ = limits;
  const AttentionShape& shape = limits.shape;
  const int64_t segments = limits.max_rows / kMinSegment + limits.max_seqs;
  scratch_bytes_ = std::max({SelectScratchBytes(limits), SelectTokensScratchBytes(limits),
                             sm90::PrefillAttentionScratchBytes(shape, limits.max_rows, segments),
                             sm90::ProbeAttentionScratchBytes(shape, limits.max_rows)});
  scratch_ = Take(scratch_bytes_);
  decode_scratch_ = Take(DecodeScratchBytes(shape, limits.max_seqs));
  differences_ = static_cast<float*>(
      Take(size_t(segments) * kMaxFarProbes * shape.heads * shape.head_dim * sizeof(float)));
  workspace_ = Take(LinearRunner::kWorkspaceBytes);
  bias16_ = Take(kMaxBias * SizeOf(DType::kBF16));
  adjusted_ = static_cast<float*>(Take(size_t(limits.vocab) * kSampleRows * sizeof(float)));
  sample_ids_ = static_cast<int32_t*>(Take(size_t(limits.vocab) * kSampleRows * sizeof(int32_t)));
  sample_rows_ = static_cast<SampleRow*>(Take(kMaxPendingRows * sizeof(SampleRow)));
  device_results_ = static_cast<SampleResult*>(Take(kMaxPendingRows * sizeof(SampleResult)));
  CUDA_CHECK(
      cudaMallocHost(reinterpret_cast<void**>(&results_), kMaxPendingRows * sizeof(SampleResult)));
  return reserved_;
}

int32_t CudaBackend::LongestCorrection(const Batch& batch, int32_t layer) const {
  int32_t longest = 0;
  for (int32_t i = 0; i < batch.num_segments; ++i) {
    const BatchSeq& seq = batch.seqs[batch.segments[i].seq];
    if (!IsDense(seq, batch.segments[i], layer)) longest = std::max(longest, seq.policy.correction);
  }
  return longest;
}

AttendParams CudaBackend::Attend(const Batch& batch, const KvPool& pool,
                                 const AttentionShape& shape, int32_t layer, const void* q) const {
  AttendParams a;
  a.seqs = batch.device_seqs;
  a.segments = batch.device_segments;
  a.num_segments = batch.num_segments;
  for (int32_t i = 0; i < batch.num_segments; ++i) {
    a.max_rows = std::max(a.max_rows, batch.segments[i].rows);
  }
  a.layer = layer;
  a.shape = shape;
  a.dtype = pool.dtype;
  a.pool_k = pool.k;
  a.pool_v = pool.v;
  a.q = q;
  return a;
}

void CudaBackend::SelectBlocks(const SelectParams& p) {
  const Batch& batch = *p.batch;
  if (batch.num_segments == 0) return;
  const bool hopper = !portable_only_ &&
                      sm90::SupportsPrefillAttention(device_.capability(), p.pool.dtype, p.shape);
  RunSelectBlocks(p, hopper, scratch_, scratch_bytes_, stream_);
  if (LongestCorrection(batch, p.layer) == 0) return;
  if (hopper) {
    CUDA_CHECK(sm90::LaunchProbeAttention(p, scratch_, scratch_bytes_, stream_));
    return;
  }
  AttendParams probes = Attend(batch, p.pool, p.shape, p.layer, p.q);
  probes.probes = true;
  probes.out = p.probe_out;
  probes.max_rows = 0;
  for (int32_t i = 0; i < batch.num_segments; ++i) {
    const BatchSegment& segment = batch.segments[i];
    const int32_t stride = batch.seqs[segment.seq].policy.correction;
    if (stride > 0) probes.max_rows = std::max(probes.max_rows, CeilDiv(segment.rows, stride));
  }
  if (UseMma(p.shape, p.pool.dtype)) {
    LaunchAttendMma(probes, /*far_probes=*/false, stream_);
  } else {
    LaunchAttendSimple(probes, stream_);
  }
}

void CudaBackend::PrefillAttention(const PrefillAttentionParams& p) {
  const Batch& batch = *p.batch;
  if (batch.num_segments == 0) return;
  AttendParams a = Attend(batch, p.pool, p.shape, p.layer, p.q);
  a.lists = p.lists;
  a.out = p.out;
  a.differences = differences_;
  const int32_t correction = LongestCorrection(batch, p.layer);
  a.probe_out = correction > 0 ? p.probe_out : nullptr;
  LaunchCountPairs(a, stream_);
  if (!portable_only_ &&
      sm90::SupportsPrefillAttention(device_.capability(), p.pool.dtype, p.shape)) {
    PrefillAttentionParams fast = p;
    fast.probe_out = a.probe_out;
    CUDA_CHECK(sm90::LaunchPrefillAttention(fast, scratch_, scratch_bytes_, stream_));
  } else if (UseMma(p.shape, p.pool.dtype)) {
    LaunchAttendMma(a, /*far_probes=*/correction > kTileRows, stream_);
  } else {
    LaunchAttendSimple(a, stream_);
  }
}

void CudaBackend::Sample(const SampleParams& p) {
  for (int32_t first = 0; first < p.n;) {
    if (results_used_ == kMaxPendingRows) Synchronize();  // all hand-over space is in use
    const int32_t n = int32_t(
        std::min<size_t>({size_t(p.n - first), kSampleRows, kMaxPendingRows - results_used_}));
    SampleLaunch launch;
    launch.logits = p.logits;
    launch.vocab = p.vocab;
    launch.n = n;
    launch.rows = sample_rows_ + results_used_;
    launch.results = device_results_ + results_used_;
    launch.adjusted = adjusted_;
    launch.ids = sample_ids_;
    memory_->CopyIn(sample_rows_ + results_used_, p.rows + first, size_t(n) * sizeof(SampleRow));
    LaunchSample(launch, stream_);
    CUDA_CHECK(cudaMemcpyAsync(results_ + results_used_, launch.results,
                               size_t(n) * sizeof(SampleResult), cudaMemcpyDeviceToHost, stream_));
    pending_.push_back({p.results + first, results_used_, n});
    results_used_ += size_t(n);
    first += n;
  }
}

// "" or why the device cannot be used.
std::string Find(int ordinal, Device* device) {
  int count = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess) {
    return std::string("no CUDA device: ") + cudaGetErrorString(status);
  }
  if (ordinal < 0 || ordinal >= count) {
    return "no CUDA device " + std::to_string(ordinal) + " (found " + std::to_string(count) + ")";
  }
  device->ordinal = ordinal;
  if (const cudaError_t status = cudaGetDeviceProperties(&device->properties, ordinal);
      status != cudaSuccess) {
    return std::string("CUDA device properties: ") + cudaGetErrorString(status);
  }
  if (device->properties.major < 8) {
    return std::string(device->properties.name) + " has compute capability " +
           std::to_string(device->properties.major) + "." +
           std::to_string(device->properties.minor) + "; 8.0 or newer is needed";
  }
  return "";
}

}  // namespace

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

std::unique_ptr<Backend> MakeCudaBackend(const CudaOptions& options, std::string* error) {
  Device device;
  *error = Find(options.device, &device);
  if (!error->empty()) return nullptr;
  std::unique_ptr<const CublasLt> cublaslt = LoadCublasLt(kCublasLtName, error);
  if (!cublaslt) return nullptr;
  if (options.on_error) SetCudaErrorHandler(options.on_error);
  CUDA_CHECK(cudaSetDevice(options.device));
  size_t bytes = options.pool_bytes;
  if (bytes == 0) {
    size_t free_bytes = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    if (free_bytes <= options.reserve_bytes) {
      *error = "only " + std::to_string(free_bytes >> 20) + " MiB of device memory are free";
      return nullptr;
    }
    bytes = free_bytes - options.reserve_bytes;
  }
  cudaStream_t stream = nullptr;
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::unique_ptr<DeviceMemory> memory = DeviceMemory::Create(bytes, stream, error);
  if (!memory) {
    CUDA_CHECK(cudaStreamDestroy(stream));
    return nullptr;
  }
  return std::make_unique<CudaBackend>(device, options, stream, std::move(cublaslt),
                                       std::move(memory));
}

}  // namespace entropyserve
