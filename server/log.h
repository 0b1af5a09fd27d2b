// Structured log lines on stderr: an event and its fields, as key=value or as JSON. Prompts,
// answers and keys are never fields.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>

namespace spdlog {
class logger;
}

namespace entropyserve {

struct LogField {
  LogField(std::string_view k, std::string_view v) : key(k), value(v), is_text(true) {}
  LogField(std::string_view k, const char* v) : LogField(k, std::string_view(v)) {}
  LogField(std::string_view k, const std::string& v) : LogField(k, std::string_view(v)) {}
  LogField(std::string_view k, bool v) : key(k), value(v ? "true" : "false") {}
  LogField(std::string_view k, int v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, int64_t v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, uint64_t v) : key(k), value(std::to_string(v)) {}
  LogField(std::string_view k, double v);

  std::string_view key;
  std::string value;
  bool is_text = false;
};

// Thread-safe.
class Log {
 public:
  enum class Level { kDebug, kInfo, kWarning, kError };
  using Fields = std::initializer_list<LogField>;

  // `level`: "debug", "info", "warning", "error"; `json`: objects instead of key=value.
  Log(std::string_view level, bool json);
  ~Log();

  void Debug(std::string_view event, Fields fields = {}) { Write(Level::kDebug, event, fields); }
  void Info(std::string_view event, Fields fields = {}) { Write(Level::kInfo, event, fields); }
  void Warning(std::string_view event, Fields fields = {}) {
    Write(Level::kWarning, event, fields);
  }
  void Error(std::string_view event, Fields fields = {}) { Write(Level::kError, event, fields); }

 private:
  void Write(Level level, std::string_view event, Fields fields);

  const bool json_;
  std::unique_ptr<spdlog::logger> logger_;
};

}  // namespace entropyserve
