/* A shim between a process and the system, loaded by LD_PRELOAD: it counts the calls that change files below one directory,
 * records them, and lets one of them, or all reads there, go wrong. `shim.py` says how it is asked; it does nothing until then. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { NOTHING, KILL, TORN, FAIL, SHORT, SIGNAL, FAIL_READ, SHORT_READ };
enum op { CREATE = 'c', WRITE = 'w', EXTEND = 'e', TRUNCATE = 't', SYNC = 's', RENAME = 'r', UNLINK = 'u', MKDIR = 'm', READ = 'R', FAILED = 'x' };

static char under[PATH_MAX];
static size_t under_length;
static int mode, number, record = -1;
static long at, count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Begin to watch: `m` happens at the `a`-th call below a directory; `n` is an errno or a signal; records go to a file. */
void shim_arm(const char *directory, int m, long a, int n, const char *file) {
  snprintf(under, sizeof under, "%s", directory);
  mode = m, at = a, number = n, count = 0;
  if (*file) record = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  under_length = strlen(under);
}

/* A process that is started as a user starts it is asked by its environment. */
__attribute__((constructor)) static void from_environment(void) {
  const char *ask = getenv("SHIM");
  int m, n, used = 0;
  long a;
  if (ask && sscanf(ask, "%d %ld %d %n", &m, &a, &n, &used) == 3) shim_arm(ask + used, m, a, n, "");
}

static int is_below(const char *path) {
  return under_length && !strncmp(path, under, under_length) && (path[under_length] == '/' || !path[under_length]);
}

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return is_below(path) && !strstr(path, " (deleted)");
}

static void put(const void *data, size_t length) {
  for (const char *p = data; length;) {
    ssize_t n = syscall(SYS_write, record, p, length);
    if (n <= 0) abort();
    p += n, length -= (size_t)n;
  }
}

static void note(char op, const char *path, const char *to, uint64_t offset, const void *data, uint64_t length) {
  if (record < 0) return;
  uint32_t lengths[2] = {(uint32_t)strlen(path), (uint32_t)strlen(to)};
  uint64_t numbers[2] = {offset, length};
  put(&op, 1), put(lengths, sizeof lengths), put(numbers, sizeof numbers), put(path, lengths[0]), put(to, lengths[1]);
  if (data) put(data, length);
}

/* The next call: whether it is to fail; a kill does not come back. */
static int fails(void) {
  int here = ++count == at;
  if (here && mode == KILL) raise(SIGKILL);
  if (here && mode == SIGNAL) kill(getpid(), number), usleep(100000);
  if (here && mode == FAIL) return errno = number, 1;
  return 0;
}

