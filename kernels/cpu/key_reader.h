// Walks over the keys that one segment reads of one kv head, in the order in which attention sums
// them: the past run, then the turn's keys before the segment (all, or the selected blocks), then
// its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/kv_view.h"

namespace entropyserve::cpu {

class KeyReader {
 public:
  // blocks: ascending, null when dense. begin: the turn token at which the segment starts.
  KeyReader(const HeadView& view, const int32_t* blocks, int32_t count, int32_t block_tokens,
            int32_t begin)
      : view_(view),
        blocks_(blocks),
        count_(count),
        block_tokens_(block_tokens),
        turn_(blocks ? begin : 0),
        prior_(view.past + (blocks ? count * block_tokens : begin)) {}

  // Keys before the segment's own: query i of the segment reads the first prior() + i + 1.
  int32_t prior() const { return prior_; }

  // The next keys that lie together in the pool, at most `max` > 0.
  struct Span {
    int64_t row;  // of the first
    int32_t count;
  };
  Span Next(int32_t max) {
    if (past_ < view_.past) {
      const int32_t count = std::min({max, view_.past - past_, ToPageEnd(past_)});
      past_ += count;
      return {view_.PastRow(past_ - count), count};
    }
    if (block_ < count_) {
      const int32_t token = blocks_[block_] * block_tokens_ + in_block_;
      const int32_t count = std::min({max, block_tokens_ - in_block_, ToPageEnd(token)});
      in_block_ += count;
      if (in_block_ == block_tokens_) ++block_, in_block_ = 0;
      return {view_.TurnRow(token), count};
    }
    const int32_t count = std::min(max, ToPageEnd(turn_));
    turn_ += count;
    return {view_.TurnRow(turn_ - count), count};
  }

 private:
  static int32_t ToPageEnd(int32_t token) { return kPageTokens - token % kPageTokens; }

  const HeadView& view_;
  const int32_t* blocks_;
  int32_t count_, block_tokens_;
  int32_t past_ = 0, block_ = 0, in_block_ = 0, turn_;
  int32_t prior_;
};

}  // namespace entropyserve::cpu
