// A session as a file: what it is, its KV pages, and digests that make a damaged file known.
//
//   "ENTROSES", layout version, header size   8 + 4 + 4 bytes, little-endian like everything here
//   header                                    the fields of SessionRecord but `seen`
//   SHA-256 of all before                     32 bytes
//   seen                                      a bit for each token of the vocabulary
//   KV pages                                  see SequenceCache::CopyOut
//   SHA-256 of all before                     32 bytes
//
// A file cut off after its first digest is a marker: it says whose session was there, and no more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cache/sequence_cache.h"
#include "engine/sessions/host_buffer.h"

namespace entropyserve {

struct SessionRecord {
  std::string model;  // EngineParts::model_identity
  std::string id;
  std::string owner;  // OwnerDigest of the owner
  std::string kv_policy;
  // Of the pages: a file of another layout is not read.
  DType dtype = DType::kF32;
  int32_t layers = 0, kv_heads = 0, head_dim = 0;
  CacheState cache;
  int64_t turns = 0;
  std::vector<int32_t> pending;
  std::vector<bool> seen;  // [vocab]

  int64_t page_bytes() const { return PagePool::PageBytes(dtype, head_dim); }
  int64_t kv_bytes() const { return cache.pages() * page_bytes(); }
};

// SHA-256 in hexadecimal digits. Owners are stored so: their names are nobody's business.
std::string HexDigest(const std::string& text);
inline std::string OwnerDigest(const std::string& owner) { return HexDigest(owner); }

struct SessionHeader {
  SessionRecord record;  // without `seen`
  bool marker = false;   // the pages are gone
  int64_t header_bytes = 0, file_bytes = 0;
  int64_t modified_ns = 0;  // time of the last write, since the epoch
};

int64_t SessionFileBytes(const SessionRecord& record);

// Writes a new file at `path` and waits until it is on the disk. RESOURCE_EXHAUSTED: the disk is
// full; UNAVAILABLE: other errors of the system. What was written is removed then.
absl::Status WriteSessionFile(const std::string& path, const SessionRecord& record,
                              std::span<const std::byte> pages);

// Writes a new marker at `path`. It survives the process at once, a power failure some time later.
// Errors as above, and what was written is removed too.
absl::Status WriteSessionMarker(const std::string& path, const SessionRecord& record);

// Reads and checks the header, and that the file has the size it announces. NOT_FOUND: no such
// file. DATA_LOSS: it is damaged. FAILED_PRECONDITION: its layout is another version's.
// UNAVAILABLE: it cannot be read.
absl::StatusOr<SessionHeader> ReadSessionHeader(const std::string& path);

// Reads and checks everything. Errors as above; DATA_LOSS also for a marker; RESOURCE_EXHAUSTED: no
// memory for the pages.
struct StoredSession {
  SessionRecord record;
  std::shared_ptr<HostBuffer> pages;
};
absl::StatusOr<StoredSession> ReadSessionFile(const std::string& path, const ByteMeter& meter);

}  // namespace entropyserve
