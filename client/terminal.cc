#include "client/terminal.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace entropyserve {
namespace {

// `value` with the largest of `units` that leaves at least 1.
std::string Scaled(double value, double step, const char* const (&units)[6]) {
  size_t unit = 0;
  while (value >= step && unit + 1 < std::size(units)) {
    value /= step;
    ++unit;
  }
  return absl::StrFormat("%.*f %s", value < 10 && unit > 0 ? 1 : 0, value, units[unit]);
}

std::string Rate(double tokens, double seconds) {
  if (seconds <= 0 || tokens <= 0) return "";
  return absl::StrFormat(" (%.*f tokens/s)", tokens / seconds < 10 ? 1 : 0, tokens / seconds);
}

const char* Describe(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "end of answer";
    case v1::FINISH_REASON_STOP_STRING:
      return "stop string";
    case v1::FINISH_REASON_STOP_TOKEN:
      return "stop token";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    case v1::FINISH_REASON_CANCELLED:
      return "cancelled";
    case v1::FINISH_REASON_ERROR:
      return "error";
    default:
      return "unknown";
  }
}

}  // namespace

std::string FormatBytes(double bytes) {
  return Scaled(bytes, 1024, {"B", "KiB", "MiB", "GiB", "TiB", "PiB"});
}

std::string FormatFlops(double flops) {
  return Scaled(flops, 1000, {"FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"});
}

std::string FormatProgress(int64_t done, int64_t total, double seconds) {
  constexpr int kWidth = 30;
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 0;
  const int filled = std::clamp(static_cast<int>(share * kWidth), 0, kWidth);
  const double rate = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  std::string line = absl::StrFormat("[%s%s] %3.0f %%  %d of %d tokens", std::string(filled, '#'),
                                     std::string(kWidth - filled, '-'), share * 100, done, total);
  if (rate > 0) {
    absl::StrAppendFormat(&line, ", %.0f tokens/s, %.1f s left", rate,
                          static_cast<double>(total - done) / rate);
  }
  return line;
}

void ProgressBar::Update(const v1::Progress& progress) {
  if (!enabled_) return;
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const std::string line =
      FormatProgress(progress.prefilled_tokens(), progress.total_tokens(), seconds);
  std::fprintf(stderr, "\r\x1b[K%s", line.c_str());
  std::fflush(stderr);
  drawn_ = true;
}

void ProgressBar::Clear() {
  if (!drawn_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
  drawn_ = false;
}

std::string FormatReceipt(const v1::Finished& finished) {
  const v1::Receipt& r = finished.receipt();
  const auto d = [](int64_t value) { return static_cast<double>(value); };
  std::string out;
  const auto line = [&out](const char* name, const std::string& value) {
    absl::StrAppendFormat(&out, "  %-10s %s\n", name, value);
  };
  line("finish", Describe(finished.reason()));
  line("tokens", absl::StrFormat("%d prompt, %d cached, %d generated", r.prompt_tokens(),
                                 r.cached_tokens(), r.generated_tokens()));
  line("prefill",
       absl::StrFormat("%.2f s%s, first token after %.2f s (queued %.2f s)", r.prefill_seconds(),
                       Rate(d(r.prompt_tokens()), r.prefill_seconds()), r.ttft_seconds(),
                       r.queue_seconds()));
  line("decode", absl::StrFormat("%.2f s%s", r.decode_seconds(),
                                 Rate(d(r.generated_tokens() - 1), r.decode_seconds())));
  line("attention",
       absl::StrFormat("%.1f %% of dense: %s of %s, rigid heads %.0f %%",
                       r.attention_flops_ratio() * 100, FormatFlops(r.attention_flops_executed()),
                       FormatFlops(r.attention_flops_dense()), r.rigid_share() * 100));
  line("kv cache",
       r.compressed()
           ? absl::StrFormat("%s -> %s (%.1f %%)", FormatBytes(d(r.kv_bytes_before())),
                             FormatBytes(d(r.kv_bytes_after())), r.kv_bytes_ratio() * 100)
           : absl::StrFormat("%s, not compressed", FormatBytes(d(r.kv_bytes_after()))));
  line("policy", absl::StrCat("prefill ", r.policy().prefill().preset(), ", kv ",
                              r.policy().kv().preset(), ", seed ", r.seed()));
  return out;
}

std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string json;
  if (!google::protobuf::util::MessageToJsonString(message, &json, options).ok()) return "{}";
  return json;
}

std::string Printable(const std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 ? byte != 0x7f : c == '\n' || c == '\t') out += c;
  }
  return out;
}

}  // namespace entropyserve
