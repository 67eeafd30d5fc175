// Threads that wait for work by spinning, and barriers between the phases of a step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <vector>

namespace puna {

// Tells the processor that this is a waiting loop.
void pause_briefly();

// All threads of a step meet here. Waiting spins for as long as threads that run are apart, then sleeps: where cores are
// shared with others, a thread that sleeps leaves its core to the one that is late, and is woken ahead of them.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  std::atomic<int> asleep_{0};
  std::mutex door_;
  std::condition_variable bell_;
};

// One pool for the process: two pools that spin would take each other's cores.
class Pool {
 public:
  static Pool& shared();

  // Runs work(argument, thread) for thread 0 (the caller's own) to threads - 1 and returns when all are done.
  // Callers from several threads take turns.
  void run(int threads, void (*work)(void*, int), void* argument);

 private:
  struct Worker;
  void start_workers(int count);
  static void serve(Worker* worker);

  std::mutex turn_;
  std::vector<Worker*> workers_;
  std::map<int, Barrier> ends_;  // where so many threads meet after their work; they outlive it
};

}  // namespace puna
