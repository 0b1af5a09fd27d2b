// What the simulation knows about requests and sessions without asking the engine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/engine.h"
#include "tests/fake_model.h"

namespace entropyserve {

// A conversation as the first kv head of the first layer holds it, which is what the fake model's
// next token depends on.
struct Conversation {
  std::vector<std::pair<int32_t, int32_t>> cached;  // (true position, token), ascending
  std::vector<int32_t> pending;                     // fed first in the next turn
  int64_t positions = 0;

  void Feed(int32_t token) { cached.emplace_back(int32_t(positions++), token); }
  FakeHash Hash() const {
    FakeHash hash;
    for (const auto& [position, token] : cached) hash.Add(position, token);
    return hash;
  }
  // False: something that is kept was not there.
  bool Keep(const std::vector<int32_t>& kept) {
    size_t next = 0;
    std::erase_if(cached, [&](const std::pair<int32_t, int32_t>& entry) {
      const bool stays = next < kept.size() && kept[next] == entry.first;
      next += stays;
      return !stays;
    });
    return next == kept.size();
  }
};

struct SimulatedSession {
  std::string id, owner;
  Conversation conversation;
  int64_t turns = 0;
  bool deleted = false;
  bool lost = false;
};

// A request and its reader. The engine calls it; what is wrong is noted in `error`.
class SimulatedRequest final : public EventSink {
 public:
  EngineRequest request;
  std::shared_ptr<SimulatedSession> session;  // null: none
  RequestId id = 0;
  bool paused = false, cancel_asked = false, expects_cancel = false;

  std::optional<AcceptedEvent> accepted;
  int64_t prefilled = 0, total = 0;
  std::vector<int32_t> ids;
  std::optional<FinishedEvent> finished;
  std::string error;

  void OnAccepted(const AcceptedEvent& event) override {
    if (accepted || !ids.empty() || finished) Wrong("accepted twice or late");
    accepted = event;
  }
  void OnProgress(int64_t done, int64_t all) override {
    if (!accepted || finished || !ids.empty()) Wrong("progress out of order");
    if (done <= prefilled || done > all || (total != 0 && all != total))
      Wrong("progress goes back");
    prefilled = done;
    total = all;
  }
  void OnTokens(TokensEvent event) override {
    if (!accepted || finished) Wrong("tokens out of order");
    if (request.progress && prefilled != total) Wrong("tokens before the prompt is read");
    ids.insert(ids.end(), event.ids.begin(), event.ids.end());
  }
  void OnFinished(FinishedEvent event) override {
    if (finished) Wrong("finished twice");
    finished = std::move(event);
  }

