#include "engine/base/flag_set.h"

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

std::string Trim(std::string_view text) {
  return std::string(absl::StripAsciiWhitespace(View(text)));
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::pair<int64_t, const char*> kUnits[] = {
      {int64_t{1} << 40, "T"}, {int64_t{1} << 30, "G"}, {int64_t{1} << 20, "M"}, {1024, "K"}};
  for (const auto& [unit, name] : kUnits) {
    if (bytes != 0 && bytes % unit == 0) return absl::StrCat(bytes / unit, name);
  }
  return absl::StrCat(bytes);
}

// A setter that stores what `parse` returns.
template <typename Target, typename Parse>
FlagSetter Store(Target* target, Parse parse) {
  return [target, parse](std::string_view text) -> absl::Status {
    ASSIGN_OR_RETURN(const auto value, parse(text));
    *target = value;
    return absl::OkStatus();
  };
}

absl::StatusOr<int> ParseInt32(std::string_view text) {
  ASSIGN_OR_RETURN(const int64_t value, ParseInt(text));
  if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
    return absl::InvalidArgumentError("expected a 32-bit whole number");
  }
  return static_cast<int>(value);
}

absl::StatusOr<std::string> ParseString(std::string_view text) { return std::string(text); }

}  // namespace

absl::StatusOr<int64_t> ParseInt(std::string_view text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(View(text), &value)) {
    return absl::InvalidArgumentError("expected a whole number");
  }
  return value;
}

absl::StatusOr<double> ParseNumber(std::string_view text) {
  double value = 0;
  if (!absl::SimpleAtod(View(text), &value)) {
    return absl::InvalidArgumentError("expected a number");
  }
  return value;
}

absl::StatusOr<bool> ParseBool(std::string_view text) {
  bool value = false;
  if (!absl::SimpleAtob(View(text), &value)) {
    return absl::InvalidArgumentError("expected true or false");
  }
  return value;
}

absl::StatusOr<int64_t> ParseBytes(std::string_view text) {
  const absl::Status expected =
      absl::InvalidArgumentError("expected bytes, e.g. 1048576, 512M or 8G");
  std::string number = absl::AsciiStrToUpper(Trim(text));
  for (const char* suffix : {"IB", "B"}) {
    const size_t length = std::char_traits<char>::length(suffix);
    if (number.size() > length && number.compare(number.size() - length, length, suffix) == 0) {
      number.resize(number.size() - length);
      break;
    }
  }
  int64_t unit = 1;
  if (!number.empty()) {
    const size_t at = std::string_view("KMGT").find(number.back());
    if (at != std::string_view::npos) {
      unit = int64_t{1} << (10 * (at + 1));
      number.pop_back();
    }
  }
  int64_t value = 0;
  if (!absl::SimpleAtoi(number, &value) || value < 0 ||
      value > std::numeric_limits<int64_t>::max() / unit) {
    return expected;
  }
  return value * unit;
}

void FlagSet::Section(std::string title) { sections_.push_back(std::move(title)); }

void FlagSet::AddFlag(std::string name, std::string shown_default, std::string help, bool is_bool,
                      FlagSetter setter) {
  flags_.push_back({std::move(name), std::move(shown_default), std::move(help), is_bool,
                    std::move(setter), static_cast<int>(sections_.size()) - 1});
}

