#include "server/service_core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr double kStreamRetrySeconds = 2;

}  // namespace

ServiceCore::ServiceCore(ServiceLimits limits, Authenticator authenticator, Metrics* metrics,
                         Log* log)
    : limits_(limits),
      authenticator_(std::move(authenticator)),
      metrics_(metrics),
      log_(log),
      lanes_(limits.short_prompt_bytes, limits.short_lane_bytes, limits.long_lane_bytes) {
  watchdog_ = std::thread([this] { WatchUnread(); });
}

ServiceCore::~ServiceCore() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    reader_expected_.NotifyAll();
  }
  watchdog_.join();
}

absl::StatusOr<const ServedModel*> ServiceCore::Model() const {
  const ServedModel* model = model_.load();
  if (model == nullptr) return absl::UnavailableError("the server is starting");
  return model;
}

absl::Status ServiceCore::CheckAccepting() const {
  if (draining()) return absl::UnavailableError("the server is draining");
  return Model().status();
}

absl::Status ServiceCore::Open(OpenCall* call, const std::string& owner) {
  MutexLock lock(&mutex_);
  // Under the lock: a call that is not in the set when a drain has begun is refused.
  if (draining()) return absl::UnavailableError("the server is draining");
  if (static_cast<int64_t>(calls_.size()) >= limits_.max_open_streams) {
    return WithRetryAfter(absl::ResourceExhaustedError("too many streams are open"),
                          kStreamRetrySeconds);
  }
  const auto own = owner_calls_.find(owner);
  if (limits_.max_owner_streams > 0 && own != owner_calls_.end() &&
      own->second >= limits_.max_owner_streams) {
    return WithRetryAfter(
        absl::ResourceExhaustedError(
            absl::StrCat("the caller's quota of streams is used up: ", own->second,
                         " are open, its limit (--max-key-streams); wait until one has ended")),
        kStreamRetrySeconds);
  }
  calls_.emplace(call, owner);
  ++owner_calls_[owner];
  return absl::OkStatus();
}

void ServiceCore::Close(OpenCall* call) {
  MutexLock lock(&mutex_);
  unread_.erase(call);
  const auto found = calls_.find(call);
  if (found == calls_.end()) return;  // it was refused
  if (--owner_calls_[found->second] == 0) owner_calls_.erase(found->second);
  calls_.erase(found);
}

void ServiceCore::ExpectReader(OpenCall* call) {
  using Seconds = std::chrono::duration<double>;
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                         Seconds(limits_.unread_seconds));
  MutexLock lock(&mutex_);
  if (!calls_.contains(call)) return;  // closed: with keep_on_disconnect the answer ends later
  const bool first = unread_.empty();
  unread_[call] = until;
  if (first) reader_expected_.NotifyAll();
}

void ServiceCore::WatchUnread() {
  MutexLock lock(&mutex_);
  while (!stopping_) {
    auto next = std::chrono::steady_clock::time_point::max();
    const auto now = std::chrono::steady_clock::now();
    for (auto it = unread_.begin(); it != unread_.end();) {
      if (it->second <= now) {
        it->first->CutOff();  // alive: Close waits for the lock
        it = unread_.erase(it);
      } else {
        next = std::min(next, it->second);
        ++it;
      }
    }
    if (unread_.empty()) {
      reader_expected_.Wait(&mutex_);
    } else {
      reader_expected_.WaitFor(&mutex_, next - now);
    }
  }
}

int64_t ServiceCore::open_calls() const {
  MutexLock lock(&mutex_);
  return static_cast<int64_t>(calls_.size());
}

void ServiceCore::AbortAll(const absl::Status& why) {
  MutexLock lock(&mutex_);  // keeps the calls alive: Close waits for it
  for (const auto& [call, owner] : calls_) call->Abort(why);
}

bool ServiceCore::Idle() const {
  if (open_calls() > 0) return false;
  const ServedModel* model = model_.load();
  if (model == nullptr) return true;
  const EngineStats stats = model->engine->Stats();
  return stats.running == 0 && stats.waiting == 0;
}

std::chrono::steady_clock::time_point ServiceCore::Deadline(
    std::chrono::system_clock::time_point asked) const {
  using Seconds = std::chrono::duration<double>;
  double seconds = limits_.default_deadline_seconds;
  if (asked != std::chrono::system_clock::time_point::max()) {
    seconds = std::min(Seconds(asked - std::chrono::system_clock::now()).count(),
                       limits_.max_deadline_seconds);
  }
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(Seconds(seconds));
}

ServerGauges ServiceCore::Gauges() const {
  ServerGauges gauges;
  gauges.open_streams = open_calls();
  gauges.short_lane_bytes = lanes_.short_bytes();
  gauges.long_lane_bytes = lanes_.long_bytes();
  gauges.session_lane_bytes = lanes_.session_bytes();
  if (const ServedModel* model = model_.load()) {
    gauges.engine = model->engine->Stats();
    gauges.ready = !draining();
  }
  return gauges;
}

double ServiceCore::uptime_seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

}  // namespace entropyserve
