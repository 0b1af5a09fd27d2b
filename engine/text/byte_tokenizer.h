// A vocabulary for models without one: ids 0 to 255 are the bytes, the rest have no text.
#pragma once

#include <memory>

#include "engine/text/tokenizer.h"

namespace entropyserve {

std::unique_ptr<Tokenizer> MakeByteTokenizer(int vocab_size);

}  // namespace entropyserve
