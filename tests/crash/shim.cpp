// A library to preload: it numbers every call that changes files below one folder, and records, kills or fails at one.
//
// `crash_watch` arms it in the calling process. Calls are numbered from 1 in each thread; threads in the order of
// their first such call, the arming thread is 0. Calls that change nothing (mkdir of a folder that is there,
// unlink of a file that is not) are not numbered. While a call is made no other thread makes one, so that the
// record has the order of the effects. Ways around `write` (shared mappings, sendfile ...) are not offered on watched
// files; callers fall back to `write`.

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef __THROW
#define __THROW
#endif

namespace {

// Kinds of calls, as the record names them.
enum Kind : char {
  CREATE = 'c', OPEN = 'o', WRITE = 'w', TRUNCATE = 't', SYNC = 's', RENAME = 'r', UNLINK = 'u', MKDIR = 'm', RMDIR = 'd',
  ATTRIBUTES = 'a', OTHER = '?'
};
// What happens at the call that was named. TEAR: half of a write, or the whole of any other call, then the end.
// CORRUPT: a bit of what is written changes on the way to the disk.
enum Action { NOTHING, KILL, TEAR, FAIL, SHORTEN, FAIL_FOR_GOOD, CORRUPT };

struct { char root[PATH_MAX]; size_t length; int log, thread; long call; int action, error; } plan;
pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
bool armed, broken;
int num_threads;
thread_local int thread_number = -1;
thread_local long num_calls;
thread_local bool corrupting;

struct Place {  // an absolute path, and whether it lies below the watched folder
  char path[PATH_MAX];
  bool watched = false;

  Place(int folder, const char* name) {
    if (!armed || !name) return;
    if (name[0] == '/') {
      snprintf(path, sizeof path, "%s", name);
    } else {
      char link[64], base[PATH_MAX];
      snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
      ssize_t size = readlink(link, base, sizeof base - 1);
      if (size < 0) return;
      base[size] = 0;
      if (snprintf(path, sizeof path, "%s/%s", base, name) >= (int)sizeof path) return;
    }
    judge();
  }

  explicit Place(int descriptor) {
    if (!armed) return;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return;
    path[size] = 0;
    judge();
  }

