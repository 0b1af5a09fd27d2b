#include "client/bench/prompts.h"

#include <algorithm>
#include <utility>

#include "client/bench/random.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// Appends the ids of [begin, end) that are no control tokens. Vocabularies keep those together, so
// halving finds them in a few calls.
absl::Status Collect(int32_t begin, int32_t end, Client* client, std::vector<int32_t>* ids) {
  if (begin >= end) return absl::OkStatus();
  v1::DetokenizeRequest request;
  for (int32_t id = begin; id < end; ++id) request.add_ids(id);
  ASSIGN_OR_RETURN(const v1::DetokenizeResponse whole, client->Detokenize(request));
  request.set_skip_special(true);
  ASSIGN_OR_RETURN(const v1::DetokenizeResponse plain, client->Detokenize(request));
  if (whole.raw().size() == plain.raw().size()) {
    for (int32_t id = begin; id < end; ++id) ids->push_back(id);
    return absl::OkStatus();
  }
  if (plain.raw().empty()) return absl::OkStatus();
  const int32_t middle = begin + (end - begin) / 2;
  RETURN_IF_ERROR(Collect(begin, middle, client, ids));
  return Collect(middle, end, client, ids);
}

}  // namespace

PromptSource PromptSource::Random(std::vector<int32_t> vocabulary) {
  PromptSource source;
  source.ids_ = std::move(vocabulary);
  return source;
}

PromptSource PromptSource::Windows(std::vector<int32_t> text) {
  PromptSource source;
  source.windows_ = true;
  source.ids_ = std::move(text);
  return source;
}

std::vector<int32_t> PromptSource::Make(uint64_t seed, int64_t tokens) const {
  entropyserve::Random random(seed, RandomStream::kPrompt, 0);
  std::vector<int32_t> prompt(static_cast<size_t>(tokens));
  if (!windows_) {
    for (int32_t& id : prompt) id = ids_[random.Below(ids_.size())];
    return prompt;
  }
  size_t at = random.Below(ids_.size());
  for (int32_t& id : prompt) {
    id = ids_[at];
    if (++at == ids_.size()) at = 0;
  }
  return prompt;
}

absl::StatusOr<std::vector<int32_t>> OrdinaryIds(const v1::GetModelResponse& model,
                                                 Client* client) {
  std::vector<int32_t> ids;
  // Slices, because the server bounds the text of one answer.
  constexpr int32_t kSlice = 16384;
  for (int32_t begin = 0; begin < model.vocab_size(); begin += kSlice) {
    RETURN_IF_ERROR(Collect(begin, std::min(begin + kSlice, model.vocab_size()), client, &ids));
  }
  std::erase_if(ids, [&model](int32_t id) {
    return id == model.bos_token_id() ||
           std::find(model.end_token_ids().begin(), model.end_token_ids().end(), id) !=
               model.end_token_ids().end();
  });
  if (ids.empty()) return absl::FailedPreconditionError("the served vocabulary has no plain token");
  return ids;
}

}  // namespace entropyserve
