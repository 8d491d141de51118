/* Faults in the calls of a process, preloaded into it and switched by another one.
 *
 * SHIM_CONTROL names a file that all processes map; `Shim` in __init__.py writes it and knows the
 * same layout. Only calls on paths below SHIM_BELOW are touched, except for the wall clock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum call { WRITE, READ, FSYNC, FSYNC_DIRECTORY, RENAME, FALLOCATE, TRUNCATE, OPEN, MKDIR, UNLINK,
            CALLS };
enum action { NOTHING, FAIL, LOSE, SHORT, DELAY, KILL };

struct rule {
    int32_t action;
    int32_t error;     /* errno; for DELAY milliseconds */
    int32_t skip;      /* calls that pass before the first one that is hit */
    int32_t times;     /* hits that are left; negative: for ever */
    int32_t per_mille; /* of the calls that could be hit */
    uint32_t seed;
    int64_t calls;     /* that matched `where`, hit or not */
    int64_t hits;
    char where[88];    /* part of the path; empty: any */
};

static struct control {
    int64_t clock_ns; /* added to the wall clock */
    struct rule rules[CALLS];
} *control;
static const char *below;
static size_t below_size;

__attribute__((constructor)) static void load(void)
{
    const char *path = getenv("SHIM_CONTROL");
    below = getenv("SHIM_BELOW");
    if (!path || !below)
        return;
    below_size = strlen(below);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        abort();
    struct control *mapped =
        mmap(NULL, sizeof *mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED)
        abort();
    control = mapped;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int chance(struct rule *rule)
{
    if (rule->per_mille >= 1000)
        return 1;
    uint32_t x = __atomic_fetch_add(&rule->seed, 0x9e3779b9u, __ATOMIC_RELAXED);
    x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
    return x % 1000 < (uint32_t)rule->per_mille;
}

/* Takes one from a counter that several processes share, unless it has reached 0. */
static int take(int32_t *counter)
{
    int32_t left = __atomic_load_n(counter, __ATOMIC_SEQ_CST);
    while (left > 0)
        if (__atomic_compare_exchange_n(counter, &left, left - 1, 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST))
            return 1;
    return 0;
}

/* The rule that hits this call on `path`, or NULL. A delay and a kill happen here. */
static struct rule *hit(enum call call, const char *path)
{
    if (!control || strncmp(path, below, below_size) ||
        (path[below_size] && path[below_size] != '/'))
        return NULL;
    struct rule *rule = &control->rules[call];
    if (!strstr(path + below_size, rule->where))
        return NULL;
    __atomic_fetch_add(&rule->calls, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&rule->action, __ATOMIC_SEQ_CST) == NOTHING || !chance(rule) ||
        take(&rule->skip))
        return NULL;
    if (rule->times >= 0 && !take(&rule->times))
        return NULL;
    __atomic_fetch_add(&rule->hits, 1, __ATOMIC_SEQ_CST);
    if (rule->action == KILL)
        kill(getpid(), SIGKILL);
    if (rule->action == DELAY)
        usleep((useconds_t)rule->error * 1000);
    return rule->action == DELAY ? NULL : rule;
}

static const char *path_of(int fd, char *path)
{
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    path[size < 0 ? 0 : size] = 0;
    return path;
}

static const char *path_at(int directory, const char *name, char *path)
{
    if (name[0] == '/')
        return name;
    if (directory == AT_FDCWD ? !getcwd(path, PATH_MAX) : !*path_of(directory, path))
        return "";
    size_t size = strlen(path);
    snprintf(path + size, PATH_MAX - size, "/%s", name);
    return path;
}

static struct rule *hit_fd(enum call call, int fd)
{
    char path[PATH_MAX];
    return control ? hit(call, path_of(fd, path)) : NULL;
}

static struct rule *hit_at(enum call call, int directory, const char *name)
{
    char path[PATH_MAX];
    return control ? hit(call, path_at(directory, name, path)) : NULL;
}

#define FAIL_WITH(rule) return errno = (rule)->error, -1

/* ---- bytes */

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    REAL(pwrite64);
    struct rule *rule = hit_fd(WRITE, fd);
    if (rule && rule->action == SHORT)
        size = size > 1 ? size / 2 : size;
    else if (rule)
        FAIL_WITH(rule);
    return real(fd, data, size, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    return pwrite64(fd, data, size, offset);
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset)
{
    REAL(pread64);
    struct rule *rule = hit_fd(READ, fd);
    if (rule && rule->action == SHORT)
        size = size > 1 ? size / 2 : size;
    else if (rule)
        FAIL_WITH(rule);
    return real(fd, data, size, offset);
}