  void judge() { watched = !strncmp(path, plan.root, plan.length) && (path[plan.length] == '/' || !path[plan.length]); }
};

ino_t number_of(const char* path) {
  struct stat found;
  return lstat(path, &found) ? 0 : found.st_ino;
}

[[noreturn]] void die() {
  syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  for (;;) pause();
}

struct Call {
  Kind kind;
  const char* path;
  const char* target = "";
  ino_t file = 0;
  off_t offset = 0;
  const void* data = nullptr;
  size_t size = 0;
};

// An `error` that lasts: does it hit this kind? A full disk still syncs, renames and removes; a read-only one changes nothing.
bool lasts_for(Kind kind, int error) {
  if (error == EROFS) return kind != SYNC;
  if (error == ENOSPC || error == EDQUOT) return kind == WRITE || kind == CREATE || kind == MKDIR;
  return true;
}

// Every watched call goes through here; `real(size)` makes it (`size` is less than asked for a torn write).
template <class Real>
long make(Call call, Real real) {
  pthread_mutex_lock(&one_at_a_time);
  if (thread_number < 0) thread_number = num_threads++;
  long result = -1;
  bool named = ++num_calls == plan.call && thread_number == plan.thread;
  int action = named ? plan.action : NOTHING;
  if (action == KILL) die();
  if (action == TEAR) {
    if (call.kind != WRITE || call.size > 1) real(call.size / 2);
    die();
  }
  if (action == FAIL_FOR_GOOD) broken = true;
  if (action == FAIL || action == FAIL_FOR_GOOD || (broken && lasts_for(call.kind, plan.error))) {
    errno = plan.error;
  } else {
    if (action == SHORTEN && call.size > 1) call.size /= 2;
    corrupting = action == CORRUPT;
    result = real(call.size);
    corrupting = false;
    if (result >= 0 && plan.log >= 0) {
      if (call.kind == WRITE) call.size = result;
      if (!call.file) call.file = number_of(*call.target ? call.target : call.path);
      char line[2 * PATH_MAX + 128];
      int length = snprintf(line, sizeof line, "%c\t%d\t%ld\t%lu\t%ld\t%zu\t%s\t%s\n", call.kind, thread_number, num_calls,
                            (unsigned long)call.file, (long)call.offset, call.kind == WRITE ? call.size : 0, call.path,
                            call.target);
      struct iovec parts[] = {{line, (size_t)length}, {(void*)call.data, call.kind == WRITE ? call.size : 0}};
      syscall(SYS_writev, plan.log, parts, 2);
    }
  }
  int kept = errno;
  pthread_mutex_unlock(&one_at_a_time);
  errno = kept;
  return result;
}

long open_at(int folder, const char* name, int flags, mode_t mode) {
  auto real = [&](size_t) { return syscall(SYS_openat, folder, name, flags, mode); };
  Place place(folder, name);
  if (!place.watched || (flags & O_ACCMODE) == O_RDONLY || (flags & O_PATH)) return real(0);
  ino_t there = number_of(place.path);
  if (!there) return flags & O_CREAT ? make({CREATE, place.path}, real) : real(0);
  if (flags & O_EXCL) return real(0);
  return make({flags & O_TRUNC ? TRUNCATE : OPEN, place.path, "", there}, real);
}

long write_to(int descriptor, const void* data, size_t size, off_t offset, bool positioned) {
  auto real = [&](size_t most) {
    char* changed = corrupting && most ? (char*)memcpy(malloc(most), data, most) : nullptr;
    if (changed) changed[most / 2] ^= 4;
    const void* sent = changed ? changed : data;
    long written =
        positioned ? syscall(SYS_pwrite64, descriptor, sent, most, offset) : syscall(SYS_write, descriptor, sent, most);
    int kept = errno;
    free(changed);
    errno = kept;
    return written;
  };
  Place place(descriptor);
  if (!place.watched) return real(size);
  struct stat found;
  fstat(descriptor, &found);
  if (!positioned) {
    int flags = fcntl(descriptor, F_GETFL);
    offset = flags & O_APPEND ? found.st_size : lseek(descriptor, 0, SEEK_CUR);
  }
  return make({WRITE, place.path, "", found.st_ino, offset, data, size}, real);
}

long change(Kind kind, int folder, const char* name, long (*real)(int, const char*, long), long argument) {
  Place place(folder, name);
  auto again = [&](size_t) { return real(folder, name, argument); };
  ino_t there = place.watched ? number_of(place.path) : 0;
  if (!place.watched || (kind == MKDIR) == (there != 0)) return again(0);
  return make({kind, place.path, "", there}, again);
}

long on_descriptor(Kind kind, int descriptor, long number, long first, long second) {
  auto real = [&](size_t) { return syscall(number, descriptor, first, second); };
  Place place(descriptor);
  if (!place.watched) return real(0);
  struct stat found;
  fstat(descriptor, &found);
  return make({kind, place.path, "", found.st_ino, kind == TRUNCATE ? first : 0}, real);
}

long rename_at(int from, const char* old_name, int to, const char* new_name, unsigned flags) {
  auto real = [&](size_t) { return syscall(SYS_renameat2, from, old_name, to, new_name, flags); };
  Place source(from, old_name), target(to, new_name);
  if ((!source.watched && !target.watched) || !number_of(source.path)) return real(0);
  if (flags & ~1u) _exit(99);
  return make({RENAME, source.path, target.path, number_of(source.path)}, real);
}

long unlink_call(int folder, const char* name, long flags) { return syscall(SYS_unlinkat, folder, name, flags); }
long mkdir_call(int folder, const char* name, long mode) { return syscall(SYS_mkdirat, folder, name, mode); }
long chmod_call(int folder, const char* name, long mode) { return syscall(SYS_fchmodat, folder, name, mode); }

mode_t mode_of(int flags, va_list more) { return flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; }

FILE* open_stream(const char* function, const char* name, const char* mode) {
  auto next = (FILE * (*)(const char*, const char*)) dlsym(RTLD_NEXT, function);
  Place place(AT_FDCWD, name);
  if (!place.watched || (*mode == 'r' && !strchr(mode, '+'))) return next(name, mode);
  ino_t there = number_of(place.path);
  FILE* stream = nullptr;
  Kind kind = !there ? CREATE : *mode == 'w' ? TRUNCATE : OPEN;
  make({kind, place.path, "", there}, [&](size_t) { return (stream = next(name, mode)) ? 0L : -1L; });
  return stream;
}

bool refused(int descriptor) {  // for ways to change files that would bypass `write`
  errno = ENOSYS;
  return descriptor >= 0 && Place(descriptor).watched;
}

}  // namespace