void FlagSet::Add(std::string name, std::string* target, std::string help) {
  AddFlag(std::move(name), *target, std::move(help), false, Store(target, ParseString));
}
void FlagSet::Add(std::string name, bool* target, std::string help) {
  AddFlag(std::move(name), *target ? "true" : "false", std::move(help), true,
          Store(target, ParseBool));
}
void FlagSet::Add(std::string name, int* target, std::string help) {
  AddFlag(std::move(name), absl::StrCat(*target), std::move(help), false,
          Store(target, ParseInt32));
}
void FlagSet::Add(std::string name, int64_t* target, std::string help) {
  AddFlag(std::move(name), absl::StrCat(*target), std::move(help), false, Store(target, ParseInt));
}
void FlagSet::Add(std::string name, double* target, std::string help) {
  AddFlag(std::move(name), absl::StrCat(*target), std::move(help), false,
          Store(target, ParseNumber));
}
void FlagSet::Add(std::string name, std::optional<bool>* target, std::string help) {
  AddFlag(std::move(name), "", std::move(help), true, Store(target, ParseBool));
}
void FlagSet::Add(std::string name, std::optional<int64_t>* target, std::string help) {
  AddFlag(std::move(name), "", std::move(help), false, Store(target, ParseInt));
}
void FlagSet::Add(std::string name, std::optional<double>* target, std::string help) {
  AddFlag(std::move(name), "", std::move(help), false, Store(target, ParseNumber));
}
void FlagSet::Add(std::string name, std::optional<std::string>* target, std::string help) {
  AddFlag(std::move(name), "", std::move(help), false, Store(target, ParseString));
}
void FlagSet::Add(std::string name, std::vector<std::string>* target, std::string help) {
  AddFlag(std::move(name), absl::StrJoin(*target, ","), std::move(help), false,
          [target](std::string_view text) {
            target->emplace_back(text);
            return absl::OkStatus();
          });
}
void FlagSet::AddBytes(std::string name, int64_t* target, std::string help) {
  AddFlag(std::move(name), FormatBytes(*target), std::move(help), false, Store(target, ParseBytes));
}
void FlagSet::AddChoice(std::string name, std::string* target, std::vector<std::string> choices,
                        std::string help) {
  auto parse = [choices](std::string_view text) -> absl::StatusOr<std::string> {
    for (const std::string& choice : choices) {
      if (text == choice) return choice;
    }
    return absl::InvalidArgumentError(absl::StrCat("expected ", absl::StrJoin(choices, ", ")));
  };
  AddFlag(std::move(name), *target, std::move(help), false, Store(target, parse));
}
void FlagSet::AddSwitch(std::string name, std::string shown_default, std::string help,
                        std::function<void(bool)> set) {
  AddFlag(std::move(name), std::move(shown_default), std::move(help), true,
          [set = std::move(set)](std::string_view text) -> absl::Status {
            ASSIGN_OR_RETURN(const bool value, ParseBool(text));
            set(value);
            return absl::OkStatus();
          });
}
void FlagSet::AddCustom(std::string name, std::string shown_default, std::string help,
                        FlagSetter setter) {
  AddFlag(std::move(name), std::move(shown_default), std::move(help), false, std::move(setter));
}

const FlagSet::Flag* FlagSet::Find(std::string_view name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

absl::Status FlagSet::Apply(std::string_view source, std::string_view name,
                            std::string_view value) const {
  const Flag* flag = Find(name);
  if (flag == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(View(source), ": no such flag; --help lists them"));
  }
  const absl::Status status = flag->set(value);
  if (status.ok()) return status;
  return absl::InvalidArgumentError(
      absl::StrCat(View(source), ": ", status.message(), ", got \"", View(value), "\""));
}

// Lines are "name = value"; "#" starts a comment line.
absl::Status FlagSet::ApplyFile(const std::string& path) const {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("--config: cannot read ", path));
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string text = Trim(line);
    if (text.empty() || text[0] == '#') continue;
    const std::string where = absl::StrCat(path, ":", number);
    const size_t equals = text.find('=');
    if (equals == std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": expected name = value"));
    }
    const std::string name = Trim(std::string_view(text).substr(0, equals));
    if (name == "config") {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a file cannot name another file"));
    }
    RETURN_IF_ERROR(Apply(absl::StrCat(where, ": ", name), name,
                          Trim(std::string_view(text).substr(equals + 1))));
  }
  if (file.bad()) return absl::NotFoundError(absl::StrCat("--config: cannot read ", path));
  return absl::OkStatus();
}

