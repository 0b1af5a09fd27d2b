// kill -9 while sessions are written: after a restart every session goes on where it was, or is
// said to be lost. What was said before is forced, so a conversation is known in advance, and its
// log probabilities, which depend on everything the cache holds, are compared with those of a
// server that nobody disturbed.
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/drills/call.h"
#include "tests/drills/drills.h"

namespace entropyserve {
namespace {

constexpr int kSessions = 12, kTurns = 8, kAnswer = 8;  // tokens of an answer

v1::GenerateRequest Turn(const std::string& session_id, int script, int turn) {
  std::mt19937 random(static_cast<unsigned>(script * 1000 + turn));
  v1::GenerateRequest r;
  r.set_session_id(session_id);
  const int prompt = 20 + int(random() % 200);
  for (int i = 0; i < prompt; ++i) r.mutable_token_ids()->add_ids(int(random() % 500));
  v1::SamplingParams* const sampling = r.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_max_new_tokens(kAnswer);
  sampling->set_ignore_eos(true);
  sampling->set_logprobs(0);
  for (int i = 0; i < kAnswer; ++i) sampling->add_forced_token_ids(int(random() % 500));
  return r;
}

struct Conversation {
  int script = 0;
  std::string id = {};  // of its session; empty: none yet
  int64_t turns = 0;    // that the caller knows to have ended
};

class KillDrill {
 public:
  KillDrill(const DrillOptions& options, Drill* drill) : options_(options), drill_(*drill) {}

  void Run() {
    Undisturbed();
    for (int script = 0; script < kSessions; ++script) conversations_.push_back({.script = script});
    for (int round = 0; round <= options_.times; ++round) {
      ServerProcess server(options_.server, options_.folder, Flags());
      for (Conversation& c : conversations_) LookFor(&server, &c);
      const bool last = round == options_.times;
      Talk(&server, last ? 0 : 5 + int(random_() % 40));
      if (!last) continue;
      server.Signal(SIGTERM);
      drill_.Expect(server.Wait() == 0, "the last server leaves with 0");
    }
    drill_.Report("killed", options_.times, "times");
    drill_.Report("turns, all as undisturbed", double(turns_), "");
    drill_.Report("sessions found again with their history", double(found_), "");
    drill_.Report("sessions that said SESSION_LOST", double(lost_), "");
    drill_.Report("largest difference of a log probability", largest_, "");
  }

 private:
  // Idle sessions leave the pool at once: every turn is followed by a write.
  std::vector<std::string> Flags() const {
    return {"--kv-bytes=256M",
            "--max-sequences=6",
            "--dtype=f32",
            "--session-dir=" + options_.folder,
            "--session-device-bytes=1",
            "--session-host-bytes=0"};
  }

  void Undisturbed() {
    ServerProcess server(options_.server, options_.folder,
                         {"--kv-bytes=256M", "--max-sequences=6", "--dtype=f32"});
    for (int script = 0; script < kSessions; ++script) {
      const std::string id = Create(&server);
      for (int turn = 0; turn < kTurns; ++turn) {
        Call call(&server.stub(), Turn(id, script, turn));
        call.Wait();
        drill_.Expect(call.complete() && call.logprobs().size() == kAnswer,
                      "an undisturbed turn ends: " + call.status().error_message());
        reference_[{script, turn}] = call.logprobs();
      }
    }
  }

  std::string Create(ServerProcess* server) {
    grpc::ClientContext context;
    v1::Session session;
    const grpc::Status status = NextStub(server)->CreateSession(&context, {}, &session);
    return status.ok() ? session.id() : "";
  }

  v1::Session::Tier Tier(ServerProcess* server, const Conversation& c) {
    grpc::ClientContext context;
    v1::GetSessionRequest request;
    request.set_session_id(c.id);
    v1::Session session;
    const bool ok = NextStub(server)->GetSession(&context, request, &session).ok();
    return ok ? session.tier() : v1::Session::TIER_UNSPECIFIED;
  }

