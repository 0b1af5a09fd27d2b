#include "client/trace_page.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "client/terminal.h"
#include "client/trace_page_assets.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr int kSinkTokens = 4;  // what PrefillPolicy.keep_sinks keeps, by contract

std::string EscapeHtml(const std::string& text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"},
                                    {"<", "&lt;"},
                                    {">", "&gt;"},
                                    {"\"", "&quot;"},
                                    {"'", "&#39;"},
                                    {absl::string_view("\0", 1), "\uFFFD"}});
}

// --- numbers as JSON, which has no NaN and no infinities ---

void AppendNumber(float value, std::string* out) {
  if (std::isfinite(value)) {
    absl::StrAppend(out, value);  // six digits
  } else {
    out->append("null");
  }
}
void AppendNumber(int32_t value, std::string* out) { absl::StrAppend(out, value); }

// One array of all layers' values of one kind.
template <typename Field>
void AppendMatrix(const char* name, const TraceReport& report, Field field, std::string* out) {
  absl::StrAppend(out, ",\"", name, "\":[");
  bool first = true;
  for (const v1::LayerTrace& layer : report.layers) {
    for (const auto value : field(layer)) {
      if (!first) out->push_back(',');
      first = false;
      AppendNumber(value, out);
    }
  }
  out->push_back(']');
}

// Ascending positions as runs: tokens skipped, tokens kept, and so on.
void AppendRuns(const v1::KeptPositions& kept, std::string* out) {
  const auto& positions = kept.positions();
  out->push_back('[');
  int32_t end = 0;  // of the run before
  for (int i = 0; i < positions.size();) {
    int last = i;
    while (last + 1 < positions.size() && positions[last + 1] == positions[last] + 1) ++last;
    absl::StrAppend(out, i > 0 ? "," : "", positions[i] - end, ",", last - i + 1);
    end = positions[last] + 1;
    i = last + 1;
  }
  out->push_back(']');
}

void AppendKept(const TraceReport& report, std::string* out) {
  const bool compressed = std::any_of(report.layers.begin(), report.layers.end(),
                                      [](const auto& layer) { return layer.kept_size() > 0; });
  out->append(",\"kept\":");
  if (!compressed) {
    out->append("null");
    return;
  }
  const char* separator = "[";
  for (const v1::LayerTrace& layer : report.layers) {
    for (int head = 0; head < layer.kv_heads(); ++head) {
      out->append(separator);
      separator = ",";
      AppendRuns(head < layer.kept_size() ? layer.kept(head) : v1::KeptPositions(), out);
    }
  }
  out->push_back(']');
}

std::string Data(const TraceReport& report) {
  const v1::Receipt& receipt = report.finished.receipt();
  const v1::PrefillPolicy& prefill = receipt.policy().prefill();
  const v1::KvPolicy& kv = receipt.policy().kv();
  const v1::LayerTrace shape = report.layers.empty() ? v1::LayerTrace() : report.layers[0];
  int judged = 0;
  const std::vector<bool> rigid = RigidHeads(report, &judged);
  std::string out = absl::StrCat(
      "{\"layers\":", report.layers.size(), ",\"kvHeads\":", shape.kv_heads(),
      ",\"segments\":", shape.segments(), ",\"segmentTokens\":", shape.segment_tokens(),
      ",\"blockTokens\":", shape.block_tokens(), ",\"promptTokens\":", receipt.prompt_tokens(),
      ",\"cachedTokens\":", receipt.cached_tokens(), ",\"judged\":", judged);
  absl::StrAppend(&out, ",\"sinks\":", kv.keep_sinks() ? kSinkTokens : 0,
                  ",\"windowTokens\":", kv.window_tokens(), ",\"rigidBelow\":");
  AppendNumber(prefill.e_t(), &out);
  out.append(",\"rigid\":[");
  for (size_t i = 0; i < rigid.size(); ++i) absl::StrAppend(&out, i > 0 ? "," : "", int{rigid[i]});
  out.push_back(']');
  AppendMatrix(
      "entropy", report, [](const auto& l) -> auto& { return l.entropy(); }, &out);
  AppendMatrix(
      "budget", report, [](const auto& l) -> auto& { return l.budget(); }, &out);
  AppendMatrix(
      "selected", report, [](const auto& l) -> auto& { return l.selected(); }, &out);
  AppendKept(report, &out);
  out.push_back('}');
  return out;
}

// --- tables ---

