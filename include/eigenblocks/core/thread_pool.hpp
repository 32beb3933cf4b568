// A small fixed pool of threads as an executor (core/parallel.hpp).
//
//   thread_pool pool(4);                                   // 4 workers: the caller and 3 threads
//   attention_forward(q, k, v, out, shape, rule, {}, pool);
//
// run() hands out tasks one at a time (tasks differ in size: causal blocks), returns when all are done, and
// rethrows the first exception of a task; the remaining tasks are then skipped.  Idle threads sleep.  One run() at a
// time per pool: concurrent callers wait for each other; a task must not call run() of its own pool.
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/parallel.hpp>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

class thread_pool {
 public:
  /// workers >= 1, the calling thread of run() included.
  explicit thread_pool(int workers) : workers_(workers) {
    detail::require(workers >= 1, "thread_pool: workers (", workers, ") must be at least 1");
    threads_.reserve(static_cast<std::size_t>(workers - 1));
    for (int worker = 1; worker < workers; ++worker) {
      threads_.emplace_back([this, worker] { serve(worker); });
    }
  }
  thread_pool(const thread_pool&) = delete;
  thread_pool& operator=(const thread_pool&) = delete;
  ~thread_pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int workers() const { return workers_; }

  void run(Index tasks, TaskRef task) const {
    if (tasks <= 0) return;
    const std::lock_guard turn(turn_);
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      busy_ = workers_ - 1;
      ++round_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    task_ = nullptr;
#if !defined(EIGENBLOCKS_NO_EXCEPTIONS)
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
#endif
  }

 private:
  void work(int worker) const {
    for (;;) {
      const Index i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks_) return;
#if defined(EIGENBLOCKS_NO_EXCEPTIONS)
      (*task_)(i, worker);
#else
      try {
        (*task_)(i, worker);
      } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_.store(tasks_, std::memory_order_relaxed);
      }
#endif
    }
  }

  void serve(int worker) const {
    std::unique_lock lock(mutex_);
    for (long long seen = 0;;) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      lock.unlock();
      work(worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  int workers_;
  std::vector<std::thread> threads_;
  mutable std::mutex turn_;   // one run() at a time
  mutable std::mutex mutex_;  // guards everything below but next_
  mutable std::condition_variable wake_, done_;
  mutable const TaskRef* task_ = nullptr;
  mutable Index tasks_ = 0;
  mutable std::atomic<Index> next_{0};
  mutable int busy_ = 0;
  mutable long long round_ = 0;
  mutable std::exception_ptr failure_;
  bool stop_ = false;
};

EIGENBLOCKS_NAMESPACE_END
