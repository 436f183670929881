// SPDX-License-Identifier: Apache-2.0
// Persistent threads that share the tasks of a job. No OpenMP, so that torch's runtime and ours
// never oversubscribe. One job at a time: a second caller waits for its turn.
//
// A job is a sequence of phases, a phase a number of tasks in any order. A phase ends when its
// tasks are done, not when every thread has arrived: a thread that the system holds back (the
// control timer of a robot took its core) delays only the task that it had begun.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int64_t YIELD_NS = 50'000;   // a caller that waits longer gives its core to others
constexpr int64_t SLEEP_NS = 300'000;  // an idle thread spins this long, then costs nothing

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Counts how long a wait has lasted; the clock is read once in 32 turns.
struct Wait {
  int64_t begin = 0;
  int turns = 0;
  bool longer_than(int64_t ns) {
    relax();
    if (++turns % 32) return false;
    const int64_t now = now_ns();
    if (!begin) begin = now;
    return now - begin > ns;
  }
};

struct Job {
  void* context;
  int64_t phases;
  int64_t (*tasks)(void* context, int64_t phase);  // asked once, when the phase begins
  void (*run)(void* context, int64_t phase, int64_t task, int worker);
  void (*rest)();  // before a thread sleeps or leaves
};

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
  void run(const Job& job) {
    if (count_ == 1) {
      for (int64_t phase = 0; phase < job.phases; ++phase) {
        const int64_t total = job.tasks(job.context, phase);
        for (int64_t task = 0; task < total; ++task) job.run(job.context, phase, task, 0);
      }
      job.rest();
      return;
    }
    if (static_cast<int>(workers_.size()) != count_ - 1) start(job.rest);
    job_ = &job;
    phase_ = -1;
    finished_.store(false, std::memory_order_relaxed);
    advance();
    Wait wait;
    while (!finished_.load(std::memory_order_acquire)) {
      if (work(0))
        wait = Wait{};
      else if (wait.longer_than(YIELD_NS))
        sched_yield();
    }
    job.rest();
  }

  // In a child after fork the threads are gone and the locks may be held by nobody: begin anew.
  void forget() {
    new (&turn) std::mutex;
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
    new (&workers_) std::vector<std::thread>;
    ticket_.store(0);
    sleeping_.store(0);
  }

  ~Pool() { stop(); }

 private:
  static constexpr uint64_t LEFT = 0xffffffff;

  // Begin the next phase that has tasks. Called by the one thread that finished the last task of
  // the phase before, or by the caller at the start.
  void advance() {
    do {
      if (++phase_ == job_->phases) {
        finished_.store(true, std::memory_order_release);
        return;
      }
      total_ = job_->tasks(job_->context, phase_);
    } while (total_ == 0);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(++opened_ << 32 | static_cast<uint64_t>(total_), std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
  }

  // Take one task and run it; false where none is left. A task that is held keeps its phase open,
  // so that job_, phase_ and total_ may be read until it is counted as done.
  bool work(int id) {
    uint64_t seen = ticket_.load(std::memory_order_acquire);
    do {
      if (!(seen & LEFT)) return false;
    } while (!ticket_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                            std::memory_order_acquire));
    const int64_t total = total_;
    job_->run(job_->context, phase_, total - static_cast<int64_t>(seen & LEFT), id);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total) advance();
    return true;
  }

  void start(void (*rest)()) {
    stop();
    stopping_.store(false);
    for (int id = 1; id < count_; ++id)
      workers_.emplace_back([this, id, rest] { loop(id, rest); });
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

  void loop(int id, void (*rest)()) {
    Wait wait;
    while (!stopping_.load(std::memory_order_relaxed)) {
      if (work(id)) {
        wait = Wait{};
        continue;
      }
      if (!wait.longer_than(SLEEP_NS)) continue;
      rest();
      std::unique_lock<std::mutex> lock(sleep_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] {
        return (ticket_.load(std::memory_order_seq_cst) & LEFT) || stopping_.load();
      });
      sleeping_.fetch_sub(1);
      wait = Wait{};
    }
    rest();
  }

  const Job* job_ = nullptr;
  int64_t phase_ = 0, total_ = 0;
  uint64_t opened_ = 0;  // phases so far: a late thread never mistakes one for another
  int count_ = 1;
  std::vector<std::thread> workers_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};  // opened_, and how many tasks nobody has taken
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> finished_{true};
};

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
