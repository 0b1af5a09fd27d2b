#include "client/session_table.h"

#include "absl/strings/str_format.h"
#include "client/terminal.h"

namespace entropyserve {
namespace {

const char* TierName(v1::Session::Tier tier) {
  switch (tier) {
    case v1::Session::TIER_DEVICE:
      return "device";
    case v1::Session::TIER_HOST:
      return "host";
    case v1::Session::TIER_DISK:
      return "disk";
    default:
      return "-";
  }
}

}  // namespace

std::string FormatSessions(const std::vector<v1::Session>& sessions) {
  std::string out = absl::StrFormat("%-32s %6s %10s %10s %10s %-7s %8s %-7s %s\n", "id", "turns",
                                    "positions", "kept", "kv", "tier", "idle s", "policy", "state");
  for (const v1::Session& session : sessions) {
    absl::StrAppendFormat(
        &out, "%-32s %6d %10d %10d %10s %-7s %8.0f %-7s %s\n", Printable(session.id()),
        session.turns(), session.positions(), session.kept_tokens(),
        FormatBytes(static_cast<double>(session.kv_bytes())), TierName(session.tier()),
        session.idle_seconds(), session.kv_policy().empty() ? "-" : Printable(session.kv_policy()),
        session.busy() ? "busy" : "idle");
  }
  return out;
}

}  // namespace entropyserve