#define REAL(name) ((__typeof__(&name))real_##name())
#define FIND(name) \
  static void *real_##name(void) { \
    static void *found; \
    return found ? found : (found = dlsym(RTLD_NEXT, #name)); \
  }
FIND(write) FIND(pwrite) FIND(writev) FIND(pwritev) FIND(read) FIND(pread) FIND(preadv2) FIND(fsync) FIND(fdatasync)
FIND(rename) FIND(unlink) FIND(mkdir) FIND(ftruncate) FIND(posix_fallocate) FIND(copy_file_range) FIND(openat)

/* Bytes that a watched write hands on: all, or half of them; half and the end of the process if it is to be torn. */
static size_t share(size_t n) {
  if (mode == TORN && count == at) return n / 2;
  return mode == SHORT && n > 1 ? n / 2 : n;
}

static ssize_t written(ssize_t done, const char *path, off_t offset, const void *data) {
  int kept = errno;
  note(done < 0 ? FAILED : WRITE, path, "", (uint64_t)offset, data, done < 0 ? 0 : (uint64_t)done);
  if (mode == TORN && count == at) raise(SIGKILL);
  errno = kept;
  return done;
}

ssize_t write(int fd, const void *data, size_t n) {
  char path[PATH_MAX];
  if (!under_length || !path_of(fd, path)) return REAL(write)(fd, data, n);
  pthread_mutex_lock(&lock);
  off_t offset = lseek(fd, 0, SEEK_CUR);
  ssize_t done = fails() ? -1 : written(REAL(write)(fd, data, share(n)), path, offset, data);
  pthread_mutex_unlock(&lock);
  return done;
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) {
  char path[PATH_MAX];
  if (!under_length || !path_of(fd, path)) return REAL(pwrite)(fd, data, n, offset);
  pthread_mutex_lock(&lock);
  ssize_t done = fails() ? -1 : written(REAL(pwrite)(fd, data, share(n), offset), path, offset, data);
  pthread_mutex_unlock(&lock);
  return done;
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t offset) __attribute__((alias("pwrite")));

/* Of several pieces the first is written: a short write, which callers must expect. */
ssize_t writev(int fd, const struct iovec *v, int n) {
  char path[PATH_MAX];
  if (!under_length || !path_of(fd, path)) return REAL(writev)(fd, v, n);
  return n ? write(fd, v[0].iov_base, v[0].iov_len) : 0;
}

ssize_t pwritev(int fd, const struct iovec *v, int n, off_t offset) {
  char path[PATH_MAX];
  if (!under_length || !path_of(fd, path)) return REAL(pwritev)(fd, v, n, offset);
  return n ? pwrite(fd, v[0].iov_base, v[0].iov_len, offset) : 0;
}
ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t offset) __attribute__((alias("pwritev")));

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t n, unsigned flags) {
  char path[PATH_MAX], link[64];
  if (!under_length || !path_of(out, path)) return REAL(copy_file_range)(in, from, out, to, n, flags);
  pthread_mutex_lock(&lock);
  off_t offset = to ? *to : lseek(out, 0, SEEK_CUR);
  ssize_t done = -1;
  if (!fails()) {
    done = REAL(copy_file_range)(in, from, out, to, share(n), flags);
    char *data = done > 0 && record >= 0 ? malloc((size_t)done) : NULL;
    if (data) { /* what has arrived, read back */
      snprintf(link, sizeof link, "/proc/self/fd/%d", out);
      int again = (int)syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
      if (REAL(pread)(again, data, (size_t)done, offset) != done) abort();
      close(again);
    }
    done = written(done, path, offset, data);
    free(data);
  }
  pthread_mutex_unlock(&lock);
  return done;
}

static int watched(int fd, char op, uint64_t length, int (*call)(int, off_t, off_t), off_t a, off_t b) {
  char path[PATH_MAX];
  if (!under_length || !path_of(fd, path)) return call(fd, a, b);
  pthread_mutex_lock(&lock);
  int result = fails() ? -1 : call(fd, a, b), kept = errno;
  note(result ? FAILED : op, path, "", 0, NULL, length);
  pthread_mutex_unlock(&lock);
  errno = kept;
  return result;
}

static int call_fsync(int fd, off_t a, off_t b) { return (void)a, (void)b, REAL(fsync)(fd); }
static int call_fdatasync(int fd, off_t a, off_t b) { return (void)a, (void)b, REAL(fdatasync)(fd); }
static int call_ftruncate(int fd, off_t a, off_t b) { return (void)b, REAL(ftruncate)(fd, a); }
static int call_allocate(int fd, off_t a, off_t b) {
  int e = REAL(posix_fallocate)(fd, a, b);
  return e ? errno = e, -1 : 0;
}
int fsync(int fd) { return watched(fd, SYNC, 0, call_fsync, 0, 0); }
int fdatasync(int fd) { return watched(fd, SYNC, 0, call_fdatasync, 0, 0); }
int ftruncate(int fd, off_t n) { return watched(fd, TRUNCATE, (uint64_t)n, call_ftruncate, n, 0); }
int ftruncate64(int fd, off_t n) __attribute__((alias("ftruncate")));
int posix_fallocate(int fd, off_t a, off_t n) {
  return watched(fd, EXTEND, (uint64_t)(a + n), call_allocate, a, n) ? errno : 0;
}
int posix_fallocate64(int fd, off_t a, off_t n) __attribute__((alias("posix_fallocate")));