// The lines that `generate` prints, as pairs of name and value.
std::string Summary(const v1::Finished& finished) {
  std::string out;
  const std::string lines = FormatReceipt(finished);
  for (const absl::string_view line : absl::StrSplit(lines, '\n', absl::SkipWhitespace())) {
    const absl::string_view text = absl::StripAsciiWhitespace(line);
    const size_t end = std::min(text.find("  "), text.size());
    // "kv cache" is two words: a name ends where its padding begins, or fills its ten columns.
    const size_t name = std::min(end, size_t{10});
    absl::StrAppend(
        &out, "<div><dt>",
        EscapeHtml(std::string(absl::StripAsciiWhitespace(text.substr(0, name)))), "</dt><dd>",
        EscapeHtml(std::string(absl::StripAsciiWhitespace(text.substr(name)))), "</dd></div>");
  }
  return out;
}

std::string FieldText(const google::protobuf::Message& message,
                      const google::protobuf::FieldDescriptor& field) {
  const google::protobuf::Reflection& get = *message.GetReflection();
  using Descriptor = google::protobuf::FieldDescriptor;
  switch (field.cpp_type()) {
    case Descriptor::CPPTYPE_BOOL:
      return get.GetBool(message, &field) ? "yes" : "no";
    case Descriptor::CPPTYPE_INT32:
      return absl::StrCat(get.GetInt32(message, &field));
    case Descriptor::CPPTYPE_INT64:
      return absl::StrCat(get.GetInt64(message, &field));
    case Descriptor::CPPTYPE_UINT64:
      return absl::StrCat(get.GetUInt64(message, &field));
    case Descriptor::CPPTYPE_FLOAT:
      return absl::StrCat(get.GetFloat(message, &field));
    case Descriptor::CPPTYPE_DOUBLE:
      return absl::StrCat(get.GetDouble(message, &field));
    case Descriptor::CPPTYPE_STRING:
      return get.GetString(message, &field);
    default:
      return "";
  }
}

// A row per plain field; optional ones that are absent are left out.
std::string Table(const char* title, const google::protobuf::Message& message) {
  std::string out = absl::StrCat("<div><h2>", title, "</h2><table>");
  const google::protobuf::Descriptor& type = *message.GetDescriptor();
  for (int i = 0; i < type.field_count(); ++i) {
    const google::protobuf::FieldDescriptor& field = *type.field(i);
    if (field.is_repeated() || field.message_type() != nullptr) continue;
    if (field.has_presence() && !message.GetReflection()->HasField(message, &field)) continue;
    absl::StrAppend(&out, "<tr><td>", EscapeHtml(field.name()), "</td><td>",
                    EscapeHtml(FieldText(message, field)), "</td></tr>");
  }
  return out + "</table></div>";
}

std::string Texts(const TraceReport& report) {
  std::string out;
  const auto add = [&out](const char* title, const std::string& text) {
    if (text.empty()) return;
    absl::StrAppend(&out, "<section><details><summary>", title, "</summary><pre>", EscapeHtml(text),
                    "</pre></details></section>");
  };
  add("Prompt", report.prompt);
  add("Answer", report.answer);
  return out;
}

// Adds a later event of the same layer.
void Continue(v1::LayerTrace more, v1::LayerTrace* layer) {
  if (more.continues_kept() && more.kept_size() > 0 && layer->kept_size() > 0) {
    layer->mutable_kept()->rbegin()->MergeFrom(more.kept(0));
    more.mutable_kept()->DeleteSubrange(0, 1);
  }
  layer->MergeFrom(more);
}

