#include "server/outbox.h"

#include <utility>

#include "kernels/check.h"

namespace entropyserve {
namespace {

// Joined events stay well below the 4 MiB that clients accept by default.
constexpr size_t kMaxJoinedBytes = 256 << 10;

void Join(v1::Tokens&& from, v1::Tokens* into) {
  into->mutable_ids()->MergeFrom(from.ids());
  into->mutable_text()->append(from.text());
  for (v1::TokenLogprobs& logprobs : *from.mutable_logprobs()) {
    *into->add_logprobs() = std::move(logprobs);
  }
}

}  // namespace

void Outbox::Push(v1::GenerateEvent event) {
  const size_t bytes = event.ByteSizeLong();
  Entry* last = events_.empty() ? nullptr : &events_.back();
  if (last != nullptr && event.has_tokens() && last->event.has_tokens() &&
      last->bytes + bytes <= kMaxJoinedBytes) {
    Join(std::move(*event.mutable_tokens()), last->event.mutable_tokens());
    last->bytes += bytes;  // an upper bound: one header less
    bytes_ += bytes;
  } else if (last != nullptr && event.has_progress() && last->event.has_progress()) {
    last->event = std::move(event);
    bytes_ += bytes - last->bytes;
    last->bytes = bytes;
  } else {
    events_.push_back({std::move(event), bytes});
    bytes_ += bytes;
  }
  UpdatePause();
}

v1::GenerateEvent Outbox::Pop() {
  Check(!events_.empty(), "Pop of an empty outbox");
  Entry entry = std::move(events_.front());
  events_.pop_front();
  bytes_ -= entry.bytes;
  UpdatePause();
  return std::move(entry.event);
}

void Outbox::Clear() {
  events_.clear();
  bytes_ = 0;
  UpdatePause();
}

void Outbox::UpdatePause() {
  if (bytes_ >= high_bytes_) wants_pause_ = true;
  if (bytes_ <= high_bytes_ / 2) wants_pause_ = false;
}

}  // namespace entropyserve
