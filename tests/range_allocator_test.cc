// Random allocations against a naive model: ranges never overlap, everything comes back.
#include "kernels/cuda/range_allocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace entropyserve {
namespace {

constexpr size_t kUnit = RangeAllocator::kAlignment;

TEST(RangeAllocator, RandomOperationsAgainstAModel) {
  constexpr size_t kUnits = 200;
  std::mt19937 rng(7);
  RangeAllocator ranges(kUnits * kUnit + 17);
  std::vector<int> owner(kUnits, 0);  // 0: free
  std::map<size_t, int> taken;        // offset -> id
  int next = 1;
  const auto longest_gap = [&] {
    size_t longest = 0, run = 0;
    for (int o : owner) longest = std::max(longest, run = o == 0 ? run + 1 : 0);
    return longest;
  };
  for (int step = 0; step < 20000; ++step) {
    if (rng() % 2 == 0 || taken.empty()) {
      const size_t bytes = rng() % (30 * kUnit);
      const size_t units = std::max<size_t>(1, (bytes + kUnit - 1) / kUnit);
      const size_t offset = ranges.Alloc(bytes);
      ASSERT_EQ(offset == RangeAllocator::kNone, units > longest_gap());
      if (offset == RangeAllocator::kNone) continue;
      ASSERT_EQ(offset % kUnit, 0u);
      for (size_t i = 0; i < units; ++i) {
        ASSERT_EQ(owner.at(offset / kUnit + i), 0);
        owner[offset / kUnit + i] = next;
      }
      taken[offset] = next++;
    } else {
      const auto it = std::next(taken.begin(), long(rng() % taken.size()));
      const size_t units = size_t(std::count(owner.begin(), owner.end(), it->second));
      ASSERT_EQ(ranges.Free(it->first), units * kUnit);
      std::replace(owner.begin(), owner.end(), it->second, 0);
      taken.erase(it);
    }
    ASSERT_EQ(ranges.largest_free(), longest_gap() * kUnit);
    ASSERT_EQ(ranges.used(),
              size_t(kUnits - size_t(std::count(owner.begin(), owner.end(), 0))) * kUnit);
  }
}

TEST(RangeAllocator, RefusesWhatCannotFit) {
  RangeAllocator ranges(10 * kUnit);
  EXPECT_EQ(ranges.Alloc(10 * kUnit + 1), RangeAllocator::kNone);
  EXPECT_EQ(ranges.Alloc(~size_t{0}), RangeAllocator::kNone);
  EXPECT_EQ(ranges.Alloc(10 * kUnit), 0u);
  EXPECT_EQ(ranges.Alloc(1), RangeAllocator::kNone);
  EXPECT_EQ(RangeAllocator(0).Alloc(0), RangeAllocator::kNone);
}

TEST(RangeAllocatorDeathTest, FreeingTwiceIsAnError) {
  RangeAllocator ranges(kUnit);
  const size_t offset = ranges.Alloc(1);
  ranges.Free(offset);
  EXPECT_DEATH(ranges.Free(offset), "not taken");
}

}  // namespace
}  // namespace entropyserve
