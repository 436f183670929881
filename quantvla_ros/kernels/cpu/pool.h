// SPDX-License-Identifier: Apache-2.0
// Persistent threads: they spin for a moment after a job, then sleep. No OpenMP, so that torch's
// runtime and ours never oversubscribe. One job at a time: a second caller waits for its turn.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int SPINS_BEFORE_YIELD = 2000;   // about 50 us: a barrier between busy threads is shorter
constexpr int SPINS_BEFORE_SLEEP = 20000;  // about half a millisecond between two layers

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool;

// What one thread of a job sees.
struct Worker {
  Pool* pool;
  int id;
  int count;
  void barrier();
  // The next `step` tasks of the phase: returns the first, or a value >= total when none is left.
  int64_t take(int64_t step);
};

using Job = void (*)(Worker&, void*);

class Pool {
 public:
  std::mutex turn;  // held by the caller for the length of a job

  int threads() const { return count_; }

  void resize(int count) {
    std::lock_guard<std::mutex> lock(turn);
    stop();
    count_ = count;
  }

  // The caller holds `turn`.
  void run(Job job, void* context) {
    job_ = job;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    if (count_ > 1) {
      if (static_cast<int>(workers_.size()) != count_ - 1) start();
      epoch_.fetch_add(1, std::memory_order_seq_cst);
      if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
      }
    }
    Worker self{this, 0, count_};
    job(self, context);
    self.barrier();
  }

  // In a child after fork the threads are gone and the locks may be held by nobody: begin anew.
  void forget() {
    new (&turn) std::mutex;
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
    new (&workers_) std::vector<std::thread>;
    arrived_.store(0);
    sleeping_.store(0);
  }

  ~Pool() { stop(); }

 private:
  friend struct Worker;

  void start() {
    stop();
    stopping_.store(false);
    const uint64_t seen = epoch_.load();
    for (int id = 1; id < count_; ++id)
      workers_.emplace_back([this, id, seen] { loop(id, count_, seen); });
  }

  void stop() {
    stopping_.store(true);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    for (auto& worker : workers_) worker.join();
    workers_.clear();
  }

  void loop(int id, int count, uint64_t seen) {
    Worker self{this, id, count};
    while (true) {
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == seen && !stopping_.load()) {
        if (++spins < SPINS_BEFORE_SLEEP) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return epoch_.load() != seen || stopping_.load(); });
        sleeping_.fetch_sub(1);
      }
      if (stopping_.load()) return;
      ++seen;
      job_(self, context_);
      self.barrier();
    }
  }

  Job job_ = nullptr;
  void* context_ = nullptr;
  int count_ = 1;
  std::vector<std::thread> workers_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> phase_{0};
};

inline void Worker::barrier() {
  if (count == 1) {
    pool->next_.store(0, std::memory_order_relaxed);
    return;
  }
  const uint64_t phase = pool->phase_.load(std::memory_order_acquire);
  if (pool->arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    pool->arrived_.store(0, std::memory_order_relaxed);
    pool->next_.store(0, std::memory_order_relaxed);
    pool->phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; pool->phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < SPINS_BEFORE_YIELD)
      relax();
    else
      sched_yield();
  }
}

inline int64_t Worker::take(int64_t step) {
  return pool->next_.fetch_add(step, std::memory_order_relaxed);
}

inline Pool& pool() {
  // Never destroyed: joining threads while the interpreter tears down can hang.
  static Pool* made = [] {
    Pool* fresh = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().forget(); });
    return fresh;
  }();
  return *made;
}

}  // namespace
