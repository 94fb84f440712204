/* A wall clock that a test sets, preloaded into the server's process: CLOCK_REALTIME is ahead by
 * the microseconds that the file named by WALL_CONTROL holds, as eight bytes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void begin(void) {
  const char *control = getenv("WALL_CONTROL");
  int file = control ? open(control, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) abort();
  void *page = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
  if (page == MAP_FAILED) abort();
  ahead = page;
  close(file);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  int outcome = syscall(SYS_clock_gettime, clock, time);
  if (outcome == 0 && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
    int64_t micros = time->tv_sec * INT64_C(1000000) + time->tv_nsec / 1000 + *ahead;
    time->tv_sec = micros / 1000000;
    time->tv_nsec = micros % 1000000 * 1000;
  }
  return outcome;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
  struct timespec now;
  (void)zone;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  time->tv_sec = now.tv_sec;
  time->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *out) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
