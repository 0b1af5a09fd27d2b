// The trace page's markup and script, from trace_page.html and trace_page.js.
#pragma once

namespace entropyserve {

extern const char kTracePageHtml[];  // with {{NAME}} where trace_page.cc puts its parts
extern const char kTracePageScript[];

}  // namespace entropyserve
