// The bench page's markup and script, from page.html and page.js.
#pragma once

namespace entropyserve {

extern const char kBenchPageHtml[];  // with {{NAME}} where page.cc puts its parts
extern const char kBenchPageScript[];

}  // namespace entropyserve
