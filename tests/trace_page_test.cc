// The page of `inspect`: every datum is in it, nothing of it is read as markup, odd traces are
// refused or drawn.
#include "client/trace_page.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "nlohmann/json.hpp"

namespace entropyserve {
namespace {

using nlohmann::json;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kLayers = 3, kKvHeads = 2, kSegments = 4, kSegmentTokens = 128, kBlockTokens = 8;

// Head 1 of layer 1 is rigid; the last segment is short and dense, layer 0 and segment 0 dense.
v1::LayerTrace Layer(int layer) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  v1::LayerTrace trace;
  trace.set_layer(layer);
  trace.set_layers(kLayers);
  trace.set_kv_heads(kKvHeads);
  trace.set_segments(kSegments);
  trace.set_segment_tokens(kSegmentTokens);
  trace.set_block_tokens(kBlockTokens);
  for (int head = 0; head < kKvHeads; ++head) {
    const bool rigid = layer == 1 && head == 1;
    for (int s = 0; s < kSegments; ++s) {
      const bool ends = s == 0 || s + 1 == kSegments;
      const float entropy = 0.25f * static_cast<float>(100 * layer + 10 * head + s);
      trace.add_entropy(ends ? nan : rigid ? 1e-7f : entropy);
      trace.add_budget(1000.5f + static_cast<float>(100 * layer + 10 * head + s));
      trace.add_selected(layer == 0 || ends ? -1 : 100 * layer + 10 * head + s);
    }
  }
  return trace;
}

TraceReport Report() {
  TraceReport report;
  for (int layer = 0; layer < kLayers; ++layer) {
    v1::GenerateEvent event;
    *event.mutable_trace() = Layer(layer);
    EXPECT_TRUE(AddEvent(event, &report).ok());
  }
  v1::GenerateEvent event;
  v1::Receipt& receipt = *event.mutable_finished()->mutable_receipt();
  receipt.set_prompt_tokens(kSegments * kSegmentTokens - 28);
  receipt.set_seed(1234567890123456789);
  v1::PrefillPolicy& prefill = *receipt.mutable_policy()->mutable_prefill();
  prefill.set_preset("entropy");
  prefill.set_budget("entropy");
  prefill.set_e_t(1e-5f);
  prefill.set_first_sparse_layer(1);
  v1::KvPolicy& kv = *receipt.mutable_policy()->mutable_kv();
  kv.set_preset("latent");
  kv.set_keep_sinks(true);
  kv.set_window_tokens(32);
  EXPECT_TRUE(AddEvent(event, &report).ok());
  return report;
}

// What the page's script reads.
json Data(const std::string& page) {
  const std::string open = "<script type=\"application/json\" id=\"trace\">";
  const size_t begin = page.find(open) + open.size();
  return json::parse(page.substr(begin, page.find("</script>", begin) - begin));
}

size_t Count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(TracePageTest, HoldsEveryCell) {
  const TraceReport report = Report();
  const json data = Data(TracePage(report));
  EXPECT_EQ(data["layers"], kLayers);
  EXPECT_EQ(data["kvHeads"], kKvHeads);
  EXPECT_EQ(data["segments"], kSegments);
  EXPECT_EQ(data["segmentTokens"], kSegmentTokens);
  EXPECT_EQ(data["blockTokens"], kBlockTokens);
  ASSERT_EQ(data["entropy"].size(), kLayers * kKvHeads * kSegments);
  size_t i = 0;
  for (const v1::LayerTrace& layer : report.layers) {
    for (int cell = 0; cell < kKvHeads * kSegments; ++cell, ++i) {
      SCOPED_TRACE(i);
      if (std::isnan(layer.entropy(cell))) {
        EXPECT_TRUE(data["entropy"][i].is_null());
      } else {
        EXPECT_FLOAT_EQ(data["entropy"][i], layer.entropy(cell));
      }
      EXPECT_FLOAT_EQ(data["budget"][i], layer.budget(cell));
      EXPECT_EQ(data["selected"][i], layer.selected(cell));
    }
  }
  EXPECT_EQ(data["sinks"], 4);
  EXPECT_EQ(data["windowTokens"], 32);
}

TEST(TracePageTest, InfinitiesAreNoNumbersEither) {
  TraceReport report = Report();
  report.layers[2].set_entropy(1, std::numeric_limits<float>::infinity());
  const json data = Data(TracePage(report));
  EXPECT_TRUE(data["entropy"][2 * kKvHeads * kSegments + 1].is_null());
}

TEST(TracePageTest, HoldsEveryKeptPosition) {
  TraceReport report = Report();
  EXPECT_TRUE(Data(TracePage(report))["kept"].is_null());
  const std::vector<int32_t> positions = {0, 1, 2, 3, 7, 100, 101, 499};
  for (v1::LayerTrace& layer : report.layers) {
    for (int head = 0; head < kKvHeads; ++head) layer.add_kept();
  }
  report.layers[1].mutable_kept(1)->mutable_positions()->Add(positions.begin(), positions.end());
  const json kept = Data(TracePage(report))["kept"];
  ASSERT_EQ(kept.size(), kLayers * kKvHeads);
  EXPECT_TRUE(kept[0].empty());
  std::vector<int32_t> read;
  int32_t at = 0;
  for (size_t i = 0; i < kept[3].size(); i += 2) {  // tokens skipped, tokens kept
    at += kept[3][i].get<int32_t>();
    for (int32_t end = at + kept[3][i + 1].get<int32_t>(); at < end; ++at) read.push_back(at);
  }
  EXPECT_EQ(read, positions);
}

TEST(TracePageTest, MarksRigidHeadsAsTheReceiptCountsThem) {
  TraceReport report = Report();
  int judged = 0;
  EXPECT_THAT(RigidHeads(report, &judged), ElementsAre(false, false, false, true, false, false));
  EXPECT_EQ(judged, 4);  // of the sparse layers
  v1::Receipt& receipt = *report.finished.mutable_receipt();
  // The short last segment does not judge, a full one does.
  report.layers[1].set_entropy(kSegments + 3, 1);
  EXPECT_TRUE(RigidHeads(report, &judged)[3]);
  receipt.set_prompt_tokens(kSegments * kSegmentTokens);
  EXPECT_FALSE(RigidHeads(report, &judged)[3]);
  receipt.set_prompt_tokens(2 * kSegmentTokens - 1);  // one full segment
  RigidHeads(report, &judged);
  EXPECT_EQ(judged, 0);
  receipt.set_prompt_tokens(kSegments * kSegmentTokens);
  RigidHeads(report, &judged);
  EXPECT_EQ(judged, 4);
  for (v1::LayerTrace& layer : report.layers) {  // a prompt within the dense prefix
    for (float& entropy : *layer.mutable_entropy()) entropy = std::nanf("");
  }
  EXPECT_THAT(RigidHeads(report, &judged), Each(false));
  EXPECT_EQ(judged, 0);
  report = Report();
  report.finished.mutable_receipt()->mutable_policy()->mutable_prefill()->set_budget("fixed");
  RigidHeads(report, &judged);
  EXPECT_EQ(judged, 0);
}

TEST(TracePageTest, EscapesWhateverItIsGiven) {
  TraceReport report = Report();
  const std::string hostile = "</script><script>alert(1)</script><b>&'\" {{DATA}}";
  report.prompt = "prompt " + hostile;
  report.answer = "answer " + hostile + std::string("\0", 1);
  v1::Policy& policy = *report.finished.mutable_receipt()->mutable_policy();
  policy.mutable_prefill()->set_preset("prefill " + hostile);
  policy.mutable_kv()->set_pooling("kv " + hostile);
  const std::string page = TracePage(report);
  EXPECT_THAT(page, Not(HasSubstr("alert(1)</script>")));
  EXPECT_THAT(page, Not(HasSubstr("<b>")));
  EXPECT_EQ(page.find('\0'), std::string::npos);
  for (const char* where : {"prompt ", "answer ", "prefill ", "kv "}) {
    EXPECT_THAT(page, HasSubstr(std::string(where) +
                                "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;"
                                "&amp;&#39;&quot; {{DATA}}"));
  }
  EXPECT_EQ(Count(page, "</script>"), 2u);  // the data's and the program's
}

TEST(TracePageTest, LoadsNothing) {
  const std::string page = TracePage(Report());
  EXPECT_THAT(page, HasSubstr("default-src 'none'"));
  for (const char* part : {"http:", "https:", "src=", "@import", "url(", "fetch(", "{{TITLE}}"}) {
    EXPECT_THAT(page, Not(HasSubstr(part)));
  }
}

TEST(TracePageTest, ShowsReceiptAndPolicyAndNoTextUnasked) {
  const std::string page = TracePage(Report());
  EXPECT_THAT(page, HasSubstr("<td>seed</td><td>1234567890123456789</td>"));
  EXPECT_THAT(page, HasSubstr("<td>first_sparse_layer</td><td>1</td>"));
  EXPECT_THAT(page, HasSubstr("<td>keep_sinks</td><td>yes</td>"));
  EXPECT_THAT(page, HasSubstr("<dt>tokens</dt><dd>484 prompt, 0 cached, 0 generated</dd>"));
  EXPECT_THAT(page, HasSubstr("<dt>kv cache</dt>"));
  EXPECT_THAT(page, Not(HasSubstr("<summary>")));
}

TEST(TracePageTest, DrawsARequestWithoutATrace) {
  const TraceReport report;
  EXPECT_TRUE(CheckComplete(report).ok());
  const json data = Data(TracePage(report));
  EXPECT_EQ(data["layers"], 0);
  EXPECT_TRUE(data["entropy"].empty());
  EXPECT_TRUE(data["kept"].is_null());
}

TEST(TracePageTest, PartsOfALayerAreItsWhole) {
  TraceReport whole = Report(), parts;
  for (int layer = 0; layer < kLayers; ++layer) {
    v1::LayerTrace& all = whole.layers[layer];
    for (int head = 0; head < kKvHeads; ++head) {
      v1::KeptPositions* const kept = all.add_kept();
      for (int i = 0; i < 3; ++i) kept->add_positions(10 * head + i);
    }
  }
  const auto add = [&parts](const v1::LayerTrace& part) {
    v1::GenerateEvent event;
    *event.mutable_trace() = part;
    EXPECT_TRUE(AddEvent(event, &parts).ok());
  };
  for (const v1::LayerTrace& all : whole.layers) {
    // Cells are cut after 3, the first head's positions after 2.
    v1::LayerTrace none = all;
    none.clear_entropy();
    none.clear_budget();
    none.clear_selected();
    none.clear_kept();
    std::array<v1::LayerTrace, 3> part = {none, none, none};
    for (int cell = 0; cell < all.entropy_size(); ++cell) {
      part[cell >= 3].add_entropy(all.entropy(cell));
      part[cell >= 3].add_budget(all.budget(cell));
      part[cell >= 3].add_selected(all.selected(cell));
    }
    *part[1].add_kept() = all.kept(0);
    part[1].mutable_kept(0)->mutable_positions()->RemoveLast();
    part[2].set_continues_kept(true);
    part[2].add_kept()->add_positions(all.kept(0).positions(2));
    *part[2].add_kept() = all.kept(1);
    for (const v1::LayerTrace& one : part) add(one);
  }
  parts.finished = whole.finished;
  ASSERT_TRUE(CheckComplete(parts).ok()) << CheckComplete(parts);
  EXPECT_EQ(TracePage(parts), TracePage(whole));
}

TEST(TracePageTest, RefusesWhatIsNoTrace) {
  const auto add = [](const v1::LayerTrace& layer) {
    TraceReport report;
    v1::GenerateEvent event;
    *event.mutable_trace() = Layer(0);
    EXPECT_TRUE(AddEvent(event, &report).ok());
    *event.mutable_trace() = layer;
    if (const absl::Status added = AddEvent(event, &report); !added.ok()) {
      return std::string(added.message());
    }
    *event.mutable_trace() = Layer(2);
    EXPECT_EQ(AddEvent(event, &report).ok(), layer.layer() == 1);
    return std::string(CheckComplete(report).message());
  };
  EXPECT_EQ(add(Layer(1)), "");
  EXPECT_THAT(add(Layer(0)), HasSubstr("1 of 3 layers"));
  EXPECT_THAT(add(Layer(2)), HasSubstr("expected layer 1"));
  v1::LayerTrace layer = Layer(1);
  layer.mutable_entropy()->RemoveLast();
  EXPECT_THAT(add(layer), HasSubstr("entropy does not fit"));
  layer = Layer(1);
  layer.add_selected(1);
  EXPECT_THAT(add(layer), HasSubstr("selected does not fit"));
  layer = Layer(1);
  layer.set_kv_heads(std::numeric_limits<int32_t>::max());
  EXPECT_THAT(add(layer), HasSubstr("kv_heads does not fit"));
  layer = Layer(1);
  layer.set_block_tokens(0);
  EXPECT_THAT(add(layer), HasSubstr("block_tokens does not fit"));
  layer = Layer(1);
  layer.add_kept();
  EXPECT_THAT(add(layer), HasSubstr("kept does not fit"));
  layer.add_kept()->add_positions(5);
  layer.mutable_kept(1)->add_positions(5);
  EXPECT_THAT(add(layer), HasSubstr("kept does not fit"));
  TraceReport report = Report();
  EXPECT_TRUE(CheckComplete(report).ok());
  report.layers.pop_back();
  EXPECT_THAT(std::string(CheckComplete(report).message()), HasSubstr("2 of 3 layers"));
}

}  // namespace
}  // namespace entropyserve
