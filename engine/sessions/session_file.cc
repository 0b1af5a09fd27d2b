#include "engine/sessions/session_file.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

constexpr char kMagic[] = "ENTROSES";
constexpr uint32_t kLayoutVersion = 1;
constexpr size_t kPrefixBytes = 16;
constexpr size_t kDigestBytes = 32;
constexpr size_t kMaxHeaderBytes = size_t{64} << 20;  // a length for each of millions of heads

using Digest = std::array<std::byte, kDigestBytes>;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    Check(context_ && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1, "SHA-256");
  }
  Sha256(const Sha256& other) : context_(EVP_MD_CTX_new()) {
    Check(context_ && EVP_MD_CTX_copy_ex(context_, other.context_) == 1, "SHA-256");
  }
  Sha256& operator=(const Sha256&) = delete;
  ~Sha256() { EVP_MD_CTX_free(context_); }
  void Add(std::span<const std::byte> bytes) {
    Check(EVP_DigestUpdate(context_, bytes.data(), bytes.size()) == 1, "SHA-256");
  }
  // Of everything so far; more may follow.
  Digest Get() const {
    Sha256 copy(*this);
    Digest digest;
    Check(EVP_DigestFinal_ex(copy.context_, reinterpret_cast<unsigned char*>(digest.data()),
                             nullptr) == 1,
          "SHA-256");
    return digest;
  }

 private:
  EVP_MD_CTX* const context_;
};

// ---- Fields of the header. `Both` writes and reads them in one order.

class Writer {
 public:
  template <typename T>
  void Number(T* value) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* bytes = reinterpret_cast<const std::byte*>(value);
    out.insert(out.end(), bytes, bytes + sizeof(T));
  }
  template <typename C>
  void Sequence(C* items) {
    uint64_t size = items->size();
    Number(&size);
    for (auto& item : *items) Number(&item);
  }
  std::vector<std::byte> out;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> in) : in_(in) {}
  template <typename T>
  void Number(T* value) {
    if (in_.size() < sizeof(T)) {
      ok_ = false;
      return;
    }
    std::memcpy(value, in_.data(), sizeof(T));
    in_ = in_.subspan(sizeof(T));
  }
  template <typename C>
  void Sequence(C* items) {
    uint64_t size = 0;
    Number(&size);
    if (size > in_.size() / sizeof((*items)[0])) {
      ok_ = false;
      return;
    }
    items->resize(size);
    for (auto& item : *items) Number(&item);
  }
  bool Done() const { return ok_ && in_.empty(); }

 private:
  std::span<const std::byte> in_;
  bool ok_ = true;
};

template <typename Stream>
void Both(Stream* stream, SessionRecord* r, uint64_t* vocab) {
  stream->Sequence(&r->model);
  stream->Sequence(&r->id);
  stream->Sequence(&r->owner);
  stream->Sequence(&r->kv_policy);
  uint32_t page_tokens = kPageTokens;
  stream->Number(&page_tokens);
  if (page_tokens != kPageTokens) r->layers = -1;  // refused below
  stream->Number(&r->dtype);
  stream->Number(&r->layers);
  stream->Number(&r->kv_heads);
  stream->Number(&r->head_dim);
  stream->Sequence(&r->cache.lengths);
  stream->Number(&r->cache.position);
  uint8_t compressed = r->cache.ever_compressed;
  stream->Number(&compressed);
  r->cache.ever_compressed = compressed != 0;
  stream->Number(&r->turns);
  stream->Sequence(&r->pending);
  stream->Number(vocab);
}

std::vector<std::byte> Encode(SessionRecord record) {
  uint64_t vocab = record.seen.size();
  Writer header;
  Both(&header, &record, &vocab);
  Check(header.out.size() <= kMaxHeaderBytes, "a session's header");
  std::vector<std::byte> out(kPrefixBytes);
  const uint32_t version = kLayoutVersion, size = uint32_t(header.out.size());
  std::memcpy(out.data(), kMagic, 8);
  std::memcpy(out.data() + 8, &version, 4);
  std::memcpy(out.data() + 12, &size, 4);
  out.insert(out.end(), header.out.begin(), header.out.end());
  return out;
}

