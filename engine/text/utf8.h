// UTF-8 at the edges: bytes from a model or a file are not text until they have passed through
// here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace entropyserve {

// One step of a decoder that follows Unicode's "maximal subpart" practice (also Rust's and Python's
// lossy decoding): overlong forms, surrogates and values above U+10FFFF are ill-formed.
struct Utf8Step {
  int length = 0;           // bytes this step covers: a character, or one maximal ill-formed part
  bool valid = false;       // the bytes are a character
  bool incomplete = false;  // not valid, but more bytes could make it so
};

// `bytes` must not be empty.
Utf8Step NextUtf8(std::string_view bytes);

// The code point of a valid character of `length` bytes, as NextUtf8 reported it.
uint32_t DecodeUtf8(std::string_view bytes, int length);

void AppendUtf8(uint32_t code_point, std::string* out);

bool IsValidUtf8(std::string_view bytes);

// Every maximal ill-formed part becomes one U+FFFD; valid text comes back unchanged.
std::string SanitizeUtf8(std::string_view bytes);

}  // namespace entropyserve
