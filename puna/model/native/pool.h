// Threads that wait for work by spinning, and barriers between the phases of a step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <vector>

namespace puna {

// Tells the processor that this is a waiting loop.
void pause_briefly();

// All threads of a step meet here. Waiting spins for a while, then yields: a thread that lost its core comes back.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait();

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
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
  alignas(64) std::atomic<int> running_{0};
};

}  // namespace puna