int rename(const char *from, const char *to) {
  if (!is_below(from) && !is_below(to)) return REAL(rename)(from, to);
  pthread_mutex_lock(&lock);
  int result = fails() ? -1 : REAL(rename)(from, to), kept = errno;
  note(result ? FAILED : RENAME, from, to, 0, NULL, 0);
  pthread_mutex_unlock(&lock);
  errno = kept;
  return result;
}

int unlink(const char *path) {
  if (!is_below(path)) return REAL(unlink)(path);
  pthread_mutex_lock(&lock);
  int result = fails() ? -1 : REAL(unlink)(path), kept = errno;
  note(result ? FAILED : UNLINK, path, "", 0, NULL, 0);
  pthread_mutex_unlock(&lock);
  errno = kept;
  return result;
}

int mkdir(const char *path, mode_t m) {
  if (!is_below(path)) return REAL(mkdir)(path, m);
  pthread_mutex_lock(&lock);
  int result = fails() ? -1 : REAL(mkdir)(path, m), kept = errno;
  note(result ? FAILED : MKDIR, path, "", 0, NULL, 0);
  pthread_mutex_unlock(&lock);
  errno = kept;
  return result;
}

static int opened(int directory, const char *path, int flags, mode_t m) {
  if (!(flags & O_CREAT) || !is_below(path)) return REAL(openat)(directory, path, flags, m);
  pthread_mutex_lock(&lock);
  struct stat st;
  int there = !lstat(path, &st), fd = -1;
  if (there && !(flags & O_TRUNC)) { /* changes nothing */
    fd = REAL(openat)(directory, path, flags, m);
  } else if (!fails()) {
    fd = REAL(openat)(directory, path, flags, m);
    note(fd < 0 ? FAILED : there ? TRUNCATE : CREATE, path, "", 0, NULL, 0);
  }
  int kept = errno;
  pthread_mutex_unlock(&lock);
  errno = kept;
  return fd;
}

#define MODE(last) \
  mode_t m = 0; \
  if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list more; \
    va_start(more, last); \
    m = va_arg(more, mode_t); \
    va_end(more); \
  }
int open(const char *path, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, path, flags, m);
}
int open64(const char *path, int flags, ...) __attribute__((alias("open")));
int openat(int directory, const char *path, int flags, ...) {
  MODE(flags)
  return opened(directory, path, flags, m);
}
int openat64(int directory, const char *path, int flags, ...) __attribute__((alias("openat")));

/* Reads below the directory: the n-th fails, or all of them bring half. */
static int read_fails(int fd, size_t *n) {
  char path[PATH_MAX];
  if (mode < FAIL_READ || !path_of(fd, path)) return 0;
  if (mode == SHORT_READ && *n > 1) *n /= 2;
  pthread_mutex_lock(&lock);
  int here = ++count == at && mode == FAIL_READ;
  note(READ, path, "", 0, NULL, 0);
  pthread_mutex_unlock(&lock);
  if (here) errno = number;
  return here;
}

ssize_t read(int fd, void *data, size_t n) { return read_fails(fd, &n) ? -1 : REAL(read)(fd, data, n); }
ssize_t pread(int fd, void *data, size_t n, off_t offset) { return read_fails(fd, &n) ? -1 : REAL(pread)(fd, data, n, offset); }
ssize_t pread64(int fd, void *data, size_t n, off_t offset) __attribute__((alias("pread")));
ssize_t preadv2(int fd, const struct iovec *v, int count_, off_t offset, int flags) {
  if (mode < FAIL_READ || count_ < 1) return REAL(preadv2)(fd, v, count_, offset, flags);
  struct iovec first = v[0];
  return read_fails(fd, &first.iov_len) ? -1 : REAL(preadv2)(fd, &first, 1, offset, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off_t offset, int flags) __attribute__((alias("preadv2")));
ssize_t preadv(int fd, const struct iovec *v, int n, off_t offset) { return preadv2(fd, v, n, offset, 0); }
ssize_t preadv64(int fd, const struct iovec *v, int n, off_t offset) __attribute__((alias("preadv")));
