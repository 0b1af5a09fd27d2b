// What a person sees: a progress bar while the prompt is read, the answer, the receipt.
#pragma once

#include <chrono>
#include <string>

#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

// One line on stderr, redrawn in place.
class ProgressBar {
 public:
  explicit ProgressBar(bool enabled) : enabled_(enabled) {}
  void Update(const v1::Progress& progress);
  // Wipes the line; safe to call at any time, also twice.
  void Clear();

 private:
  const bool enabled_;
  bool drawn_ = false;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// "[#####-----]  50 %  3756 of 7512 tokens, 820 tokens/s, 4.6 s left".
std::string FormatProgress(int64_t done, int64_t total, double seconds);

// Several lines, each "name  value", ending with a newline.
std::string FormatReceipt(const v1::Finished& finished);

// "1.5 MiB", "2.8 TFLOP".
std::string FormatBytes(double bytes);
std::string FormatFlops(double flops);

// One line of JSON, fields named as in the contract, absent fields left out.
std::string ToJson(const google::protobuf::Message& message);

// Control characters that could drive the terminal are left out; newlines and tabs stay.
std::string Printable(const std::string& text);

}  // namespace entropyserve
