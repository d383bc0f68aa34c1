// Threads that compute kernels together: a team of its own for each call, or one team for all calls of a recorded pass.
//
// Threads of a team wait in `Team::wait` and not at barriers of OpenMP. Where two Python threads of a process have computed,
// libgomp counts more threads than there are cores; its barriers then sleep nearly at once, and a pass of short kernels
// takes twice as long.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

constexpr int SPINS = 4000;  // turns of a wait before the thread sleeps: longer than most kernels take

class Team {
 public:
  int size = 1;
  const void *shared = nullptr;
  std::atomic<int64_t> next{0};  // of `take_each`

  // Returns after all threads of the team have called it.
  void wait() {
    if (size == 1) return next.store(0);
    const uint32_t now = round.load();
    if (arrived.fetch_add(1) + 1 == size) {
      arrived.store(0);
      next.store(0);
      round.store(now + 1);
      if (sleepers.load()) wake();
      return;
    }
    for (int turn = 0; turn < SPINS; turn++) {
      if (round.load(std::memory_order_acquire) != now) return;
      pause();
    }
    sleepers.fetch_add(1);
    while (round.load() == now) sleep(now);
    sleepers.fetch_sub(1);
  }

 private:
  std::atomic<int> arrived{0}, sleepers{0};
  std::atomic<uint32_t> round{0};

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
  }
#ifdef __linux__
  // The kernel compares the word again before the thread sleeps, so that no call of `wake` is missed (futex(2)).
  void sleep(uint32_t now) { syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(uint32_t) { sched_yield(); }
  void wake() {}
#endif
};

// A thread of a team.
struct Member {
  Team &team;
  int number;  // from 0 to team.size - 1

  // The pointer that the first thread passes. The next `shared` must come after a `wait`.
  template <class T>
  T *shared(T *pointer) {
    if (number == 0) team.shared = pointer;
    team.wait();
    return (T *)team.shared;
  }

  // Calls body(i) for this thread's part of 0 ... count - 1, which are equal parts in their order.
  template <class Body>
  void each(int64_t count, const Body &body) const {
    for (int64_t i = count * number / team.size; i < count * (number + 1) / team.size; i++) body(i);
  }

  // Calls body(i) for 0 ... count - 1, each on the thread that is free first. There is a `wait` between two such calls.
  template <class Body>
  void take_each(int64_t count, const Body &body) const {
    for (int64_t i; (i = team.next.fetch_add(1)) < count;) body(i);
  }
};

inline thread_local Member *member = nullptr;  // of this thread, while it runs a recorded pass

// Calls body(Member &) on `threads` threads of a new team.
template <class Body>
inline void in_new_team(int threads, const Body &body) {
  Team team;
  if (threads == 1) {
    Member alone{team, 0};
    body(alone);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    team.size = omp_get_num_threads();
    Member me{team, omp_get_thread_num()};
    body(me);
  }
}

// Calls body(Member &) on the threads of a recorded pass, each of which runs the whole kernel, or else in a new team.
template <class Body>
inline void together(int threads, const Body &body) {
  if (member)
    body(*member);
  else
    in_new_team(threads, body);
}

// Calls body(i) for i from 0 to count - 1, on several threads.
template <class Body>
inline void for_each(int threads, int64_t count, const Body &body) {
  together(count == 1 ? 1 : threads, [&](Member &me) { me.each(count, body); });
}
