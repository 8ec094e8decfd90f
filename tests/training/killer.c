/* Kills the process at the n-th call that changes a folder: LD_PRELOAD, then arm(folder, n). A write
   is cut in half first. Counts calls of the C library, so those of Python and of TensorStore. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long left = -1;
static unsigned char inside[1 << 16]; /* descriptors of files and folders below */

void arm(const char *path, long n) {
  strncpy(folder, path, sizeof folder - 1);
  __atomic_store_n(&left, n, __ATOMIC_SEQ_CST);
}

long remaining(void) { return __atomic_load_n(&left, __ATOMIC_SEQ_CST); }

static int below(int at, const char *path) {
  if (!folder[0]) return 0;
  if (path[0] == '/') return !strncmp(path, folder, strlen(folder));
  return at >= 0 && at < 1 << 16 && inside[at];
}

static int mine(int fd) { return folder[0] && fd >= 0 && fd < 1 << 16 && inside[fd]; }

/* Whether this call is the last one. */
static int counted(void) {
  if (__atomic_load_n(&left, __ATOMIC_SEQ_CST) < 0) return 0;
  return __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST) < 0;
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

#define REAL(result, name, ...)                        \
  static result (*real)(__VA_ARGS__);                  \
  if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int opened(int fd, int is) {
  if (fd >= 0 && fd < 1 << 16) inside[fd] = is;
  return fd;
}

#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    REAL(int, name, const char *, int, ...);                                   \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    int is = below(-1, path);                                                  \
    if (is && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && counted()) die();     \
    return opened(real(path, flags, mode), is);                                \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                           \
  int name(int at, const char *path, int flags, ...) {                         \
    REAL(int, name, int, const char *, int, ...);                              \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    int is = below(at, path);                                                  \
    if (is && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && counted()) die();     \
    return opened(real(at, path, flags, mode), is);                            \
  }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
  REAL(int, close, int);
  if (fd >= 0 && fd < 1 << 16) inside[fd] = 0;
  return real(fd);
}

ssize_t write(int fd, const void *data, size_t n) {
  REAL(ssize_t, write, int, const void *, size_t);
  if (mine(fd) && counted()) { real(fd, data, n / 2); die(); }
  return real(fd, data, n);
}

#define PWRITE(name)                                                           \
  ssize_t name(int fd, const void *data, size_t n, off_t at) {                 \
    REAL(ssize_t, name, int, const void *, size_t, off_t);                     \
    if (mine(fd) && counted()) { real(fd, data, n / 2, at); die(); }           \
    return real(fd, data, n, at);                                              \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

#define OF_FD(name)                                                            \
  int name(int fd) {                                                           \
    REAL(int, name, int);                                                      \
    if (mine(fd) && counted()) die();                                          \
    return real(fd);                                                           \
  }
OF_FD(fsync)
OF_FD(fdatasync)

int ftruncate(int fd, off_t size) {
  REAL(int, ftruncate, int, off_t);
  if (mine(fd) && counted()) die();
  return real(fd, size);
}

int rename(const char *from, const char *to) {
  REAL(int, rename, const char *, const char *);
  if (below(-1, to) && counted()) die();
  return real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
  REAL(int, renameat, int, const char *, int, const char *);
  if (below(b, to) && counted()) die();
  return real(a, from, b, to);
}

#define OF_PATH(name)                                                          \
  int name(const char *path) {                                                 \
    REAL(int, name, const char *);                                             \
    if (below(-1, path) && counted()) die();                                   \
    return real(path);                                                         \
  }
OF_PATH(unlink)
OF_PATH(rmdir)

int unlinkat(int at, const char *path, int flags) {
  REAL(int, unlinkat, int, const char *, int);
  if (below(at, path) && counted()) die();
  return real(at, path, flags);
}

int mkdir(const char *path, mode_t mode) {
  REAL(int, mkdir, const char *, mode_t);
  if (below(-1, path) && counted()) die();
  return real(path, mode);
}
