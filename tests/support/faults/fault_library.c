// What if the N-th call that changes a directory tree fails, or is the last thing its process does?
//
// Preloaded into the processes of tests/checkpoint/test_faults.py (cc -shared -fPIC). A process that has called
// fault_arm counts, over all its threads, each call that changes something below one directory: those of Python, SQLite
// and orbax's C++ writers alike. Each is written to a log as it ends, and one of them can be killed, torn, refused or
// cut short.
// Before fault_arm, and for every other path, the calls are those of the C library.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

// Kinds of calls, a mask: a full disk refuses those that need room, and still removes files.
// Locks are looked at, and logged, only where a plan names them.
enum { WRITES = 1, SYNCS = 2, CREATES = 4, RENAMES = 8, TRUNCATES = 16, REMOVES = 32, LOCKS = 64 };

// What happens at the N-th call. A torn write is killed after half of its bytes, a short one returns with half of them.
enum { NOTHING, KILL_BEFORE, KILL_TORN, KILL_AFTER, REFUSE, SHORTEN };

static struct {
  atomic_int armed;
  char root[PATH_MAX];
  size_t root_size;
  int log;
  unsigned kinds;
  int action;
  long at;
  int repeat;  // REFUSE and SHORTEN: every later call too.
  int error;
  int serial;  // One call at a time, so that the log is the order in which they happened.
  int sync;    // 0: fsync does nothing. A killed process loses no page of the system's cache.
} plan;

static atomic_long count, hits;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

struct call {
  const char *name, *path, *target;
  int hit;
};

void fault_arm(const char *root, int log, unsigned kinds, int action, long at, int repeat, int error, int serial,
               int sync) {
  snprintf(plan.root, sizeof plan.root, "%s", root);
  plan.root_size = strlen(plan.root);
  plan.log = log;
  plan.kinds = kinds;
  plan.action = action;
  plan.at = at;
  plan.repeat = repeat;
  plan.error = error;
  plan.serial = serial;
  plan.sync = sync;
  count = 0;
  hits = 0;
  plan.armed = 1;
}

// A process that nobody arms by a call is armed as it starts, if FAULT_PLAN is "ROOT KINDS ERROR": below ROOT, every
// call of these kinds is refused with this error.
__attribute__((constructor)) static void arm_from_environment(void) {
  char root[PATH_MAX];
  unsigned kinds;
  int error;
  const char *text = getenv("FAULT_PLAN");
  if (text && sscanf(text, "%4095s %u %d", root, &kinds, &error) == 3)
    fault_arm(root, -1, kinds, REFUSE, 1, 1, error, 0, 1);
}

// From here on the calls are ordinary ones. Returns how many were disturbed.
long fault_disarm(void) {
  plan.armed = 0;
  return hits;
}

// The log is written by a system call that is not counted, so that what a killed process wrote is whole and in order.
static void say(const char *name, const char *path, const char *target, long result) {
  char line[2 * PATH_MAX + 64];
  int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\n", name, path, target ? target : "", result);
  if (plan.log >= 0) syscall(SYS_write, plan.log, line, (size_t)size);
}

static _Noreturn void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Fills `path` with where a call goes and says whether that is below the directory.
static int below(char path[PATH_MAX], int directory, const char *name) {
  char link[32];
  ssize_t size = 0;
  if (!plan.armed) return 0;
  if (!name || name[0] != '/') {
    if (directory == AT_FDCWD) {
      snprintf(link, sizeof link, "/proc/self/cwd");
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    }
    if ((size = readlink(link, path, PATH_MAX - 1)) < 0) return 0;
  }
  path[size] = 0;
  if (name && (size_t)snprintf(path + size, PATH_MAX - size, "%s%s", size ? "/" : "", name) >= PATH_MAX - (size_t)size)
    return 0;
  return !strncmp(path, plan.root, plan.root_size) && (path[plan.root_size] == '/' || !path[plan.root_size]);
}

// Returns 0 if the call is refused, with errno set.
static int begin(struct call *call, unsigned kind) {
  if (plan.serial) pthread_mutex_lock(&turn);
  long number = plan.kinds & kind ? atomic_fetch_add(&count, 1) + 1 : 0;
  call->hit = plan.at > 0 && (number == plan.at || (plan.repeat && number > plan.at)) ? plan.action : NOTHING;
  if (call->hit) atomic_fetch_add(&hits, 1);
  if (call->hit == KILL_BEFORE) die();
  if (call->hit != REFUSE) return 1;
  errno = plan.error;
  return 0;
}

static long end(struct call *call, long result) {
  int error = errno;
  say(call->name, call->path, call->target, result < 0 ? -(long)error : 0);
  if (call->hit == KILL_TORN || call->hit == KILL_AFTER) die();
  if (plan.serial) pthread_mutex_unlock(&turn);
  errno = error;
  return result;
}

