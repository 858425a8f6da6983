// What if the wall clock jumps while a program runs? In each odd second of the machine's time it is a day ahead.
//
// Preloaded into the processes of scripts/probes/hosts.py (cc -shared -fPIC). The monotonic clock is left alone, as it is
// where somebody sets the time.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static time_t ahead(void) {
  struct timespec now;
  REAL(clock_gettime)(CLOCK_MONOTONIC, &now);
  return now.tv_sec % 2 ? 24 * 3600 : 0;
}

int clock_gettime(clockid_t clock, struct timespec *found) {
  int result = REAL(clock_gettime)(clock, found);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) found->tv_sec += ahead();
  return result;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
  int result = REAL(gettimeofday)(found, zone);
  if (!result) found->tv_sec += ahead();
  return result;
}

time_t time(time_t *found) {
  time_t now = REAL(time)(NULL) + ahead();
  if (found) *found = now;
  return now;
}