std::vector<std::byte> PackBits(const std::vector<bool>& bits) {
  std::vector<std::byte> bytes((bits.size() + 7) / 8);
  for (size_t i = 0; i < bits.size(); ++i) {
    if (bits[i]) bytes[i / 8] |= std::byte(1 << (i % 8));
  }
  return bytes;
}

// Numbers that a file may announce: what they describe must make sense before memory is taken.
bool Plausible(const SessionRecord& r, uint64_t vocab) {
  constexpr int32_t kMost = 1 << 20;
  if (r.layers <= 0 || r.kv_heads <= 0 || r.head_dim <= 0 || r.layers > kMost ||
      r.kv_heads > kMost || r.head_dim > kMost || vocab > (uint64_t{1} << 31)) {
    return false;
  }
  if (r.dtype != DType::kF32 && r.dtype != DType::kBF16) return false;
  if (r.cache.lengths.size() != size_t(r.layers) * r.kv_heads) return false;
  if (r.cache.position < 0 || r.cache.position > std::numeric_limits<int32_t>::max() ||
      r.turns < 0) {
    return false;
  }
  return std::all_of(r.cache.lengths.begin(), r.cache.lengths.end(),
                     [&](int32_t length) { return length >= 0 && length <= r.cache.position; });
}

// ---- Files

absl::Status SystemError(const char* what) {
  if (errno == ENOENT) return absl::NotFoundError("no such session file");
  const std::string message = std::string(what) + " a session file: " + std::strerror(errno);
  return errno == ENOSPC || errno == EDQUOT ? absl::ResourceExhaustedError(message)
                                            : absl::UnavailableError(message);
}

absl::Status Damaged(const char* what) {
  return absl::DataLossError(std::string("the session file is damaged: ") + what);
}

class File {
 public:
  File(const std::string& path, int flags) : fd_(open(path.c_str(), flags | O_CLOEXEC, 0600)) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

  absl::Status Write(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = write(fd_, bytes.data(), std::min(bytes.size(), kMostAtOnce));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return SystemError("writing");
      bytes = bytes.subspan(size_t(n));
    }
    return absl::OkStatus();
  }
  absl::Status Read(std::span<std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t n = read(fd_, bytes.data(), std::min(bytes.size(), kMostAtOnce));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return SystemError("reading");
      if (n == 0) return Damaged("it ends too early");
      bytes = bytes.subspan(size_t(n));
    }
    return absl::OkStatus();
  }

 private:
  static constexpr size_t kMostAtOnce = size_t{1} << 30;  // write() takes a little under 2 GiB
  const int fd_;
};

// Reads `bytes`, which are also hashed.
absl::Status ReadHashed(File* file, std::span<std::byte> bytes, Sha256* hash) {
  RETURN_IF_ERROR(file->Read(bytes));
  hash->Add(bytes);
  return absl::OkStatus();
}

absl::Status CheckDigest(File* file, Sha256* hash, const char* what) {
  const Digest expected = hash->Get();
  Digest found;
  RETURN_IF_ERROR(ReadHashed(file, found, hash));
  return found == expected ? absl::OkStatus() : Damaged(what);
}

absl::StatusOr<SessionHeader> ReadHeader(File* file, Sha256* hash, uint64_t* vocab) {
  struct stat info;
  if (fstat(file->fd(), &info) != 0) return SystemError("reading");
  std::array<std::byte, kPrefixBytes> prefix;
  RETURN_IF_ERROR(ReadHashed(file, prefix, hash));
  uint32_t version, size;
  std::memcpy(&version, prefix.data() + 8, 4);
  std::memcpy(&size, prefix.data() + 12, 4);
  if (std::memcmp(prefix.data(), kMagic, 8) != 0) return Damaged("it does not begin as one");
  if (version != kLayoutVersion) {
    return absl::FailedPreconditionError("the session file is of another version of the server");
  }
  SessionHeader header;
  header.header_bytes = int64_t(kPrefixBytes + size + kDigestBytes);
  header.file_bytes = info.st_size;
  header.modified_ns = int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  if (size > kMaxHeaderBytes || header.header_bytes > info.st_size) {
    return Damaged("it ends too early");
  }
  std::vector<std::byte> bytes(size);
  RETURN_IF_ERROR(ReadHashed(file, bytes, hash));
  RETURN_IF_ERROR(CheckDigest(file, hash, "its header's digest differs"));
  Reader reader(bytes);
  Both(&reader, &header.record, vocab);
  if (!reader.Done() || !Plausible(header.record, *vocab)) return Damaged("its header");
  header.marker = header.file_bytes == header.header_bytes;
  const int64_t whole = header.header_bytes + int64_t((*vocab + 7) / 8) + header.record.kv_bytes() +
                        int64_t(kDigestBytes);
  if (!header.marker && header.file_bytes != whole) return Damaged("its size");
  return header;
}

}  // namespace

