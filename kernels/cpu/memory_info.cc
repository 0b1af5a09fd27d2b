#include "kernels/cpu/memory_info.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

namespace entropyserve::cpu {
namespace {

constexpr size_t kUnknown = std::numeric_limits<size_t>::max();

// A file that holds one number; kUnknown for "max" or no file.
size_t ReadNumber(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : kUnknown;
}

size_t MachineAvailable() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  size_t kib = 0;
  while (file >> name >> kib) {
    std::getline(file, unit);
    if (name == "MemAvailable:") return kib * 1024;
  }
  return size_t(sysconf(_SC_PHYS_PAGES)) / 2 * size_t(sysconf(_SC_PAGESIZE));
}

// Version 2 of control groups; inside a container its own group is the root.
size_t GroupAvailable() {
  std::ifstream file("/proc/self/cgroup");
  std::string line, group;
  while (std::getline(file, line)) {
    if (line.rfind("0::", 0) == 0) group = line.substr(3);
  }
  size_t available = kUnknown;
  for (;;) {
    const std::string folder = "/sys/fs/cgroup" + group;
    const size_t max = ReadNumber(folder + "/memory.max"),
                 used = ReadNumber(folder + "/memory.current");
    if (max != kUnknown && used != kUnknown)
      available = std::min(available, max > used ? max - used : 0);
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return available;
    group.resize(slash);
  }
}

}  // namespace

size_t AvailableMemory() { return std::min(MachineAvailable(), GroupAvailable()); }

}  // namespace entropyserve::cpu
