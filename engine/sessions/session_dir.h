// A folder of session files that several servers may share.
//
//   DIR/ID.session              nobody's: any server may claim it
//   DIR/server-NAME/lock        locked (flock) as long as the server lives
//   DIR/server-NAME/ID.session  claimed by that server. Whole: the state has not changed since, so
//                               it goes back when the server is found dead. A marker: the state is
//                               in that server's memory only, and lost with it.
//   DIR/server-NAME/ID.N.tmp    being written
//
// A claim is one rename: of two servers, one gets the file. A file appears under its name only when
// it is whole and on the disk. The folder must be on one file system with rename and flock.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/sessions/session_file.h"

namespace entropyserve {

// 32 hexadecimal digits: only these become file names.
bool IsSessionId(const std::string& id);

// Owned by the engine thread; not thread-safe. The paths it gives out are for the I/O thread.
class SessionDir {
 public:
  // Takes a place in the folder, and puts back what dead servers had claimed. INVALID_ARGUMENT
  // "--session-dir: ...": it is missing, not a folder or not writable.
  static absl::StatusOr<std::unique_ptr<SessionDir>> Open(const std::string& path);
  ~SessionDir();  // leaves; claims that are still there go back as those of a dead server do
  SessionDir(const SessionDir&) = delete;
  SessionDir& operator=(const SessionDir&) = delete;

  // Headers of the files that nobody has claimed. Damaged ones are removed.
  std::vector<SessionHeader> List();

  // The header of `id`. `elsewhere`: another living server has claimed it. NOT_FOUND: nobody has
  // it. DATA_LOSS: it was damaged, and has been removed. UNAVAILABLE: it cannot be read.
  struct Found {
    SessionHeader header;
    bool elsewhere = false;
  };
  absl::StatusOr<Found> Find(const std::string& id);

  // From now on this server alone may read, change or remove `id`. NOT_FOUND: it is not there.
  absl::Status Claim(const std::string& id);
  // Gives a whole file back.
  absl::Status Unclaim(const std::string& id);
  // The session has changed in memory: what the claimed file holds must never come back.
  void MakeMarker(const std::string& id);
  void RemoveClaimed(const std::string& id);

  std::string ClaimedPath(const std::string& id) const;
  // For a file that is written now; a new name each time.
  std::string NewTemporaryPath(const std::string& id);
  // A temporary file, whole and on the disk, becomes `id`'s. An older claimed one is removed.
  absl::Status Publish(const std::string& temporary, const std::string& id);
  // Waits until the names are on the disk too. Any thread.
  static void SyncNames(const std::string& path);
  const std::string& path() const { return path_; }

  // Markers of dead servers: sessions that were lost with them. Each is told once.
  std::vector<SessionRecord> TakeLost();

 private:
  SessionDir(std::string path, std::string name, int lock);

  std::string FreePath(const std::string& id) const;
  std::vector<std::string> OtherServers() const;
  // Puts the claims of `server` back if it is dead; false: it lives.
  bool Recover(const std::string& server);

  const std::string path_;
  const std::string own_;  // path_ + "/server-NAME"
  const int lock_;         // file descriptor
  uint64_t next_temporary_ = 1;
  std::vector<SessionRecord> lost_;
};

}  // namespace entropyserve
