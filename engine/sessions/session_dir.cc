#include "engine/sessions/session_dir.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

constexpr char kSuffix[] = ".session";
constexpr char kServerPrefix[] = "server-";
constexpr size_t kIdDigits = 32;

std::vector<std::string> Names(const std::string& path) {
  std::vector<std::string> names;
  DIR* const dir = opendir(path.c_str());
  if (!dir) return names;
  while (const dirent* entry = readdir(dir)) names.emplace_back(entry->d_name);
  closedir(dir);
  std::sort(names.begin(), names.end());
  return names;
}

// The id of "ID.session"; empty for other names.
std::string IdOf(const std::string& name) {
  if (!name.ends_with(kSuffix)) return "";
  std::string id = name.substr(0, name.size() - std::strlen(kSuffix));
  return IsSessionId(id) ? id : "";
}

std::string RandomName() {
  std::random_device random;
  char name[17];
  std::snprintf(name, sizeof(name), "%08x%08x", random(), random());
  return name;
}

absl::Status FlagError(const std::string& path, const char* what) {
  return absl::InvalidArgumentError(
      absl::StrCat("--session-dir: ", path, " ", what, ": ", std::strerror(errno)));
}

// Locks `path`, which is made if `flags` say so. -1: it is not there, or somebody else has it.
int Lock(const std::string& path, int flags) {
  const int fd = open(path.c_str(), flags | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) return -1;
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) return fd;
  close(fd);
  return -1;
}

bool Exists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0;
}

}  // namespace

bool IsSessionId(const std::string& id) {
  return id.size() == kIdDigits && id.find_first_not_of("0123456789abcdef") == std::string::npos;
}

absl::StatusOr<std::unique_ptr<SessionDir>> SessionDir::Open(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return FlagError(path, "cannot be opened");
  errno = ENOTDIR;
  if (!S_ISDIR(info.st_mode)) return FlagError(path, "cannot be used");
  // Locked before it has its name: a server that looks for dead ones never sees it unlocked.
  const std::string name = RandomName();
  const std::string unnamed = absl::StrCat(path, "/.lock-", name);
  const std::string own = absl::StrCat(path, "/", kServerPrefix, name);
  const int lock = Lock(unnamed, O_CREAT | O_EXCL);
  if (lock < 0) return FlagError(path, "cannot be written to or locked");
  if (mkdir(own.c_str(), 0700) != 0 || rename(unnamed.c_str(), (own + "/lock").c_str()) != 0) {
    const absl::Status status = FlagError(path, "cannot be written to");
    unlink(unnamed.c_str());
    rmdir(own.c_str());
    close(lock);
    return status;
  }
  std::unique_ptr<SessionDir> dir(new SessionDir(path, own, lock));
  for (const std::string& server : dir->OtherServers()) dir->Recover(server);
  return dir;
}

SessionDir::SessionDir(std::string path, std::string own, int lock)
    : path_(std::move(path)), own_(std::move(own)), lock_(lock) {}

SessionDir::~SessionDir() {
  close(lock_);
  Recover(own_);
}

std::string SessionDir::FreePath(const std::string& id) const {
  return absl::StrCat(path_, "/", id, kSuffix);
}

std::string SessionDir::ClaimedPath(const std::string& id) const {
  return absl::StrCat(own_, "/", id, kSuffix);
}

std::string SessionDir::NewTemporaryPath(const std::string& id) {
  return absl::StrCat(own_, "/", id, ".", next_temporary_++, ".tmp");
}

std::vector<std::string> SessionDir::OtherServers() const {
  std::vector<std::string> servers;
  for (const std::string& name : Names(path_)) {
    std::string server = absl::StrCat(path_, "/", name);
    if (name.starts_with(kServerPrefix) && server != own_) servers.push_back(std::move(server));
  }
  return servers;
}