absl::Status CheckShape(const v1::LayerTrace& layer, const v1::LayerTrace& first) {
  const int64_t cells = int64_t{layer.kv_heads()} * layer.segments();
  const auto wrong = [&layer](const char* field) {
    return absl::InvalidArgumentError(
        absl::StrCat("trace of layer ", layer.layer(), ": ", field,
                     " does not fit the other fields; record the trace anew"));
  };
  if (layer.kv_heads() < 1 || layer.kv_heads() != first.kv_heads()) return wrong("kv_heads");
  if (layer.segments() < 0 || layer.segments() != first.segments()) return wrong("segments");
  if (layer.layers() != first.layers()) return wrong("layers");
  if (layer.segment_tokens() < 1) return wrong("segment_tokens");
  if (layer.block_tokens() < 1) return wrong("block_tokens");
  if (layer.entropy_size() != cells) return wrong("entropy");
  if (layer.budget_size() != cells) return wrong("budget");
  if (layer.selected_size() != cells) return wrong("selected");
  if (layer.kept_size() != 0 && layer.kept_size() != layer.kv_heads()) return wrong("kept");
  for (const v1::KeptPositions& kept : layer.kept()) {
    int32_t least = 0;  // the next position is at or after it
    for (const int32_t position : kept.positions()) {
      if (position < least || position == INT32_MAX) return wrong("kept");
      least = position + 1;
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status AddEvent(const v1::GenerateEvent& event, TraceReport* report) {
  switch (event.event_case()) {
    case v1::GenerateEvent::kTrace: {
      const v1::LayerTrace& layer = event.trace();
      std::vector<v1::LayerTrace>& layers = report->layers;
      if (!layers.empty() && layer.layer() == layers.back().layer()) {
        Continue(layer, &layers.back());
        break;
      }
      if (layer.layer() != static_cast<int64_t>(layers.size())) {
        return absl::InvalidArgumentError(
            absl::StrCat("trace of layer ", layer.layer(), ": expected layer ", layers.size(),
                         "; give the events of one request, in order"));
      }
      layers.push_back(layer);
      break;
    }
    case v1::GenerateEvent::kTokens:
      report->answer += event.tokens().text();
      break;
    case v1::GenerateEvent::kFinished:
      report->finished = event.finished();
      break;
    default:
      break;
  }
  return absl::OkStatus();
}

absl::Status CheckComplete(const TraceReport& report) {
  if (report.layers.empty()) return absl::OkStatus();
  const size_t layers = std::max(report.layers[0].layers(), 0);
  if (report.layers.size() != layers) {
    return absl::InvalidArgumentError(absl::StrCat("the trace has ", report.layers.size(), " of ",
                                                   layers, " layers; record the trace anew"));
  }
  for (const v1::LayerTrace& layer : report.layers) {
    RETURN_IF_ERROR(CheckShape(layer, report.layers[0]));
  }
  return absl::OkStatus();
}

std::vector<bool> RigidHeads(const TraceReport& report, int* judged) {
  const v1::Receipt& receipt = report.finished.receipt();
  const v1::PrefillPolicy& policy = receipt.policy().prefill();
  // Only the entropy rule knows rigid heads, and judges no prompt of fewer than two full segments.
  // The released code's rule counts a short last segment as well.
  const bool whole_prompt = policy.preset() == "entropy_paper";
  const bool judges = policy.preset() != "full" && policy.budget() == "entropy";
  *judged = 0;
  std::vector<bool> rigid;
  for (const v1::LayerTrace& layer : report.layers) {
    const int64_t full = receipt.prompt_tokens() / layer.segment_tokens();
    const int64_t segments =
        whole_prompt ? layer.segments() : std::min<int64_t>(layer.segments(), full);
    const bool judge = judges && segments >= 2 && layer.layer() >= policy.first_sparse_layer();
    for (int head = 0; head < layer.kv_heads(); ++head) {
      const float* h = layer.entropy().data() + int64_t{head} * layer.segments();
      // A prompt that is read densely as a whole has no entropies to judge by.
      const bool seen = judge && std::any_of(h + 1, h + segments,
                                             [](float entropy) { return !std::isnan(entropy); });
      rigid.push_back(seen && std::none_of(h + 1, h + segments, [&policy](float entropy) {
                        return entropy >= policy.e_t();
                      }));
      *judged += seen;
    }
  }
  return rigid;
}

std::string TracePage(const TraceReport& report) {
  const v1::Receipt& receipt = report.finished.receipt();
  const std::string title =
      EscapeHtml(absl::StrCat("What ", receipt.policy().prefill().preset(), " read and ",
                              receipt.policy().kv().preset(), " kept"));
  const std::string tables =
      absl::StrCat(Table("Receipt", receipt), Table("Prefill policy", receipt.policy().prefill()),
                   Table("KV policy", receipt.policy().kv()));
  // One pass over the page: a {{NAME}} inside what is put in stays what it is.
  return absl::StrReplaceAll(kTracePageHtml, {{"{{TITLE}}", title},
                                              {"{{SUMMARY}}", Summary(report.finished)},
                                              {"{{TABLES}}", tables},
                                              {"{{TEXT}}", Texts(report)},
                                              {"{{DATA}}", Data(report)},
                                              {"{{SCRIPT}}", kTracePageScript}});
}

}  // namespace entropyserve
