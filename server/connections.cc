#include "server/connections.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "engine/base/mutex.h"

namespace entropyserve {
namespace {

// Process-wide because accept4, below, has no other place to keep it.
class SpareDescriptor {
 public:
  // Accepts one connection with the spare descriptor, and closes it. False: none waits, or other
  // threads were faster.
  bool Refuse(int listener) {
    MutexLock lock(&mutex_);
    close(fd_);
    const int accepted = static_cast<int>(syscall(SYS_accept4, listener, nullptr, nullptr, 0));
    if (accepted >= 0) close(accepted);
    fd_ = Open();
    return accepted >= 0;
  }

 private:
  static int Open() { return open("/dev/null", O_RDONLY | O_CLOEXEC); }

  Mutex mutex_;
  int fd_ ABSL_GUARDED_BY(mutex_) = Open();
};

SpareDescriptor spare;
std::atomic<int64_t> refused = 0;

}  // namespace

void RaiseFileLimit() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  (void)setrlimit(RLIMIT_NOFILE, &limit);
}

int64_t TakeRefusedConnections() { return refused.exchange(0); }

}  // namespace entropyserve

// In place of the C library's: gRPC 1.51 never accepts again on a listener once accept4 has failed
// with anything but EAGAIN, also after the descriptors that were missing are back. Connections that
// no descriptor is left for are closed, so that their callers know and try again.
extern "C" int accept4(int listener, sockaddr* address, socklen_t* length, int flags) {
  const socklen_t capacity = length != nullptr ? *length : 0;
  while (true) {
    if (length != nullptr) *length = capacity;
    const int fd = static_cast<int>(syscall(SYS_accept4, listener, address, length, flags));
    if (fd >= 0 || errno == EAGAIN || errno == EINTR) return fd;
    if (errno == ECONNABORTED || errno == EPROTO) continue;  // that caller is gone already
    if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM) return fd;
    if (!entropyserve::spare.Refuse(listener)) {
      errno = EAGAIN;
      return -1;
    }
    entropyserve::refused.fetch_add(1);
  }
}