extern "C" {

void crash_watch(const char* root, int log, int thread, long call, int action, int error) {
  snprintf(plan.root, sizeof plan.root, "%s", root);
  plan.length = strlen(plan.root);
  plan.log = log, plan.thread = thread, plan.call = call, plan.action = action, plan.error = error;
  armed = true, broken = false;
  thread_number = 0, num_threads = 1, num_calls = 0;
}

#define OPEN_FUNCTION(name)                    \
  int name(const char* path, int flags, ...) { \
    va_list more;                              \
    va_start(more, flags);                     \
    mode_t mode = mode_of(flags, more);        \
    va_end(more);                              \
    return open_at(AT_FDCWD, path, flags, mode); \
  }
#define OPENAT_FUNCTION(name)                               \
  int name(int folder, const char* path, int flags, ...) {  \
    va_list more;                                           \
    va_start(more, flags);                                  \
    mode_t mode = mode_of(flags, more);                     \
    va_end(more);                                           \
    return open_at(folder, path, flags, mode);              \
  }
OPEN_FUNCTION(open)
OPEN_FUNCTION(open64)
OPENAT_FUNCTION(openat)
OPENAT_FUNCTION(openat64)
int creat(const char* path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
FILE* fopen(const char* path, const char* mode) { return open_stream("fopen", path, mode); }
FILE* fopen64(const char* path, const char* mode) { return open_stream("fopen64", path, mode); }

ssize_t write(int descriptor, const void* data, size_t size) { return write_to(descriptor, data, size, 0, false); }
ssize_t pwrite(int descriptor, const void* data, size_t size, off_t offset) {
  return write_to(descriptor, data, size, offset, true);
}
ssize_t pwrite64(int descriptor, const void* data, size_t size, off64_t offset) {
  return write_to(descriptor, data, size, offset, true);
}
ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  Place place(descriptor);
  if (!place.watched) return syscall(SYS_writev, descriptor, parts, count);
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  char* joined = (char*)malloc(size + 1);
  for (size_t i = 0, at = 0; i < (size_t)count; at += parts[i++].iov_len) memcpy(joined + at, parts[i].iov_base, parts[i].iov_len);
  ssize_t written = write_to(descriptor, joined, size, 0, false);
  free(joined);
  return written;
}

int fsync(int descriptor) { return on_descriptor(SYNC, descriptor, SYS_fsync, 0, 0); }
int fdatasync(int descriptor) { return on_descriptor(SYNC, descriptor, SYS_fdatasync, 0, 0); }
int ftruncate(int descriptor, off_t size) __THROW { return on_descriptor(TRUNCATE, descriptor, SYS_ftruncate, size, 0); }
int ftruncate64(int descriptor, off64_t size) __THROW { return on_descriptor(TRUNCATE, descriptor, SYS_ftruncate, size, 0); }
int fchmod(int descriptor, mode_t mode) __THROW { return on_descriptor(ATTRIBUTES, descriptor, SYS_fchmod, mode, 0); }
int chmod(const char* path, mode_t mode) __THROW { return change(ATTRIBUTES, AT_FDCWD, path, chmod_call, mode); }
int fchmodat(int folder, const char* path, mode_t mode, int) __THROW { return change(ATTRIBUTES, folder, path, chmod_call, mode); }

int mkdir(const char* path, mode_t mode) __THROW { return change(MKDIR, AT_FDCWD, path, mkdir_call, mode); }
int mkdirat(int folder, const char* path, mode_t mode) __THROW { return change(MKDIR, folder, path, mkdir_call, mode); }
int unlink(const char* path) __THROW { return change(UNLINK, AT_FDCWD, path, unlink_call, 0); }
int rmdir(const char* path) __THROW { return change(RMDIR, AT_FDCWD, path, unlink_call, AT_REMOVEDIR); }
int unlinkat(int folder, const char* path, int flags) __THROW {
  return change(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, path, unlink_call, flags);
}
int rename(const char* from, const char* to) __THROW { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from, const char* old_name, int to, const char* new_name) __THROW {
  return rename_at(from, old_name, to, new_name, 0);
}
int renameat2(int from, const char* old_name, int to, const char* new_name, unsigned flags) __THROW {
  return rename_at(from, old_name, to, new_name, flags);
}

void* mmap(void* address, size_t size, int protection, int flags, int descriptor, off_t offset) __THROW {
  if (flags & MAP_SHARED && protection & PROT_WRITE && refused(descriptor)) return MAP_FAILED;
  return (void*)syscall(SYS_mmap, address, size, protection, flags, descriptor, offset);
}
void* mmap64(void* address, size_t size, int protection, int flags, int descriptor, off64_t offset) __THROW {
  return mmap(address, size, protection, flags, descriptor, offset);
}
ssize_t sendfile(int to, int from, off_t* offset, size_t size) __THROW {
  return refused(to) ? -1 : syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t* offset, size_t size) __THROW {
  return refused(to) ? -1 : syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t copy_file_range(int from, off64_t* start, int to, off64_t* end, size_t size, unsigned flags) {
  return refused(to) ? -1 : syscall(SYS_copy_file_range, from, start, to, end, size, flags);
}
int posix_fallocate(int descriptor, off_t start, off_t size) {
  return refused(descriptor) ? EOPNOTSUPP : syscall(SYS_fallocate, descriptor, 0, start, size) ? errno : 0;
}

}  // extern "C"
