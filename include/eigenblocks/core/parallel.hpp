// Threads come from an executor that the caller passes; the default is serial.  No globals, no hidden threads.
//
// An executor has
//   int  workers() const                          how many workers may run at once (>= 1)
//   void run(Index tasks, Task task) const        calls task(index, worker) once for each 0 <= index < tasks;
//                                                 two concurrent calls never share a `worker` in [0, workers())
// and is passed to a block as an ExecutorRef, which binds to any such object without a copy:
//
//   attention_forward(q, k, v, out, shape);                     // serial
//   attention_forward(q, k, v, out, shape, rule, {}, pool);     // thread_pool (core/thread_pool.hpp) or openmp_executor
//
// Blocks cut their work by shape, never by the number of workers, and reduce in a fixed order: results are
// bitwise the same for every executor.  `worker` only selects scratch memory.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <concepts>
#include <memory>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

EIGENBLOCKS_NAMESPACE_BEGIN

/// Non-owning reference to a callable `void(Index task, int worker)`.
class TaskRef {
 public:
  template <class F>
    requires(!std::same_as<std::remove_cvref_t<F>, TaskRef> && std::invocable<F&, Index, int>)
  TaskRef(F&& f)  // NOLINT: implicit by design
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Index task, int worker) {
          (*static_cast<std::remove_reference_t<F>*>(object))(task, worker);
        }) {}
  void operator()(Index task, int worker) const { call_(object_, task, worker); }

 private:
  void* object_;
  void (*call_)(void*, Index, int);
};

template <class E>
concept Executor = requires(const E& executor, Index tasks, TaskRef task) {
  { executor.workers() } -> std::convertible_to<int>;
  executor.run(tasks, task);
};

/// Runs tasks in order on the calling thread.
struct serial_executor {
  int workers() const { return 1; }
  void run(Index tasks, TaskRef task) const {
    for (Index i = 0; i < tasks; ++i) task(i, 0);
  }
};
inline constexpr serial_executor serial{};

#if defined(_OPENMP)
/// Runs tasks on an OpenMP team, handed out one at a time; `threads` = 0 takes omp_get_max_threads().
/// Tasks must not throw.
struct openmp_executor {
  int threads = 0;
  int workers() const { return threads > 0 ? threads : omp_get_max_threads(); }
  void run(Index tasks, TaskRef task) const {
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers())
    for (Index i = 0; i < tasks; ++i) task(i, omp_get_thread_num());
  }
};
#endif

/// Non-owning, type-erased executor; what blocks take as their last argument.
class ExecutorRef {
 public:
  ExecutorRef() : ExecutorRef(serial) {}
  template <class E>
    requires(!std::same_as<E, ExecutorRef> && Executor<E>)
  ExecutorRef(const E& executor)  // NOLINT: implicit by design
      : object_(std::addressof(executor)),
        workers_(
            [](const void* object) -> int { return static_cast<const E*>(object)->workers(); }),
        run_([](const void* object, Index tasks, TaskRef task) {
          static_cast<const E*>(object)->run(tasks, task);
        }) {}

  int workers() const { return workers_(object_); }
  /// A single task runs on the calling thread.
  void run(Index tasks, TaskRef task) const {
    if (tasks == 1) {
      task(0, 0);
    } else if (tasks > 1) {
      run_(object_, tasks, task);
    }
  }

 private:
  const void* object_;
  int (*workers_)(const void*);
  void (*run_)(const void*, Index, TaskRef);
};

EIGENBLOCKS_NAMESPACE_END
