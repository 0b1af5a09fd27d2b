#include "server/log.h"

#include <spdlog/logger.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <cmath>
#include <cstdio>

namespace entropyserve {
namespace {

spdlog::level::level_enum ToSpdlog(Log::Level level) {
  switch (level) {
    case Log::Level::kDebug:
      return spdlog::level::debug;
    case Log::Level::kInfo:
      return spdlog::level::info;
    case Log::Level::kWarning:
      return spdlog::level::warn;
    case Log::Level::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

// A JSON string with its quotes. Bytes that are not ASCII pass: values are UTF-8 or come from the
// system.
std::string Quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out += '"';
}

bool NeedsQuotes(std::string_view text) {
  for (const char c : text) {
    if (static_cast<unsigned char>(c) <= 0x20 || c == '"' || c == '=' || c == '\\') return true;
  }
  return false;
}

}  // namespace

LogField::LogField(std::string_view k, double v) : key(k) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", std::isfinite(v) ? v : -1.0);
  value = text;
}

Log::Log(std::string_view level, bool json) : json_(json) {
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  logger_ = std::make_unique<spdlog::logger>("entropyserve", std::move(sink));
  logger_->set_level(level == "debug"     ? spdlog::level::debug
                     : level == "warning" ? spdlog::level::warn
                     : level == "error"   ? spdlog::level::err
                                          : spdlog::level::info);
  logger_->set_formatter(std::make_unique<spdlog::pattern_formatter>(
      json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l",%v})" : "%Y-%m-%dT%H:%M:%S.%eZ %l %v",
      spdlog::pattern_time_type::utc));
}

Log::~Log() = default;

void Log::Write(Level level, std::string_view event, Fields fields) {
  const spdlog::level::level_enum spdlog_level = ToSpdlog(level);
  if (!logger_->should_log(spdlog_level)) return;
  std::string line;
  if (json_) {
    line = "\"event\":" + Quoted(event);
    for (const LogField& field : fields) {
      if (field.is_text && field.value.empty()) continue;
      line += ',' + Quoted(field.key) + ':' + (field.is_text ? Quoted(field.value) : field.value);
    }
  } else {
    line = event;
    for (const LogField& field : fields) {
      if (field.is_text && field.value.empty()) continue;
      line += ' ';
      line += field.key;
      line += '=';
      line += NeedsQuotes(field.value) ? Quoted(field.value) : field.value;
    }
  }
  logger_->log(spdlog_level, spdlog::string_view_t(line.data(), line.size()));
  logger_->flush();
}

}  // namespace entropyserve