std::string HexDigest(const std::string& text) {
  Sha256 hash;
  hash.Add(std::as_bytes(std::span(text)));
  std::string hex;
  for (const std::byte b : hash.Get()) {
    hex += "0123456789abcdef"[std::to_integer<int>(b >> 4)];
    hex += "0123456789abcdef"[std::to_integer<int>(b & std::byte{15})];
  }
  return hex;
}

int64_t SessionFileBytes(const SessionRecord& record) {
  return int64_t(Encode(record).size() + 2 * kDigestBytes + (record.seen.size() + 7) / 8) +
         record.kv_bytes();
}

absl::Status WriteSessionFile(const std::string& path, const SessionRecord& record,
                              std::span<const std::byte> pages) {
  Check(int64_t(pages.size()) == record.kv_bytes(), "a session's pages");
  File file(path, O_WRONLY | O_CREAT | O_EXCL);
  if (file.fd() < 0) return SystemError("writing");
  Sha256 hash;
  const auto put = [&](std::span<const std::byte> bytes) {
    hash.Add(bytes);
    return file.Write(bytes);
  };
  const auto put_all = [&]() -> absl::Status {
    RETURN_IF_ERROR(put(Encode(record)));
    RETURN_IF_ERROR(put(hash.Get()));
    RETURN_IF_ERROR(put(PackBits(record.seen)));
    RETURN_IF_ERROR(put(pages));
    RETURN_IF_ERROR(put(hash.Get()));
    return fsync(file.fd()) == 0 ? absl::OkStatus() : SystemError("writing");
  };
  const absl::Status status = put_all();
  if (!status.ok()) unlink(path.c_str());
  return status;
}

absl::Status WriteSessionMarker(const std::string& path, const SessionRecord& record) {
  File file(path, O_WRONLY | O_CREAT | O_EXCL);
  if (file.fd() < 0) return SystemError("writing");
  std::vector<std::byte> bytes = Encode(record);
  Sha256 hash;
  hash.Add(bytes);
  const Digest digest = hash.Get();
  bytes.insert(bytes.end(), digest.begin(), digest.end());
  const absl::Status status = file.Write(bytes);
  if (!status.ok()) unlink(path.c_str());
  return status;
}

absl::StatusOr<SessionHeader> ReadSessionHeader(const std::string& path) {
  File file(path, O_RDONLY);
  if (file.fd() < 0) return SystemError("reading");
  Sha256 hash;
  uint64_t vocab = 0;
  return ReadHeader(&file, &hash, &vocab);
}

absl::StatusOr<StoredSession> ReadSessionFile(const std::string& path, const ByteMeter& meter) {
  File file(path, O_RDONLY);
  if (file.fd() < 0) return SystemError("reading");
  Sha256 hash;
  uint64_t vocab = 0;
  ASSIGN_OR_RETURN(SessionHeader header, ReadHeader(&file, &hash, &vocab));
  if (header.marker) return Damaged("its pages are gone");
  StoredSession session;
  session.record = std::move(header.record);
  std::vector<std::byte> seen((vocab + 7) / 8);
  RETURN_IF_ERROR(ReadHashed(&file, seen, &hash));
  session.record.seen.resize(vocab);
  for (size_t i = 0; i < vocab; ++i) {
    session.record.seen[i] = (seen[i / 8] & std::byte(1 << (i % 8))) != std::byte{0};
  }
  const int64_t bytes = session.record.kv_bytes();
  session.pages = HostBuffer::Create(bytes, meter);
  if (!session.pages) return absl::ResourceExhaustedError("no memory to read the session into");
  RETURN_IF_ERROR(ReadHashed(&file, {session.pages->data(), size_t(bytes)}, &hash));
  RETURN_IF_ERROR(CheckDigest(&file, &hash, "its digest differs"));
  return session;
}

}  // namespace entropyserve
