// Command line flags: a table of names, defaults and one-line explanations. Values come from the
// command line, the environment and a file, in this order of precedence.
//
// Not absl/flags: that one is global, reads no environment, prints a paragraph per flag, and exits
// the process on a wrong value from inside the library. Programs here have subcommands with tables
// of their own.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace entropyserve {

// Sets a value from its text; the status's message says what is expected, without the flag's name.
using FlagSetter = std::function<absl::Status(std::string_view)>;

class FlagSet {
 public:
  // `usage`: the first lines of --help. `env_prefix`: "ENTROPYSERVE_"; empty: no environment, no
  // file.
  FlagSet(std::string usage, std::string env_prefix)
      : usage_(std::move(usage)), env_prefix_(std::move(env_prefix)) {}

  // Starts a titled group in --help.
  void Section(std::string title);

  // Targets outlive the set; what they hold when added is the default that --help shows.
  void Add(std::string name, std::string* target, std::string help);
  void Add(std::string name, bool* target, std::string help);  // --name, --name=false
  void Add(std::string name, int* target, std::string help);
  void Add(std::string name, int64_t* target, std::string help);
  void Add(std::string name, double* target, std::string help);
  // Absent until given.
  void Add(std::string name, std::optional<bool>* target, std::string help);
  void Add(std::string name, std::optional<int64_t>* target, std::string help);
  void Add(std::string name, std::optional<double>* target, std::string help);
  void Add(std::string name, std::optional<std::string>* target, std::string help);
  // May be given several times; values are appended.
  void Add(std::string name, std::vector<std::string>* target, std::string help);
  // Bytes: "8G", "512M", "64K" (powers of 1024) or a plain number.
  void AddBytes(std::string name, int64_t* target, std::string help);
  // One of `choices`.
  void AddChoice(std::string name, std::string* target, std::vector<std::string> choices,
                 std::string help);
  // --name, --name=false, for what is no bool. `shown_default` is for --help.
  void AddSwitch(std::string name, std::string shown_default, std::string help,
                 std::function<void(bool)> set);
  // Anything else.
  void AddCustom(std::string name, std::string shown_default, std::string help, FlagSetter setter);

  // Parses arguments after the program's (or subcommand's) name. With an env_prefix, first the file
  // named by --config or <PREFIX>CONFIG, then the environment, then `args`. A lone "--" ends the
  // flags. Returns the positional arguments. INVALID_ARGUMENT: an unknown flag, a missing or bad
  // value; the message is one line that names the flag (and file and line, or the variable) and
  // what is expected. NOT_FOUND: no such file.
  absl::StatusOr<std::vector<std::string>> Parse(const std::vector<std::string>& args);

  // True after Parse met --help or -h; nothing else was applied then.
  bool help_requested() const { return help_requested_; }
  std::string Help() const;

 private:
  struct Flag {
    std::string name, shown_default, help;
    bool is_bool = false;
    FlagSetter set;
    int section = 0;
  };

  struct CommandLine {
    std::vector<std::pair<std::string, std::string>> given;  // name, value
    std::vector<std::string> positional;
  };

  absl::StatusOr<CommandLine> Split(const std::vector<std::string>& args);
  void AddFlag(std::string name, std::string shown_default, std::string help, bool is_bool,
               FlagSetter setter);
  const Flag* Find(std::string_view name) const;
  absl::Status Apply(std::string_view source, std::string_view name, std::string_view value) const;
  absl::Status ApplyFile(const std::string& path) const;
  absl::Status ApplyEnvironment() const;
  std::string EnvironmentName(std::string_view flag) const;

  std::string usage_;
  std::string env_prefix_;
  std::vector<std::string> sections_{""};
  std::vector<Flag> flags_;
  bool help_requested_ = false;
};

// Parsers that flags and other text inputs share. INVALID_ARGUMENT says what is expected.
absl::StatusOr<int64_t> ParseInt(std::string_view text);
absl::StatusOr<double> ParseNumber(
    std::string_view text);  // NaN and inf parse: callers check ranges
absl::StatusOr<bool> ParseBool(std::string_view text);
absl::StatusOr<int64_t> ParseBytes(std::string_view text);

}  // namespace entropyserve
