#include "engine/base/read_file.h"

#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace entropyserve {

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  // A folder opens; only reading from it fails.
  if (file.peek() == std::ifstream::traits_type::eof() && !file.eof()) {
    return absl::NotFoundError(absl::StrCat("cannot read ", path));
  }
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return text;
}

}  // namespace entropyserve