  // After OnFinished: the tokens are those that follow, and the session is moved on.
  void CheckAnswer(int64_t* checked_tokens) {
    const FinishedEvent& end = *finished;
    if (end.receipt.generated_tokens != int64_t(ids.size())) Wrong("the receipt counts otherwise");
    if (int64_t(ids.size()) > request.sampling.max_new_tokens) Wrong("more tokens than asked for");
    CheckStatus();
    const bool parked = !ids.empty() || (end.status.ok() && request.sampling.max_new_tokens == 0);
    if (!parked) {
      if (end.status.ok()) Wrong("completed without a token");
      return;
    }
    Conversation turn = session ? session->conversation : Conversation();
    if (end.receipt.cached_tokens != turn.positions) {
      Wrong(absl::StrCat("the session held ", end.receipt.cached_tokens, " positions, not ",
                         turn.positions));
    }
    for (const auto* input : {&turn.pending, &request.prompt}) {
      for (int32_t token : std::vector<int32_t>(*input)) turn.Feed(token);
    }
    const int64_t prompt_end = turn.positions;
    std::vector<int32_t> kept;
    if (end.receipt.compressed && end.trace) kept = end.trace->kept_positions.at(0);
    // The window's last token always stays: it says when the cache was compressed.
    const int64_t compressed_at = kept.empty() ? INT64_MAX : kept.back() + 1;
    // A layer's budget that heads share may be exceeded, and compressed to, twice in a turn: what
    // the first time kept is not known.
    const bool shared = request.kv.params.rule == KvRule::kAdaKv && !kept.empty();
    const int64_t gap = request.kv.params.rule == KvRule::kSnapKv ? 0 : request.kv.params.gap;
    CheckCompression(prompt_end, gap, compressed_at);
    FakeHash hash = turn.Hash();
    bool narrowed = false;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (!narrowed && turn.positions > compressed_at) {
        narrowed = true;
        const auto last = turn.cached.back();
        turn.cached.pop_back();
        if (!turn.Keep(kept)) Wrong("kept what was not there");
        turn.cached.push_back(last);
        hash = turn.Hash();
      }
      const auto& forced = request.sampling.forced_token_ids;
      const int32_t expected = i < forced.size() ? forced[i] : hash.Next();
      if (ids[i] != expected && !(shared && int64_t(i) > gap)) {
        Wrong(absl::StrCat("token ", i, " is ", ids[i], ", not ", expected, "; prompt ends at ",
                           prompt_end, ", compressed at ", compressed_at));
        return;
      }
      ++*checked_tokens;
      if (i + 1 == ids.size()) break;  // no step has read it
      hash.Add(turn.positions, ids[i]);
      turn.Feed(ids[i]);
    }
    if (!kept.empty() && !narrowed && !turn.Keep(kept)) Wrong("kept what was not there");
    turn.pending.clear();
    if (!ids.empty()) {
      turn.pending.push_back(ids.back());
      const std::vector<int32_t>& after = request.end_of_turn;
      const bool said = !after.empty() && ids.back() == after.front();
      turn.pending.insert(turn.pending.end(), after.begin() + said, after.end());
    }
    if (!session) return;
    session->conversation = std::move(turn);
    ++session->turns;
  }

 private:
  void Wrong(const std::string& what) {
    if (error.empty()) error = absl::StrCat("request ", id, ": ", what);
  }

  // Compression comes `gap` tokens after the prompt, or at the end.
  void CheckCompression(int64_t prompt_end, int64_t gap, int64_t at) {
    const KvParams& kv = request.kv.params;
    if (kv.rule == KvRule::kFull || kv.rule == KvRule::kAdaKv) return;
    const int64_t n = int64_t(ids.size());
    const int64_t end = prompt_end + std::max<int64_t>(n - 1, 0);
    if (at != INT64_MAX && at != prompt_end + gap && at != end)
      Wrong(absl::StrCat("compressed at ", at, ": prompt ", prompt_end, ", gap ", gap));
    const bool must = !session && n > gap && prompt_end + gap > kv.budget;
    if (must && at != prompt_end + gap) Wrong("not compressed in time");
  }

  void CheckStatus() {
    const FinishedEvent& end = *finished;
    const auto code = end.status.code();
    bool allowed = false;
    switch (end.reason) {
      case FinishReason::kCancelled:
        allowed = expects_cancel || (code == absl::StatusCode::kDeadlineExceeded &&
                                     request.deadline != TimePoint::max());
        break;
      case FinishReason::kError:
        // A full pool, a failed allocation, a quota; a busy, lost or deleted session; a context
        // that is full; a deadline that is too near.
        allowed =
            code == absl::StatusCode::kResourceExhausted ||
            (session &&
             (Reason(end.status) == kSessionBusy || Reason(end.status) == kSessionLost)) ||
            (code == absl::StatusCode::kNotFound && session && session->deleted) ||
            (code == absl::StatusCode::kInvalidArgument && session) ||
            (code == absl::StatusCode::kDeadlineExceeded && request.deadline != TimePoint::max());
        break;
      case FinishReason::kLength:
        allowed = end.status.ok();
        break;
      case FinishReason::kStopToken:
        allowed = end.status.ok() && !ids.empty() &&
                  std::count(request.sampling.stop_token_ids.begin(),
                             request.sampling.stop_token_ids.end(), ids.back()) > 0;
        break;
      default:
        break;
    }
    if (!allowed) Wrong(absl::StrCat("ended by ", int(end.reason), " ", end.status.ToString()));
  }
};

}  // namespace entropyserve
