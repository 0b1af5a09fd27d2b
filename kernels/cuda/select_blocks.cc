#include "kernels/cuda/select_blocks.h"

#include <algorithm>

#include "kernels/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/sm90/block_mass.h"
#include "kernels/kv_view.h"

namespace entropyserve::cuda {
namespace {

constexpr size_t kSliceBytes = size_t{32} << 20;  // of scores and the like: stays in a Hopper's L2
constexpr int32_t kMinSegment = 128, kMinBlock = 8, kMaxSegment = 1024;  // tokens, of the policy

size_t Align(size_t bytes) { return (bytes + 255) / 256 * 256; }

// What a slice needs, as the largest of its segments needs it.
struct SliceSize {
  int32_t segments = 0;
  int64_t visible = 0;                   // blocks
  int64_t mass_rows = 0, mass_keys = 0;  // 0: no probes

  size_t centers(const AttentionShape& s) const {
    return Align(size_t(segments) * s.heads * s.head_dim * sizeof(float));
  }
  size_t scores(const AttentionShape& s) const {
    return Align(size_t(segments) * s.kv_heads * visible * sizeof(float));
  }
  size_t items(const AttentionShape& s) const {
    return Align(size_t(segments) * s.kv_heads * sizeof(MassItem));
  }
  size_t bytes(const AttentionShape& s) const {
    return centers(s) + scores(s) + items(s) +
           Align(MassScratchBytes(int64_t{segments} * s.kv_heads, mass_rows, mass_keys));
  }
};

int64_t MaxSegments(const Backend::Limits& limits) {
  return limits.max_rows / kMinSegment + limits.max_seqs;
}

size_t StatBytes(int64_t segments, const AttentionShape& shape) {
  return Align(size_t(segments) * shape.kv_heads * sizeof(RowStat));
}

class Selection {
 public:
  Selection(const SelectParams& op, bool hopper, void* scratch, size_t bytes, cudaStream_t stream)
      : op_(op), batch_(*op.batch), hopper_(hopper), stream_(stream) {
    const size_t stats = StatBytes(batch_.num_segments, op.shape);
    Check(stats < bytes, "Reserve took room for a step's segments");
    slice_bytes_ = bytes - stats;
    slice_ = static_cast<char*>(scratch) + stats;
    launch_.seqs = batch_.device_seqs;
    launch_.segments = batch_.device_segments;
    launch_.layer = op.layer;
    launch_.shape = op.shape;
    launch_.dtype = op.pool.dtype;
    launch_.pool_k = op.pool.k;
    launch_.pool_v = op.pool.v;
    launch_.q = op.q;
    launch_.lists = op.lists;
    launch_.stats = static_cast<RowStat*>(scratch);
  }

  void Run() {
    for (int32_t begin = 0; begin < batch_.num_segments;) {
      const bool whole = Acts(begin) && Seq(begin).policy.whole_prompt;
      int32_t end = begin + 1;  // a run of segments with one kind of budget
      while (end < batch_.num_segments &&
             (whole ? batch_.segments[end].seq == batch_.segments[begin].seq
                    : !(Acts(end) && Seq(end).policy.whole_prompt))) {
        ++end;
      }
      whole ? RunWhole(begin, end) : RunSlices(begin, end);
      begin = end;
    }
  }

 private:
  const BatchSeq& Seq(int32_t i) const { return batch_.seqs[batch_.segments[i].seq]; }
  bool Acts(int32_t i) const {
    return !Seq(i).policy.full && op_.layer >= Seq(i).policy.first_sparse_layer;
  }

  SliceSize With(SliceSize size, int32_t i) const {
    const BatchSeq& seq = Seq(i);
    const BatchSegment& segment = batch_.segments[i];
    const PrefillParams& policy = seq.policy;
    ++size.segments;
    if (!Acts(i)) return size;
    size.visible =
        std::max<int64_t>(size.visible, int64_t{segment.index} * (policy.segment / policy.block));
    if (policy.estimator == Estimator::kProbe) {
      size.mass_rows = std::max<int64_t>(
          size.mass_rows, int64_t{CeilDiv(segment.rows, policy.probe_stride)} * op_.shape.group());
      // A bound on past + turn tokens: no token is cached that has no position.
      size.mass_keys = std::max<int64_t>(size.mass_keys, int64_t{seq.position} + seq.rows);
    }
    return size;
  }

