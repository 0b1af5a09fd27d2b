// Decides what the next step runs. Pure: no GPU, no clock, no thread; the same calls give the same
// plans.
//
// A request waits until its worst case of pages fits, then prefills in chunks, then decodes a token
// per step. Every decoding sequence is served first; what is left of the step's token budget goes
// to prefills, the one with the least left first. Both orders age: a request that waited gains on
// those that came later, so none waits for ever.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace entropyserve {

struct SchedulerOptions {
  int64_t step_tokens = 2048;        // tokens of a step that serves several sequences
  int64_t lone_chunk_tokens = 8192;  // tokens of a step that serves one prefill and nothing else
  int64_t max_sequences = 64;        // admitted at the same time
  // A waiting request overtakes another that has this many tokens less left, per step waited
  // longer.
  int64_t ageing_tokens = 256;
  // Once the first of the queue has been passed over for pages this many steps, nobody overtakes
  // it.
  int64_t patience_steps = 64;
};

struct SchedulerRequest {
  uint64_t id = 0;
  int64_t prompt = 0;      // tokens to prefill
  int64_t pages = 0;       // worst case
  int64_t segment = 512;   // chunks are cut at its multiples
  bool exclusive = false;  // the whole prompt in one step, alone
};

struct StepPlan {
  struct Work {
    uint64_t id = 0;
    int64_t tokens = 0;
    bool prefill = false;
    bool operator==(const Work&) const = default;
  };
  std::vector<uint64_t> admit;  // to be admitted before the step, in this order
  std::vector<Work> work;       // decodes first; empty: nothing can run
};

// Not thread-safe.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerOptions& options) : options_(options) {}

  void Enqueue(const SchedulerRequest& request);
  // The next step's plan, given the pages that nobody holds or reserved. Work of a plan counts as
  // done.
  StepPlan Next(int64_t available_pages);
  // The waiting request that comes first, if another may run: room made for it is used. Null: none.
  const SchedulerRequest* NextToAdmit();
  // A request that was admitted in the last plan cannot begin yet; its work did not happen.
  void Hold(uint64_t id);
  void Release(uint64_t id);  // now it can
  // Pages were there, but something else was not: the request waits again, in its old place.
  void Requeue(uint64_t id);
  // Finished, cancelled or failed. Unknown ids are ignored.
  void Remove(uint64_t id);
  void SetPaused(uint64_t id, bool paused);

  const SchedulerOptions& options() const { return options_; }
  int64_t waiting() const { return int64_t(waiting_.size()); }
  int64_t running() const { return int64_t(running_.size()); }
  int64_t waiting_tokens() const;
  // Prompt tokens that admitted requests have not prefilled yet.
  int64_t prefill_backlog() const;

 private:
  struct Entry {
    SchedulerRequest request;
    int64_t done = 0;         // prompt tokens prefilled
    int64_t enqueued_at = 0;  // step number
    int64_t passed_over = 0;  // steps in which it was first and did not fit
    bool paused = false;
    bool held = false;
    int64_t remaining() const { return request.prompt - done; }
  };

  int64_t Priority(const Entry& entry) const;  // smaller runs earlier
  std::vector<Entry*> ByPriority(std::map<uint64_t, Entry>* entries);
  void Admit(int64_t available_pages, StepPlan* plan);
  void PlanPrefills(int64_t decodes, StepPlan* plan);

  const SchedulerOptions options_;
  int64_t step_ = 0;
  std::map<uint64_t, Entry> waiting_, running_;  // by id: the order of arrival
};

}  // namespace entropyserve