static size_t part(const struct call *call, size_t size) {
  return size > 1 && (call->hit == KILL_TORN || call->hit == SHORTEN) ? size / 2 : size;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define RUN(call, kind, expression) end(&call, begin(&call, kind) ? (long)(expression) : -1L)

#define AROUND_FD(name, kind, arguments, fd, expression)                  \
  {                                                                       \
    char path[PATH_MAX];                                                  \
    if (!below(path, fd, NULL)) return REAL(name) arguments;              \
    struct call call = {#name, path, NULL, NOTHING};                      \
    return RUN(call, kind, expression);                                   \
  }

ssize_t write(int fd, const void *data, size_t size)
AROUND_FD(write, WRITES, (fd, data, size), fd, REAL(write)(fd, data, part(&call, size)))

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
AROUND_FD(pwrite, WRITES, (fd, data, size, at), fd, REAL(pwrite)(fd, data, part(&call, size), at))

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
AROUND_FD(pwrite64, WRITES, (fd, data, size, at), fd, REAL(pwrite64)(fd, data, part(&call, size), at))

ssize_t sendfile(int fd, int from, off_t *at, size_t size)
AROUND_FD(sendfile, WRITES, (fd, from, at, size), fd, REAL(sendfile)(fd, from, at, part(&call, size)))

ssize_t sendfile64(int fd, int from, off64_t *at, size_t size)
AROUND_FD(sendfile64, WRITES, (fd, from, at, size), fd, REAL(sendfile64)(fd, from, at, part(&call, size)))

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags)
AROUND_FD(copy_file_range, WRITES, (from, from_at, fd, at, size, flags), fd,
          REAL(copy_file_range)(from, from_at, fd, at, part(&call, size), flags))

// Of several pieces, a part is the first half of the first one.
static const struct iovec *piece(const struct call *call, const struct iovec *pieces, int *number, struct iovec *first) {
  if (!*number || part(call, 2) == 2) return pieces;
  *first = (struct iovec){pieces->iov_base, part(call, pieces->iov_len)};
  *number = 1;
  return first;
}

ssize_t writev(int fd, const struct iovec *pieces, int number) {
  struct iovec first;
  AROUND_FD(writev, WRITES, (fd, pieces, number), fd, (pieces = piece(&call, pieces, &number, &first),
                                                       REAL(writev)(fd, pieces, number)))
}

ssize_t pwritev(int fd, const struct iovec *pieces, int number, off_t at) {
  struct iovec first;
  AROUND_FD(pwritev, WRITES, (fd, pieces, number, at), fd, (pieces = piece(&call, pieces, &number, &first),
                                                            REAL(pwritev)(fd, pieces, number, at)))
}

ssize_t pwritev64(int fd, const struct iovec *pieces, int number, off64_t at) {
  struct iovec first;
  AROUND_FD(pwritev64, WRITES, (fd, pieces, number, at), fd, (pieces = piece(&call, pieces, &number, &first),
                                                              REAL(pwritev64)(fd, pieces, number, at)))
}

int fsync(int fd) AROUND_FD(fsync, SYNCS, (fd), fd, plan.sync ? REAL(fsync)(fd) : 0)

int fdatasync(int fd) AROUND_FD(fdatasync, SYNCS, (fd), fd, plan.sync ? REAL(fdatasync)(fd) : 0)

int flock(int fd, int operation) {
  if (!(plan.kinds & LOCKS) || operation & LOCK_UN) return REAL(flock)(fd, operation);
  AROUND_FD(flock, LOCKS, (fd, operation), fd, REAL(flock)(fd, operation))
}

// SQLite's locks. The third argument is a number or a pointer; both fit into a pointer.
#define AROUND_FCNTL(name)                                                                                      \
  {                                                                                                             \
    va_list list;                                                                                               \
    va_start(list, command);                                                                                    \
    void *argument = va_arg(list, void *);                                                                      \
    va_end(list);                                                                                               \
    int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW; \
    if (!(plan.kinds & LOCKS) || !locks || ((struct flock *)argument)->l_type == F_UNLCK)                       \
      return REAL(name)(fd, command, argument);                                                                 \
    AROUND_FD(name, LOCKS, (fd, command, argument), fd, REAL(name)(fd, command, argument))                      \
  }

int fcntl(int fd, int command, ...) AROUND_FCNTL(fcntl)

int fcntl64(int fd, int command, ...) AROUND_FCNTL(fcntl64)

int ftruncate(int fd, off_t size) AROUND_FD(ftruncate, TRUNCATES, (fd, size), fd, REAL(ftruncate)(fd, size))

int ftruncate64(int fd, off64_t size) AROUND_FD(ftruncate64, TRUNCATES, (fd, size), fd, REAL(ftruncate64)(fd, size))

int posix_fallocate(int fd, off_t at, off_t size) {
  char path[PATH_MAX];
  if (!below(path, fd, NULL)) return REAL(posix_fallocate)(fd, at, size);
  struct call call = {"posix_fallocate", path, NULL, NOTHING};
  // This one returns its error.
  return RUN(call, TRUNCATES, (errno = REAL(posix_fallocate)(fd, at, size)) ? -1 : 0) < 0 ? errno : 0;
}

#define AROUND_PATH(name, kind, arguments, directory, where, expression) \
  {                                                                      \
    char path[PATH_MAX];                                                 \
    if (!below(path, directory, where)) return REAL(name) arguments;     \
    struct call call = {#name, path, NULL, NOTHING};                     \
    return RUN(call, kind, expression);                                  \
  }

int truncate(const char *name, off_t size)
AROUND_PATH(truncate, TRUNCATES, (name, size), AT_FDCWD, name, REAL(truncate)(name, size))

int truncate64(const char *name, off64_t size)
AROUND_PATH(truncate64, TRUNCATES, (name, size), AT_FDCWD, name, REAL(truncate64)(name, size))

int mkdir(const char *name, mode_t mode)
AROUND_PATH(mkdir, CREATES, (name, mode), AT_FDCWD, name, REAL(mkdir)(name, mode))

int mkdirat(int directory, const char *name, mode_t mode)
AROUND_PATH(mkdirat, CREATES, (directory, name, mode), directory, name, REAL(mkdirat)(directory, name, mode))

int unlink(const char *name) AROUND_PATH(unlink, REMOVES, (name), AT_FDCWD, name, REAL(unlink)(name))

int unlinkat(int directory, const char *name, int flags)
AROUND_PATH(unlinkat, REMOVES, (directory, name, flags), directory, name, REAL(unlinkat)(directory, name, flags))

int rmdir(const char *name) AROUND_PATH(rmdir, REMOVES, (name), AT_FDCWD, name, REAL(rmdir)(name))

int remove(const char *name) AROUND_PATH(remove, REMOVES, (name), AT_FDCWD, name, REAL(remove)(name))

int symlink(const char *content, const char *name)
AROUND_PATH(symlink, CREATES, (content, name), AT_FDCWD, name, REAL(symlink)(content, name))

#define AROUND_TWO(name, kind, arguments, directory, where, directory2, where2) \
  {                                                                             \
    char path[PATH_MAX], target[PATH_MAX];                                      \
    int inside = below(path, directory, where);                                 \
    if (!(below(target, directory2, where2) | inside)) return REAL(name) arguments; \
    struct call call = {#name, path, target, NOTHING};                          \
    return RUN(call, kind, REAL(name) arguments);                               \
  }

int rename(const char *name, const char *other)
AROUND_TWO(rename, RENAMES, (name, other), AT_FDCWD, name, AT_FDCWD, other)

int renameat(int directory, const char *name, int directory2, const char *other)
AROUND_TWO(renameat, RENAMES, (directory, name, directory2, other), directory, name, directory2, other)

int renameat2(int directory, const char *name, int directory2, const char *other, unsigned flags)
AROUND_TWO(renameat2, RENAMES, (directory, name, directory2, other, flags), directory, name, directory2, other)

int link(const char *name, const char *other)
AROUND_TWO(link, CREATES, (name, other), AT_FDCWD, name, AT_FDCWD, other)

int linkat(int directory, const char *name, int directory2, const char *other, int flags)
AROUND_TWO(linkat, CREATES, (directory, name, directory2, other, flags), directory, name, directory2, other)

// An open counts if it may make a file ("create" if it does, else "open") or empties one ("truncate").
static const char *opening(const char *path, int flags) {
  struct stat there;
  if (lstat(path, &there)) return "create";
  return flags & O_TRUNC ? "truncate" : "open";
}

#define AROUND_OPEN(name, arguments, directory)                                     \
  {                                                                                 \
    mode_t mode = 0;                                                                \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                      \
      va_list list;                                                                 \
      va_start(list, flags);                                                        \
      mode = va_arg(list, mode_t);                                                  \
      va_end(list);                                                                 \
    }                                                                               \
    char path[PATH_MAX];                                                            \
    if (!(flags & (O_CREAT | O_TRUNC)) || !below(path, directory, where)) return REAL(name) arguments; \
    struct call call = {opening(path, flags), path, NULL, NOTHING};                 \
    return RUN(call, CREATES, REAL(name) arguments);                                \
  }

int open(const char *where, int flags, ...) AROUND_OPEN(open, (where, flags, mode), AT_FDCWD)

int open64(const char *where, int flags, ...) AROUND_OPEN(open64, (where, flags, mode), AT_FDCWD)

int openat(int directory, const char *where, int flags, ...)
AROUND_OPEN(openat, (directory, where, flags, mode), directory)

int openat64(int directory, const char *where, int flags, ...)
AROUND_OPEN(openat64, (directory, where, flags, mode), directory)

int creat(const char *name, mode_t mode) { return open(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int creat64(const char *name, mode_t mode) { return open(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
