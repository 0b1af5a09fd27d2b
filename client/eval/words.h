// Words, names and sentences that generated tasks are made of.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "client/eval/random.h"

namespace entropyserve {

std::span<const char* const> Adjectives();
std::span<const char* const> Nouns();

std::string RandomKey(SplitMix64* random);                             // "amber-anchor"
std::string RandomNumber(SplitMix64* random, int digits);              // no leading zero
std::string RandomUuid(SplitMix64* random);                            // version 4
std::string RandomLetters(SplitMix64* random, char first, int count);  // of 26 from `first` on
// A made-up proper name, "Velkamirath": of 375 000, so that few repeat.
std::string RandomName(SplitMix64* random);

// Text to hide things in: generated sentences, or a file's in their order, from a place that
// depends on the prompt, and again from the start after its end.
class Haystack {
 public:
  // Sentences that are made up.
  Haystack() = default;
  // `text`'s own. Without words in it sentences are generated.
  Haystack(std::string name, const std::string& text);

  // For tables and records: the file's name and a hash of its text, or "generated".
  const std::string& name() const { return name_; }
  // The first `count` sentences of prompt `index`; more of them begin with the same ones.
  std::vector<std::string> Sentences(uint64_t seed, int index, int64_t count) const;

 private:
  std::string name_ = "generated";
  std::vector<std::string> sentences_;
};

}  // namespace entropyserve
