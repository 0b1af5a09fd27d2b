// Messages of raw methods. gRPC 1.51 answers a message that does not parse with an empty
// UNIMPLEMENTED; raw methods parse themselves, so that it is INVALID_ARGUMENT.
#pragma once

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace entropyserve {

template <typename Message>
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, const char* name, Message* message) {
  grpc::ByteBuffer copy(bytes);  // shares the slices; Deserialize clears what it is given
  if (grpc::SerializationTraits<Message>::Deserialize(&copy, message).ok()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": does not parse, or a string in it is not valid UTF-8"));
}

template <typename Message>
grpc::ByteBuffer SerializeMessage(const Message& message) {
  grpc::ByteBuffer bytes;
  bool own_buffer = false;
  // Fails for messages above 2 GiB only, which limits on the way here exclude.
  (void)grpc::SerializationTraits<Message>::Serialize(message, &bytes, &own_buffer);
  return bytes;
}

}  // namespace entropyserve
