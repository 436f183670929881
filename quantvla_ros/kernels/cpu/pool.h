// SPDX-License-Identifier: Apache-2.0
// Persistent threads that share the tasks of a job. No OpenMP, so that torch's runtime and ours
// never oversubscribe. One job at a time: a second caller waits for its turn.
//
// A job is a sequence of phases, a phase a number of tasks in any order. A phase ends when its
// tasks are done, not when every thread has arrived: a thread that the system holds back (the
// control timer of a robot took its core) delays only the task that it had begun.
//
// Each thread has a lane, a run of neighbouring tasks of the phase, and takes from the others'
// lanes when its own is empty. So the same rows and panels stay with the same core from phase to
// phase and from run to run: what another core wrote costs several times as much to read.
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
    while (!finished_.load(std::memory_order_acquire)) {
      const uint64_t seen = opened_.load(std::memory_order_acquire);
      while (work(0)) {
      }
      Wait wait;
      while (opened_.load(std::memory_order_acquire) == seen &&
             !finished_.load(std::memory_order_acquire))
        if (wait.longer_than(YIELD_NS)) sched_yield();
    }
    job.rest();
  }

  // In a child after fork the threads are gone and the locks may be held by nobody: begin anew.
  void forget() {
    new (&turn) std::mutex;
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
    new (&workers_) std::vector<std::thread>;
    for (Lane& lane : lanes_) lane.ticket.store(0);
    sleeping_.store(0);
  }

  ~Pool() { stop(); }

 private:
  static constexpr uint64_t LEFT = 0xffffffff;

  // The number of the phase, and how many tasks of the lane nobody has taken.
  struct alignas(64) Lane {
    std::atomic<uint64_t> ticket{0};
  };

  int64_t lane_end(int64_t lane) const { return total_ * (lane + 1) / count_; }

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
    const uint64_t number = opened_.load(std::memory_order_relaxed) + 1;
    for (int64_t lane = 0; lane < count_; ++lane) {
      const int64_t tasks = lane_end(lane) - lane_end(lane - 1);
      lanes_[static_cast<size_t>(lane)].ticket.store(
          number << 32 | static_cast<uint64_t>(tasks), std::memory_order_release);
    }
    opened_.store(number, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
  }

  // Take one task and run it; false where none is left.
  bool work(int id) {
    for (int i = 0; i < count_; ++i)
      if (work_in((id + i) % count_, id)) return true;
    return false;
  }

  // A task that is held keeps its phase open, so that job_, phase_ and total_ may be read until it
  // is counted as done.
  bool work_in(int lane, int id) {
    std::atomic<uint64_t>& ticket = lanes_[static_cast<size_t>(lane)].ticket;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    do {
      if (!(seen & LEFT)) return false;
    } while (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                           std::memory_order_acquire));
    const int64_t total = total_;
    job_->run(job_->context, phase_, lane_end(lane) - static_cast<int64_t>(seen & LEFT), id);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total) advance();
    return true;
  }

  void start(void (*rest)()) {
    stop();
    stopping_.store(false);
    std::vector<Lane> fresh(static_cast<size_t>(count_));
    lanes_.swap(fresh);
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
    while (!stopping_.load(std::memory_order_relaxed)) {
      const uint64_t seen = opened_.load(std::memory_order_acquire);
      while (work(id)) {
      }
      Wait wait;
      const auto news = [&] {
        return opened_.load(std::memory_order_seq_cst) != seen || stopping_.load();
      };
      while (!news() && !wait.longer_than(SLEEP_NS)) {
      }
      if (news()) continue;
      rest();
      std::unique_lock<std::mutex> lock(sleep_);
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, news);
      sleeping_.fetch_sub(1);
    }
    rest();
  }

  const Job* job_ = nullptr;
  int64_t phase_ = 0, total_ = 0;
  int count_ = 1;
  std::vector<std::thread> workers_;
  std::vector<Lane> lanes_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleeping_{0};
  // Phases so far: a late thread never mistakes one for another, and who found nothing to do
  // waits for the next.
  alignas(64) std::atomic<uint64_t> opened_{0};
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
