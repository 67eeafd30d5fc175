#include "pool.h"

#include <unistd.h>

#include <chrono>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace puna {
namespace {

// Waking a thread costs some fifty microseconds. Threads that gave up sooner would keep each other sleepy: each wakes
// too late for the next.
constexpr auto at_barriers = std::chrono::microseconds(400);
constexpr auto between_steps = std::chrono::milliseconds(1);
constexpr int pauses = 64;  // between looks at the clock

// Whether `done` came true within `patience`.
template <class Done>
bool spin(std::chrono::nanoseconds patience, Done done) {
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < pauses; i++) {
      if (done()) return true;
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void Barrier::wait() {
  if (threads_ == 1) return;
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1);
    if (asleep_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(door_);
    bell_.notify_all();
    return;
  }
  if (spin(at_barriers, [&] { return round_.load(std::memory_order_acquire) != round; })) return;
  std::unique_lock<std::mutex> lock(door_);
  asleep_.fetch_add(1);
  bell_.wait(lock, [&] { return round_.load() != round; });
  asleep_.fetch_sub(1);
}

struct Pool::Worker {
  int thread;
  void (*work)(void*, int) = nullptr;
  void* argument = nullptr;
  Barrier* end = nullptr;
  alignas(64) std::atomic<unsigned> ticket{0};  // changes when there is work; each worker has its own
  std::atomic<bool> asleep{false};
  std::mutex door;
  std::condition_variable bell;

  void wait_for_change(unsigned seen) {
    if (spin(between_steps, [&] { return ticket.load(std::memory_order_acquire) != seen; })) return;
    std::unique_lock<std::mutex> lock(door);
    asleep.store(true);
    bell.wait(lock, [&] { return ticket.load() != seen; });
    asleep.store(false);
  }
};

// The pool is never destroyed: its threads may still wait in it while the process ends. A forked child has none
// of its parent's threads and makes a pool of its own.
Pool& Pool::shared() {
  static std::mutex lock;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> guard(lock);
  if (pool == nullptr || owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

void Pool::serve(Worker* worker) {
  unsigned seen = 0;
  for (;;) {
    worker->wait_for_change(seen);
    seen = worker->ticket.load(std::memory_order_acquire);
    worker->work(worker->argument, worker->thread);
    worker->end->wait();
  }
}

void Pool::start_workers(int count) {
  while (static_cast<int>(workers_.size()) < count) {
    Worker* worker = new Worker;
    worker->thread = static_cast<int>(workers_.size()) + 1;
    std::thread(serve, worker).detach();
    workers_.push_back(worker);
  }
}

void Pool::run(int threads, void (*work)(void*, int), void* argument) {
  const std::lock_guard<std::mutex> guard(turn_);
  start_workers(threads - 1);
  Barrier& end = ends_.try_emplace(threads, threads).first->second;
  for (int i = 0; i < threads - 1; i++) {
    Worker& worker = *workers_[i];
    worker.work = work;
    worker.argument = argument;
    worker.end = &end;
    worker.ticket.fetch_add(1);
    if (worker.asleep.load()) {
      const std::lock_guard<std::mutex> door(worker.door);
      worker.bell.notify_one();
    }
  }
  work(argument, 0);
  end.wait();
}

}  // namespace puna
