// Preloaded into a process: SIGKILL at the n-th operation on a file below a directory, before it or, where it writes,
// after half of the bytes. Until `kill_at` is called, nothing is counted.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static long left = -1, seen = 0;
static int in_the_middle = 0;

void kill_at(const char* directory, long number, int middle) {
  strncpy(below, directory, sizeof below - 1);
  left = number;
  seen = 0;
  in_the_middle = middle;
}

long operations(void) { return seen; }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static int counts(int folder, const char* path) {
  char full[2 * PATH_MAX], link[64];
  if (!below[0]) return 0;
  if (path && path[0] == '/') {
    snprintf(full, sizeof full, "%s", path);
  } else {
    char where[PATH_MAX];
    if (folder == AT_FDCWD)
      snprintf(link, sizeof link, "/proc/self/cwd");
    else
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, where, sizeof where - 1);
    if (n < 0) return 0;
    where[n] = 0;
    snprintf(full, sizeof full, "%s%s%s", where, path ? "/" : "", path ? path : "");
  }
  size_t n = strlen(below);
  return !strncmp(full, below, n) && (!full[n] || full[n] == '/');
}

static int now(int folder, const char* path) {
  if (!counts(folder, path)) return 0;
  ++seen;
  return --left == 0;
}

static void before(int folder, const char* path) {
  if (now(folder, path)) die();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags, last)           \
  mode_t mode = 0;                  \
  if ((flags) & (O_CREAT)) {        \
    va_list rest;                   \
    va_start(rest, last);           \
    mode = va_arg(rest, mode_t);    \
    va_end(rest);                   \
  }                                 \
  int writes = ((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT)

int open(const char* path, int flags, ...) {
  MODE(flags, flags);
  if (writes) before(AT_FDCWD, path);
  return REAL(open)(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE(flags, flags);
  if (writes) before(AT_FDCWD, path);
  return REAL(open64)(path, flags, mode);
}
int openat(int folder, const char* path, int flags, ...) {
  MODE(flags, flags);
  if (writes) before(folder, path);
  return REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char* path, int flags, ...) {
  MODE(flags, flags);
  if (writes) before(folder, path);
  return REAL(openat64)(folder, path, flags, mode);
}
ssize_t write(int file, const void* data, size_t bytes) {
  if (now(file, NULL)) {
    if (in_the_middle) REAL(write)(file, data, bytes / 2);
    die();
  }
  return REAL(write)(file, data, bytes);
}
ssize_t writev(int file, const struct iovec* parts, int count) {
  if (now(file, NULL)) {
    if (in_the_middle && count) REAL(write)(file, parts[0].iov_base, parts[0].iov_len / 2);
    die();
  }
  return REAL(writev)(file, parts, count);
}
int rename(const char* from, const char* to) {
  before(AT_FDCWD, to);
  return REAL(rename)(from, to);
}
int unlink(const char* path) {
  before(AT_FDCWD, path);
  return REAL(unlink)(path);
}
int unlinkat(int folder, const char* path, int flags) {
  before(folder, path);
  return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char* path) {
  before(AT_FDCWD, path);
  return REAL(rmdir)(path);
}
int mkdir(const char* path, mode_t mode) {
  before(AT_FDCWD, path);
  return REAL(mkdir)(path, mode);
}
int ftruncate(int file, off_t length) {
  before(file, NULL);
  return REAL(ftruncate)(file, length);
}
int fsync(int file) {
  before(file, NULL);
  return REAL(fsync)(file);
}