  // Takes segments from `begin` on while they fit.
  SliceSize Cut(int32_t begin, int32_t end) {
    SliceSize size = With({}, begin);
    Check(size.bytes(op_.shape) <= slice_bytes_, "Reserve took room for a segment's scores");
    while (begin + size.segments < end) {
      const SliceSize more = With(size, begin + size.segments);
      if (more.bytes(op_.shape) > slice_bytes_) break;
      size = more;
    }
    launch_.begin = begin;
    launch_.count = size.segments;
    launch_.stride = size.visible;
    launch_.centers = reinterpret_cast<float*>(slice_);
    launch_.scores = reinterpret_cast<float*>(slice_ + size.centers(op_.shape));
    launch_.items =
        reinterpret_cast<MassItem*>(slice_ + size.centers(op_.shape) + size.scores(op_.shape));
    return size;
  }

  void Score(const SliceSize& size) {
    if (size.visible == 0) return;
    const int32_t end = launch_.begin + launch_.count;
    for (int32_t i = launch_.begin; i < end;) {  // one sequence at a time
      int32_t next = i + 1;
      while (next < end && batch_.segments[next].seq == batch_.segments[i].seq) ++next;
      if (Acts(i) && Seq(i).policy.estimator == Estimator::kBox) {
        SelectLaunch part = launch_;
        const int64_t skipped = i - launch_.begin;
        part.begin = i;
        part.count = next - i;
        part.centers += skipped * op_.shape.heads * op_.shape.head_dim;
        part.scores += skipped * op_.shape.kv_heads * launch_.stride;
        LaunchBoxScores(part, stream_);
      }
      i = next;
    }
    if (size.mass_rows == 0) return;
    LaunchProbeItems(launch_, stream_);
    MassParams mass;
    mass.items = launch_.items;
    mass.num_items = launch_.count * op_.shape.kv_heads;
    mass.max_rows = int32_t(size.mass_rows);
    mass.max_keys = int32_t(size.mass_keys);
    mass.max_bins = int32_t(size.visible);
    mass.head_dim = op_.shape.head_dim;
    mass.dtype = op_.pool.dtype;
    mass.pool_k = op_.pool.k;
    mass.scratch = reinterpret_cast<char*>(launch_.items) + size.items(op_.shape);
    mass.mass = launch_.scores;
    mass.mass_stride = launch_.stride;
    if (hopper_) {
      CUDA_CHECK(sm90::LaunchBlockMass(mass, stream_));
    } else {
      LaunchMass(mass, stream_);
    }
  }

  void RunSlices(int32_t begin, int32_t end) {
    while (begin < end) {
      Score(Cut(begin, end));
      LaunchRowStats(launch_, stream_);
      LaunchBudgets(launch_, stream_);
      LaunchChoose(launch_, stream_);
      begin += launch_.count;
    }
  }

  // All entropies before any budget; scores are made again for the choice if they do not fit.
  void RunWhole(int32_t begin, int32_t end) {
    Check(Seq(begin).rows == Seq(begin).turn_total, "a whole-prompt policy runs in one chunk");
    for (int32_t i = begin; i < end; i += launch_.count) {
      Score(Cut(i, end));
      LaunchRowStats(launch_, stream_);
    }
    const bool one_slice = launch_.begin == begin;
    const SelectLaunch last = launch_;
    launch_.begin = begin;
    launch_.count = end - begin;
    LaunchWholePromptBudgets(launch_, stream_);
    launch_ = last;
    if (one_slice) return LaunchChoose(launch_, stream_);
    for (int32_t i = begin; i < end; i += launch_.count) {
      Score(Cut(i, end));
      LaunchChoose(launch_, stream_);
    }
  }

  const SelectParams& op_;
  const Batch& batch_;
  const bool hopper_;
  const cudaStream_t stream_;
  char* slice_ = nullptr;
  size_t slice_bytes_ = 0;
  SelectLaunch launch_;
};

}  // namespace

size_t SelectScratchBytes(const Backend::Limits& limits) {
  SliceSize one;  // the most that a single segment may need
  one.segments = 1;
  one.visible = CeilDiv<int64_t>(limits.max_context, kMinBlock);
  one.mass_rows = int64_t{kMaxSegment} * limits.shape.group();
  one.mass_keys = limits.max_context;
  return StatBytes(MaxSegments(limits), limits.shape) +
         std::max(kSliceBytes, one.bytes(limits.shape));
}

void RunSelectBlocks(const SelectParams& p, bool hopper, void* scratch, size_t scratch_bytes,
                     cudaStream_t stream) {
  Selection(p, hopper, scratch, scratch_bytes, stream).Run();
}

}  // namespace entropyserve::cuda
