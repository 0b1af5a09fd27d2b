// What the tests of the evaluation share.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "client/eval/record.h"
#include "client/eval/task_runner.h"
#include "engine/base/read_file.h"

namespace entropyserve {

// A file that is gone with the test.
class TempFile {
 public:
  explicit TempFile(const std::string& text = "") {
    std::string path = ::testing::TempDir() + "eval_XXXXXX";
    const int fd = mkstemp(path.data());
    EXPECT_GE(fd, 0);
    close(fd);
    path_ = path;
    Write(text);
    if (text.empty()) std::remove(path_.c_str());
  }
  ~TempFile() { std::remove(path_.c_str()); }
  void Write(const std::string& text) { std::ofstream(path_, std::ios::binary) << text; }
  std::string Read() const { return *ReadFile(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline size_t Lines(const std::string& text) {
  return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

inline std::vector<PolicySpec> Specs(const std::string& text) {
  auto specs = ParsePolicySpecs(text);
  EXPECT_TRUE(specs.ok()) << specs.status();
  return *std::move(specs);
}

}  // namespace entropyserve
