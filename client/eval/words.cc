#include "client/eval/words.h"

#include <cctype>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace entropyserve {
namespace {

constexpr const char* kAdjectives[] = {
    "amber",   "ancient", "arctic", "bitter",  "blue",     "bold",     "brave",   "brief",
    "bright",  "broad",   "bronze", "calm",    "careful",  "cheerful", "clean",   "clear",
    "clever",  "cold",    "common", "cosmic",  "crimson",  "crisp",    "curious", "damp",
    "dapper",  "dark",    "deep",   "distant", "double",   "dusty",    "eager",   "early",
    "eastern", "elegant", "faint",  "famous",  "fancy",    "fearless", "fierce",  "fine",
    "firm",    "foggy",   "formal", "fresh",   "frosty",   "gentle",   "giant",   "glad",
    "golden",  "grand",   "gray",   "green",   "handy",    "happy",    "harsh",   "heavy",
    "hidden",  "hollow",  "honest", "humble",  "idle",     "inner",    "ivory",   "jolly",
    "keen",    "kind",    "large",  "late",    "lazy",     "light",    "little",  "lively",
    "lonely",  "loud",    "lucky",  "lunar",   "mellow",   "mighty",   "mild",    "modern",
    "modest",  "narrow",  "neat",   "nimble",  "noble",    "northern", "odd",     "orange",
    "patient", "plain",   "polite", "proud",   "purple",   "quick",    "quiet",   "rapid",
    "rare",    "rough",   "round",  "royal",   "rustic",   "rusty",    "scarlet", "secret",
    "sharp",   "shiny",   "silent", "silver",  "simple",   "sleepy",   "slow",    "small",
    "smooth",  "snowy",   "solar",  "solid",   "southern", "steady",   "stern",   "still",
    "stormy",  "strange", "sturdy", "subtle",  "sunny",    "swift",    "tall",    "tender",
    "thin",    "tidy",    "tiny",   "tough",   "tranquil", "vivid",    "warm",    "wandering",
    "western", "white",   "wide",   "wild",    "wise",     "wooden",   "yellow",  "young"};

constexpr const char* kNouns[] = {
    "acorn",    "anchor",  "apple",    "archive",  "arrow",     "badge",    "baker",    "bakery",
    "balcony",  "bamboo",  "banner",   "barrel",   "basket",    "beacon",   "beaver",   "bell",
    "bench",    "bicycle", "blanket",  "blossom",  "boat",      "bottle",   "boulder",  "branch",
    "bridge",   "brook",   "bucket",   "butter",   "button",    "cabin",    "cabinet",  "camel",
    "canal",    "candle",  "canoe",    "canvas",   "captain",   "carpet",   "castle",   "cavern",
    "cellar",   "chapel",  "cherry",   "chimney",  "circus",    "clock",    "cloud",    "clover",
    "coach",    "cobbler", "comet",    "compass",  "copper",    "coral",    "cottage",  "cotton",
    "cradle",   "crystal", "cupboard", "curtain",  "dancer",    "desert",   "diary",    "dragon",
    "drawer",   "drum",    "eagle",    "engine",   "envelope",  "falcon",   "farmer",   "feather",
    "fence",    "ferry",   "fiddle",   "field",    "flute",     "forest",   "fountain", "fox",
    "garden",   "garlic",  "gate",     "ginger",   "glacier",   "globe",    "goose",    "granary",
    "guitar",   "hammer",  "hammock",  "harbor",   "harp",      "hedge",    "helmet",   "heron",
    "hill",     "honey",   "horizon",  "hunter",   "island",    "jacket",   "jewel",    "journal",
    "kettle",   "kitchen", "kite",     "ladder",   "lagoon",    "lantern",  "lemon",    "letter",
    "library",  "lily",    "lizard",   "lobster",  "magnet",    "mango",    "maple",    "marble",
    "market",   "meadow",  "melon",    "mill",     "mirror",    "monk",     "mountain", "museum",
    "napkin",   "needle",  "nest",     "oasis",    "ocean",     "olive",    "orchard",  "otter",
    "oyster",   "paddle",  "palace",   "paper",    "parcel",    "parrot",   "pebble",   "pepper",
    "piano",    "pigeon",  "pillow",   "pilot",    "planet",    "plaza",    "pocket",   "pond",
    "poplar",   "porch",   "prairie",  "puzzle",   "quarry",    "quilt",    "rabbit",   "raft",
    "ribbon",   "river",   "robin",    "rocket",   "saddle",    "sailor",   "salmon",   "sandal",
    "scarf",    "school",  "shadow",   "shelf",    "shepherd",  "shovel",   "signal",   "sparrow",
    "spider",   "spoon",   "squirrel", "stable",   "staircase", "station",  "statue",   "stone",
    "stove",    "stream",  "summit",   "swallow",  "table",     "tailor",   "teapot",   "temple",
    "thimble",  "thunder", "ticket",   "timber",   "tower",     "trumpet",  "tunnel",   "turtle",
    "umbrella", "valley",  "vault",    "velvet",   "village",   "vineyard", "violin",   "voyage",
    "wagon",    "walnut",  "weaver",   "whale",    "wharf",     "wheel",    "willow",   "window",
    "winter",   "wizard",  "wolf",     "workshop", "yard",      "zebra"};

constexpr const char* kVerbs[] = {"watched",  "followed", "painted",  "carried", "remembered",
                                  "repaired", "crossed",  "borrowed", "praised", "described",
                                  "measured", "visited",  "guarded",  "ignored", "discovered"};
constexpr const char* kPlaces[] = {"behind",  "near",   "above",  "below",      "inside",
                                   "outside", "beside", "beyond", "across from"};
constexpr const char* kTimes[] = {
    "before breakfast",      "during the long rain",     "on the first evening",
    "without saying a word", "as the season turned",     "while the others slept",
    "for the second time",   "until the light was gone", "to everyone's surprise"};
constexpr const char* kStarts[] = {"Al",  "Bren", "Cal", "Dor", "El",  "Far", "Gal", "Hal",  "Is",
                                   "Jor", "Kel",  "Lor", "Mar", "Nor", "Or",  "Pel", "Quil", "Ros",
                                   "Sel", "Tor",  "Ul",  "Vel", "Wen", "Yar", "Zan"};
constexpr const char* kMiddles[] = {"a",  "ba", "den", "do", "e",  "fi", "gra", "ha", "i",
                                    "ka", "la", "lo",  "mi", "mo", "na", "ni",  "po", "ra",
                                    "ri", "ro", "sa",  "ti", "to", "va", "vi"};
constexpr const char* kEnds[] = {"bek",  "burg", "dan",  "dell", "dor",  "fax", "gard", "gorn",
                                 "heim", "kor",  "lin",  "mar",  "mere", "nok", "rath", "ric",
                                 "sen",  "stad", "thal", "ton",  "var",  "vik", "wick", "zen"};

template <size_t kCount>
const char* Pick(SplitMix64* random, const char* const (&list)[kCount]) {
  return list[random->Below(kCount)];
}

std::string GeneratedSentence(SplitMix64* random) {
  // Two statements, because arguments of one call would be drawn in no particular order.
  std::string out = absl::StrCat("The ", Pick(random, kAdjectives));
  absl::StrAppend(&out, " ", Pick(random, kNouns));
  absl::StrAppend(&out, " ", Pick(random, kVerbs));
  absl::StrAppend(&out, " the ", Pick(random, kNouns));
  absl::StrAppend(&out, " ", Pick(random, kPlaces));
  absl::StrAppend(&out, " the ", Pick(random, kAdjectives));
  absl::StrAppend(&out, " ", Pick(random, kNouns));
  absl::StrAppend(&out, " ", Pick(random, kTimes), ".");
  return out;
}

bool EndsSentence(char c) { return c == '.' || c == '!' || c == '?'; }

// Longer ones are cut between words: lists and tables have no full stops.
constexpr size_t kLongestSentence = 400;  // bytes

std::vector<std::string> SplitSentences(const std::string& text) {
  std::vector<std::string> sentences;
  std::string sentence;
  bool space = false;
  for (const char c : text) {
    if (std::isspace(static_cast<unsigned char>(c)) != 0) {
      if (sentence.empty()) continue;
      space = true;
      if (!EndsSentence(sentence.back()) && sentence.size() < kLongestSentence) continue;
      sentences.push_back(std::exchange(sentence, ""));
      space = false;
      continue;
    }
    if (std::exchange(space, false)) sentence.push_back(' ');
    sentence.push_back(c);
  }
  if (!sentence.empty()) sentences.push_back(sentence);
  return sentences;
}

}  // namespace

