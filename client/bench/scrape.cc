#include "client/bench/scrape.h"

#include <curl/curl.h>

#include <cmath>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "engine/base/flag_set.h"

namespace entropyserve {
namespace {

constexpr long kTimeoutSeconds = 10;
constexpr size_t kMaxBytes = size_t{64} << 20;  // of a page; ours has some tens of kilobytes

size_t Append(char* data, size_t size, size_t count, void* target) {
  auto* text = static_cast<std::string*>(target);
  if (text->size() + size * count > kMaxBytes) return 0;
  text->append(data, size * count);
  return size * count;
}

}  // namespace

std::map<std::string, double> ParseCounters(std::string_view exposition) {
  std::set<std::string> names;  // samples that only grow
  std::map<std::string, double> counters;
  for (const auto line :
       absl::StrSplit(absl::string_view(exposition.data(), exposition.size()), '\n')) {
    if (absl::StartsWith(line, "# TYPE ")) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      if (words.size() != 4) continue;
      if (words[3] == "counter") names.insert(words[2]);
      if (words[3] == "histogram" || words[3] == "summary") {
        names.insert(words[2] + "_sum");
        names.insert(words[2] + "_count");
      }
      continue;
    }
    const size_t space = line.rfind(' ');
    if (space == absl::string_view::npos || absl::StartsWith(line, "#")) continue;
    const std::string sample(line.substr(0, space));
    if (!names.contains(sample.substr(0, sample.find('{')))) continue;
    const auto value = ParseNumber(std::string(line.substr(space + 1)));
    if (value.ok() && std::isfinite(*value)) counters[sample] = *value;
  }
  return counters;
}

std::map<std::string, double> Growth(const std::map<std::string, double>& before,
                                     const std::map<std::string, double>& after) {
  std::map<std::string, double> growth;
  for (const auto& [name, value] : after) {
    const auto found = before.find(name);
    const double base = found == before.end() || found->second > value ? 0 : found->second;
    if (value != base) growth[name] = value - base;
  }
  return growth;
}

absl::StatusOr<std::string> FetchUrl(const std::string& url) {
  const std::unique_ptr<CURL, decltype(&curl_easy_cleanup)> curl(curl_easy_init(),
                                                                 &curl_easy_cleanup);
  if (curl == nullptr) return absl::UnavailableError("libcurl does not start");
  std::string text;
  curl_easy_setopt(curl.get(), CURLOPT_URL, url.c_str());
  curl_easy_setopt(curl.get(), CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(curl.get(), CURLOPT_PROXY, "");  // the measured server's own port is near
  curl_easy_setopt(curl.get(), CURLOPT_TIMEOUT, kTimeoutSeconds);
  curl_easy_setopt(curl.get(), CURLOPT_FAILONERROR, 1L);
  curl_easy_setopt(curl.get(), CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(curl.get(), CURLOPT_WRITEFUNCTION, &Append);
  curl_easy_setopt(curl.get(), CURLOPT_WRITEDATA, &text);
  const CURLcode code = curl_easy_perform(curl.get());
  if (code != CURLE_OK) {
    return absl::UnavailableError(absl::StrCat(url, ": ", curl_easy_strerror(code)));
  }
  return text;
}

}  // namespace entropyserve