bool SessionDir::Recover(const std::string& server) {
  const int lock = Lock(server + "/lock", 0);
  if (lock < 0) return false;  // alive, or about to come or go
  for (const std::string& name : Names(server)) {
    const std::string path = absl::StrCat(server, "/", name);
    const std::string id = IdOf(name);
    if (id.empty()) {
      if (name.ends_with(".tmp")) unlink(path.c_str());
      continue;
    }
    absl::StatusOr<SessionHeader> header = ReadSessionHeader(path);
    if (header.ok() && header->marker) lost_.push_back(std::move(header->record));
    // A file that stands in the free place already is newer than any claim.
    const bool whole = header.ok() && !header->marker;
    if (!whole ||
        renameat2(AT_FDCWD, path.c_str(), AT_FDCWD, FreePath(id).c_str(), RENAME_NOREPLACE) != 0) {
      unlink(path.c_str());
    }
  }
  unlink((server + "/lock").c_str());
  rmdir(server.c_str());
  close(lock);
  return true;
}

std::vector<SessionHeader> SessionDir::List() {
  std::vector<SessionHeader> headers;
  for (const std::string& name : Names(path_)) {
    const std::string id = IdOf(name);
    if (id.empty()) continue;
    absl::StatusOr<Found> found = Find(id);
    if (found.ok() && !found->elsewhere) headers.push_back(std::move(found->header));
  }
  return headers;
}

absl::StatusOr<SessionDir::Found> SessionDir::Find(const std::string& id) {
  if (!IsSessionId(id)) return absl::NotFoundError("no such session file");
  absl::StatusOr<SessionHeader> header = ReadSessionHeader(FreePath(id));
  if (absl::IsNotFound(header.status())) {
    for (const std::string& server : OtherServers()) {
      const std::string path = absl::StrCat(server, "/", id, kSuffix);
      if (!Exists(path)) continue;
      if (Recover(server)) break;
      absl::StatusOr<SessionHeader> claimed = ReadSessionHeader(path);
      if (claimed.ok()) return Found{.header = *std::move(claimed), .elsewhere = true};
    }
    header = ReadSessionHeader(FreePath(id));  // it may have come back meanwhile
  }
  const bool wrong = absl::IsDataLoss(header.status()) ||
                     (header.ok() && (header->marker || header->record.id != id));
  if (!wrong) {
    RETURN_IF_ERROR(header.status());
    return Found{.header = *std::move(header)};
  }
  // Claimed first, then looked at again: another server may have put a whole one there meanwhile.
  if (Claim(id).ok()) {
    header = ReadSessionHeader(ClaimedPath(id));
    if (header.ok() && !header->marker && header->record.id == id) {
      RETURN_IF_ERROR(Unclaim(id));
      return Found{.header = *std::move(header)};
    }
    RemoveClaimed(id);
  }
  return absl::DataLossError("the session's file was damaged");
}

absl::Status SessionDir::Claim(const std::string& id) {
  if (rename(FreePath(id).c_str(), ClaimedPath(id).c_str()) == 0) return absl::OkStatus();
  if (errno == ENOENT) return absl::NotFoundError("no such session file");
  return absl::UnavailableError(absl::StrCat("claiming a session file: ", std::strerror(errno)));
}

absl::Status SessionDir::Unclaim(const std::string& id) {
  if (rename(ClaimedPath(id).c_str(), FreePath(id).c_str()) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("giving a session file back: ", std::strerror(errno)));
}

void SessionDir::MakeMarker(const std::string& id) {
  const std::string path = ClaimedPath(id);
  const absl::StatusOr<SessionHeader> header = ReadSessionHeader(path);
  if (!header.ok() || truncate(path.c_str(), header->header_bytes) != 0) unlink(path.c_str());
}

void SessionDir::RemoveClaimed(const std::string& id) { unlink(ClaimedPath(id).c_str()); }

absl::Status SessionDir::Publish(const std::string& temporary, const std::string& id) {
  if (rename(temporary.c_str(), FreePath(id).c_str()) == 0) {
    RemoveClaimed(id);
    return absl::OkStatus();
  }
  const absl::Status status =
      absl::UnavailableError(absl::StrCat("naming a session file: ", std::strerror(errno)));
  unlink(temporary.c_str());
  return status;
}

void SessionDir::SyncNames(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  fsync(fd);
  close(fd);
}

std::vector<SessionRecord> SessionDir::TakeLost() { return std::exchange(lost_, {}); }

}  // namespace entropyserve