std::span<const char* const> Adjectives() { return kAdjectives; }
std::span<const char* const> Nouns() { return kNouns; }

std::string RandomKey(SplitMix64* random) {
  const char* adjective = Pick(random, kAdjectives);
  return absl::StrCat(adjective, "-", Pick(random, kNouns));
}

std::string RandomNumber(SplitMix64* random, int digits) {
  std::string out(1, static_cast<char>('1' + random->Below(9)));
  while (static_cast<int>(out.size()) < digits) {
    out.push_back(static_cast<char>('0' + random->Below(10)));
  }
  return out;
}

std::string RandomUuid(SplitMix64* random) {
  const uint64_t high = random->Next(), low = random->Next();
  return absl::StrFormat("%08x-%04x-4%03x-%04x-%012x", high >> 32, high >> 16 & 0xffff,
                         high & 0xfff, (low >> 48 & 0x3fff) | 0x8000, low & 0xffffffffffff);
}

std::string RandomLetters(SplitMix64* random, char first, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out.push_back(static_cast<char>(first + random->Below(26)));
  return out;
}

std::string RandomName(SplitMix64* random) {
  std::string out = Pick(random, kStarts);
  absl::StrAppend(&out, Pick(random, kMiddles));
  absl::StrAppend(&out, Pick(random, kMiddles));
  absl::StrAppend(&out, Pick(random, kEnds));
  return out;
}

Haystack::Haystack(std::string name, const std::string& text) : sentences_(SplitSentences(text)) {
  if (!sentences_.empty()) name_ = absl::StrFormat("%s %016x", name, HashBytes(text));
}

std::vector<std::string> Haystack::Sentences(uint64_t seed, int index, int64_t count) const {
  SplitMix64 random = Stream(seed, "haystack", static_cast<uint64_t>(index));
  std::vector<std::string> out;
  out.reserve(static_cast<size_t>(count));
  const size_t size = sentences_.size();
  size_t at = size == 0 ? 0 : random.Below(size);
  for (int64_t i = 0; i < count; ++i) {
    if (size == 0) {
      out.push_back(GeneratedSentence(&random));
    } else {
      out.push_back(sentences_[at]);
      at = (at + 1) % size;
    }
  }
  return out;
}

}  // namespace entropyserve