  // What the server that has just started knows of a conversation.
  void LookFor(ServerProcess* server, Conversation* c) {
    if (c->id.empty()) return;
    grpc::ClientContext context;
    v1::GetSessionRequest request;
    request.set_session_id(c->id);
    v1::Session session;
    const grpc::Status status = server->stub().GetSession(&context, request, &session);
    if (status.ok()) {
      // A turn may have ended without the caller hearing of it; none may be missing.
      drill_.Expect(session.turns() == c->turns || session.turns() == c->turns + 1,
                    "a session that is found has all its turns: " +
                        std::to_string(session.turns()) + " of " + std::to_string(c->turns));
      c->turns = session.turns();
      ++found_;
      return;
    }
    drill_.Expect(status.error_code() == grpc::StatusCode::FAILED_PRECONDITION,
                  "a session is there or lost, not: " + status.error_message());
    ++lost_;
    *c = {.script = c->script};
  }

  // Every conversation goes on, all at once. After `kill_after` turns the server is killed; 0: the
  // conversations end.
  void Talk(ServerProcess* server, int kill_after) {
    std::atomic<int> turns = 0;
    std::atomic<bool> killed = false;
    std::vector<std::thread> threads;
    for (Conversation& c : conversations_) {
      threads.emplace_back([&, this] {
        while (!killed.load() && c.turns < kTurns) {
          if (c.id.empty()) c.id = Create(server);
          if (c.id.empty() || !TakeTurn(server, &c)) break;
          if (++turns == kill_after) {
            killed.store(true);
            server->Signal(SIGKILL);
          }
          // Every other time the caller thinks for a while: its session may go into a file.
          constexpr int kPolls = 200;
          for (int i = 0; i < kPolls && c.turns % 2 == 0 && !killed.load(); ++i) {
            if (Tier(server, c) == v1::Session::TIER_DISK) break;
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
          }
        }
        // A conversation that has ended makes room for another.
        if (c.turns >= kTurns) c = {.script = c.script};
      });
    }
    for (std::thread& thread : threads) thread.join();
    if (kill_after > 0) server->Signal(SIGKILL);
    turns_ += turns.load();
  }

  bool TakeTurn(ServerProcess* server, Conversation* c) {
    const int turn = int(c->turns);
    Call call(NextStub(server), Turn(c->id, c->script, turn));
    call.Wait();
    if (!call.complete()) {
      std::lock_guard lock(mutex_);
      const bool gone = call.status().error_code() == grpc::StatusCode::UNAVAILABLE;
      const bool lost = call.reason() == "SESSION_LOST";
      drill_.Expect(gone || lost, "a turn ends, or its server or session is gone, not: " +
                                      call.status().error_message());
      if (lost) ++lost_, *c = {.script = c->script};
      return lost;
    }
    ++c->turns;
    std::lock_guard lock(mutex_);
    double difference = 0;
    const std::vector<float>& expected = reference_[{c->script, turn}];
    for (size_t i = 0; i < expected.size() && i < call.logprobs().size(); ++i)
      difference = std::max(difference, double(std::fabs(expected[i] - call.logprobs()[i])));
    largest_ = std::max(largest_, difference);
    constexpr double kRounding = 0.002;  // of a batch of another shape
    drill_.Expect(call.logprobs().size() == expected.size() && difference < kRounding,
                  "a turn is as undisturbed, not off by " + std::to_string(difference));
    return true;
  }

  ServerProcess::Stub* NextStub(ServerProcess* server) {
    std::lock_guard lock(mutex_);
    return &server->stub();
  }

  const DrillOptions& options_;
  Drill& drill_;
  std::mt19937 random_{7};
  std::vector<Conversation> conversations_;
  std::map<std::pair<int, int>, std::vector<float>> reference_;  // of (script, turn)

  std::mutex mutex_;
  int64_t turns_ = 0, found_ = 0, lost_ = 0;
  double largest_ = 0;
};

}  // namespace

void Kill(const DrillOptions& options, Drill* drill) { KillDrill(options, drill).Run(); }

}  // namespace entropyserve
