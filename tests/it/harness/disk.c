/* A disk that a test makes fail, preloaded into the server's process. Files in the directory
 * named by DISK_CONTROL switch faults on while they exist:
 *   hold   syncs wait
 *   eio    syncs fail with EIO
 *   full   writes that would go to files below DISK_DATA fail with ENOSPC
 * Each sync that succeeded appends a byte to `synced`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int on(const char *fault) {
  const char *control = getenv("DISK_CONTROL");
  char path[PATH_MAX];
  if (!control) return 0;
  snprintf(path, sizeof path, "%s/%s", control, fault);
  return syscall(SYS_faccessat, AT_FDCWD, path, F_OK) == 0;
}

/* Whether the descriptor is a file below the data directory. */
static int ours(int fd) {
  const char *data = getenv("DISK_DATA");
  char link[64], path[PATH_MAX];
  ssize_t length;
  if (!data) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strncmp(path, data, strlen(data)) == 0;
}

static int sync_fd(int fd, long call) {
  const char *control = getenv("DISK_CONTROL");
  if (!ours(fd)) return syscall(call, fd);
  while (on("hold")) usleep(2000);
  if (on("eio")) {
    errno = EIO;
    return -1;
  }
  int outcome = syscall(call, fd);
  if (outcome == 0 && control) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/synced", control);
    int count = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (count >= 0) {
      syscall(SYS_write, count, "s", 1);
      syscall(SYS_close, count);
    }
  }
  return outcome;
}

int fdatasync(int fd) { return sync_fd(fd, SYS_fdatasync); }
int fsync(int fd) { return sync_fd(fd, SYS_fsync); }

static int refused(int fd) {
  if (!on("full") || !ours(fd)) return 0;
  errno = ENOSPC;
  return 1;
}

ssize_t write(int fd, const void *from, size_t count) {
  return refused(fd) ? -1 : syscall(SYS_write, fd, from, count);
}
ssize_t pwrite(int fd, const void *from, size_t count, off_t at) {
  return refused(fd) ? -1 : syscall(SYS_pwrite64, fd, from, count, at);
}
ssize_t pwrite64(int fd, const void *from, size_t count, off64_t at) {
  return refused(fd) ? -1 : syscall(SYS_pwrite64, fd, from, count, at);
}
int fallocate(int fd, int mode, off_t at, off_t length) {
  return refused(fd) ? -1 : syscall(SYS_fallocate, fd, mode, at, length);
}
int posix_fallocate(int fd, off_t at, off_t length) {
  if (refused(fd)) return ENOSPC;
  return syscall(SYS_fallocate, fd, 0, at, length) == 0 ? 0 : errno;
}
