#include "engine/scheduler.h"

#include <algorithm>

#include "kernels/check.h"

namespace entropyserve {

void Scheduler::Enqueue(const SchedulerRequest& request) {
  Check(request.prompt > 0 && request.segment > 0, "an empty prompt");
  const bool added =
      waiting_.emplace(request.id, Entry{.request = request, .enqueued_at = step_}).second;
  Check(added, "an id twice");
}

StepPlan Scheduler::Next(int64_t available_pages) {
  ++step_;
  StepPlan plan;
  Admit(available_pages, &plan);
  for (auto& [id, entry] : running_) {
    if (entry.remaining() == 0 && !entry.paused) plan.work.push_back({id, 1, false});
  }
  PlanPrefills(int64_t(plan.work.size()), &plan);
  return plan;
}

int64_t Scheduler::Priority(const Entry& entry) const {
  return entry.remaining() - (step_ - entry.enqueued_at) * options_.ageing_tokens;
}

std::vector<Scheduler::Entry*> Scheduler::ByPriority(std::map<uint64_t, Entry>* entries) {
  std::vector<Entry*> order;
  for (auto& [id, entry] : *entries) order.push_back(&entry);
  // Stable: equals stay in the order of arrival.
  std::stable_sort(order.begin(), order.end(),
                   [this](const Entry* a, const Entry* b) { return Priority(*a) < Priority(*b); });
  return order;
}

void Scheduler::Admit(int64_t available_pages, StepPlan* plan) {
  if (waiting_.empty()) return;
  std::vector<Entry*> order = ByPriority(&waiting_);
  for (Entry* entry : order) {
    if (running() >= options_.max_sequences) break;
    if (entry->paused) continue;
    if (entry->request.pages > available_pages) {
      if (++entry->passed_over > options_.patience_steps) break;
      continue;
    }
    available_pages -= entry->request.pages;
    const uint64_t id = entry->request.id;
    plan->admit.push_back(id);
    running_.insert(waiting_.extract(id));
  }
}

const SchedulerRequest* Scheduler::NextToAdmit() {
  if (running() >= options_.max_sequences) return nullptr;
  for (const Entry* entry : ByPriority(&waiting_)) {
    if (!entry->paused) return &entry->request;
  }
  return nullptr;
}

void Scheduler::PlanPrefills(int64_t decodes, StepPlan* plan) {
  std::vector<Entry*> prefills;
  bool others = decodes > 0;
  for (Entry* entry : ByPriority(&running_)) {
    if (entry->remaining() == 0 || entry->paused) continue;
    others = others || entry->held;
    if (!entry->held) prefills.push_back(entry);
  }
  if (prefills.empty()) return;
  if (prefills.front()->request.exclusive) {
    // Everybody else waits for this one step.
    Entry* entry = prefills.front();
    plan->work = {{entry->request.id, entry->remaining(), true}};
    entry->done = entry->request.prompt;
    return;
  }
  const bool lone = prefills.size() == 1 && !others;
  int64_t budget = lone ? std::max(options_.lone_chunk_tokens, options_.step_tokens)
                        : options_.step_tokens - decodes;
  bool any = false;
  for (Entry* entry : prefills) {
    if (entry->request.exclusive) continue;
    const int64_t segment = entry->request.segment;
    int64_t tokens = std::min(entry->remaining(), budget);
    if (tokens < entry->remaining()) tokens -= tokens % segment;
    // However many sequences decode, prefill goes on: one segment a step at least.
    if (tokens <= 0 && !any) tokens = std::min(entry->remaining(), segment);
    if (tokens <= 0) continue;
    any = true;
    budget -= tokens;
    entry->done += tokens;
    plan->work.push_back({entry->request.id, tokens, true});
  }
}

void Scheduler::Hold(uint64_t id) {
  Entry& entry = running_.at(id);
  entry.held = true;
  entry.done = 0;
}

void Scheduler::Release(uint64_t id) { running_.at(id).held = false; }

void Scheduler::Requeue(uint64_t id) {
  auto node = running_.extract(id);
  Check(!node.empty(), "requeue of a request that was not admitted");
  node.mapped().done = 0;
  waiting_.insert(std::move(node));
}

void Scheduler::Remove(uint64_t id) {
  waiting_.erase(id);
  running_.erase(id);
}

void Scheduler::SetPaused(uint64_t id, bool paused) {
  for (auto* entries : {&waiting_, &running_}) {
    if (auto it = entries->find(id); it != entries->end()) it->second.paused = paused;
  }
}

int64_t Scheduler::waiting_tokens() const {
  int64_t tokens = 0;
  for (const auto& [id, entry] : waiting_) tokens += entry.request.prompt;
  return tokens;
}

int64_t Scheduler::prefill_backlog() const {
  int64_t tokens = 0;
  for (const auto& [id, entry] : running_) tokens += entry.remaining();
  return tokens;
}

}  // namespace entropyserve