ssize_t pread(int fd, void *data, size_t size, off_t offset)
{
    return pread64(fd, data, size, offset);
}

static int sync_fails(int fd)
{
    struct stat found;
    if (!control || fstat(fd, &found))
        return 0;
    struct rule *rule = hit_fd(S_ISDIR(found.st_mode) ? FSYNC_DIRECTORY : FSYNC, fd);
    if (!rule)
        return 0;
    if (rule->action == LOSE && S_ISREG(found.st_mode)) {
        /* As Linux does: the page that could not be written counts as clean, and is dropped. */
        static const char nothing[4096];
        size_t size = found.st_size < 4096 ? (size_t)found.st_size : 4096;
        REAL(pwrite64);
        if (real(fd, nothing, size, 0) < 0)
            abort();
    }
    errno = rule->error;
    return 1;
}

int fsync(int fd)
{
    REAL(fsync);
    return sync_fails(fd) ? -1 : real(fd);
}

int fdatasync(int fd)
{
    REAL(fdatasync);
    return sync_fails(fd) ? -1 : real(fd);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size)
{
    REAL(posix_fallocate64);
    struct rule *rule = hit_fd(FALLOCATE, fd);
    return rule ? rule->error : real(fd, offset, size);
}

int posix_fallocate(int fd, off_t offset, off_t size)
{
    return posix_fallocate64(fd, offset, size);
}

int ftruncate64(int fd, off64_t size)
{
    REAL(ftruncate64);
    struct rule *rule = hit_fd(TRUNCATE, fd);
    if (rule)
        FAIL_WITH(rule);
    return real(fd, size);
}

int ftruncate(int fd, off_t size)
{
    return ftruncate64(fd, size);
}

/* ---- names */

int renameat(int from_directory, const char *from, int directory, const char *name)
{
    REAL(renameat);
    struct rule *rule = hit_at(RENAME, directory, name);
    if (rule)
        FAIL_WITH(rule);
    return real(from_directory, from, directory, name);
}

int rename(const char *from, const char *name)
{
    return renameat(AT_FDCWD, from, AT_FDCWD, name);
}

static mode_t mode_of(int flags, va_list more)
{
    return flags & O_CREAT ? va_arg(more, mode_t) : 0;
}

int openat64(int directory, const char *name, int flags, ...)
{
    REAL(openat64);
    va_list more;
    va_start(more, flags);
    mode_t mode = mode_of(flags, more);
    va_end(more);
    struct rule *rule = hit_at(OPEN, directory, name);
    if (rule)
        FAIL_WITH(rule);
    return real(directory, name, flags, mode);
}

int openat(int directory, const char *name, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = mode_of(flags, more);
    va_end(more);
    return openat64(directory, name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = mode_of(flags, more);
    va_end(more);
    return openat64(AT_FDCWD, name, flags, mode);
}

int open(const char *name, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = mode_of(flags, more);
    va_end(more);
    return openat64(AT_FDCWD, name, flags, mode);
}

int mkdirat(int directory, const char *name, mode_t mode)
{
    REAL(mkdirat);
    struct rule *rule = hit_at(MKDIR, directory, name);
    if (rule)
        FAIL_WITH(rule);
    return real(directory, name, mode);
}

int mkdir(const char *name, mode_t mode)
{
    return mkdirat(AT_FDCWD, name, mode);
}

int unlinkat(int directory, const char *name, int flags)
{
    REAL(unlinkat);
    struct rule *rule = hit_at(UNLINK, directory, name);
    if (rule)
        FAIL_WITH(rule);
    return real(directory, name, flags);
}

int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}

/* ---- the wall clock */

static void step(struct timespec *moment)
{
    int64_t by = control ? __atomic_load_n(&control->clock_ns, __ATOMIC_SEQ_CST) : 0;
    int64_t ns = moment->tv_nsec + by % 1000000000;
    moment->tv_sec += by / 1000000000 + (ns < 0 ? -1 : ns / 1000000000);
    moment->tv_nsec = ns < 0 ? ns + 1000000000 : ns % 1000000000;
}

int clock_gettime(clockid_t clock, struct timespec *moment)
{
    REAL(clock_gettime);
    int failed = real(clock, moment);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        step(moment);
    return failed;
}

int gettimeofday(struct timeval *restrict moment, void *restrict zone)
{
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *moment = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *moment)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (moment)
        *moment = now.tv_sec;
    return now.tv_sec;
}

/* "Now" as a file's time is the kernel's own. */
int futimens(int fd, const struct timespec times[2])
{
    REAL(futimens);
    struct timespec now[2];
    clock_gettime(CLOCK_REALTIME, &now[0]);
    now[1] = now[0];
    return real(fd, times || !control ? times : now);
}