std::string FlagSet::EnvironmentName(std::string_view flag) const {
  std::string name = env_prefix_;
  for (const char c : flag) name += c == '-' ? '_' : absl::ascii_toupper(c);
  return name;
}

// Only known names are read: Kubernetes sets ENTROPYSERVE_SERVICE_HOST, ENTROPYSERVE_PORT and more
// for a service that is called entropyserve, so others cannot be errors.
absl::Status FlagSet::ApplyEnvironment() const {
  for (const Flag& flag : flags_) {
    const std::string name = EnvironmentName(flag.name);
    if (const char* value = std::getenv(name.c_str())) {
      RETURN_IF_ERROR(Apply(name, flag.name, value));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<FlagSet::CommandLine> FlagSet::Split(const std::vector<std::string>& args) {
  CommandLine line;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg == "--") {
      line.positional.insert(line.positional.end(), args.begin() + static_cast<ptrdiff_t>(i) + 1,
                             args.end());
      break;
    }
    if (arg == "--help" || arg == "-h") {
      help_requested_ = true;
      return line;
    }
    if (arg.size() < 2 || arg[0] != '-') {  // "-" is standard input
      line.positional.push_back(arg);
      continue;
    }
    const size_t equals = arg.find('=');
    const std::string written = arg.substr(0, equals);
    const std::string name = written.substr(0, 2) == "--" ? written.substr(2) : std::string();
    const bool is_config = !env_prefix_.empty() && name == "config";
    const Flag* flag = Find(name);
    if (!is_config && flag == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(written, ": no such flag; --help lists them"));
    }
    std::string value = "true";
    if (equals != std::string::npos) {
      value = arg.substr(equals + 1);
    } else if (is_config || !flag->is_bool) {
      if (++i == args.size()) {
        return absl::InvalidArgumentError(absl::StrCat(written, ": expected a value"));
      }
      value = args[i];
    }
    line.given.emplace_back(name, value);
  }
  return line;
}

absl::StatusOr<std::vector<std::string>> FlagSet::Parse(const std::vector<std::string>& args) {
  ASSIGN_OR_RETURN(CommandLine line, Split(args));
  if (help_requested_) return std::move(line.positional);
  if (!env_prefix_.empty()) {
    std::string config;
    if (const char* value = std::getenv(EnvironmentName("config").c_str())) config = value;
    for (const auto& [name, value] : line.given) {
      if (name == "config") config = value;
    }
    if (!config.empty()) RETURN_IF_ERROR(ApplyFile(config));
    RETURN_IF_ERROR(ApplyEnvironment());
  }
  for (const auto& [name, value] : line.given) {
    if (!env_prefix_.empty() && name == "config") continue;
    RETURN_IF_ERROR(Apply(absl::StrCat("--", name), name, value));
  }
  return std::move(line.positional);
}

std::string FlagSet::Help() const {
  constexpr size_t kColumn = 34;  // where explanations start
  std::string out = usage_;
  for (size_t section = 0; section < sections_.size(); ++section) {
    std::string lines;
    for (const Flag& flag : flags_) {
      if (flag.section != static_cast<int>(section)) continue;
      std::string line = absl::StrCat("  --", flag.name);
      if (!flag.shown_default.empty()) absl::StrAppend(&line, "=", flag.shown_default);
      line.append(line.size() < kColumn ? kColumn - line.size() : 1, ' ');
      absl::StrAppend(&lines, line, " ", flag.help, "\n");
    }
    if (lines.empty()) continue;
    absl::StrAppend(&out, "\n", sections_[section], sections_[section].empty() ? "" : ":\n", lines);
  }
  if (!env_prefix_.empty()) {
    absl::StrAppend(
        &out, "\nFlags also come from the environment (", env_prefix_,
        "NAME, with _ for -) and from --config=FILE,\nlines of \"name = value\". The command "
        "line wins over the environment, the environment over the file.\n");
  }
  return out;
}

}  // namespace entropyserve
