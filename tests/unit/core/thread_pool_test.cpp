#include <eigenblocks/core/thread_pool.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace eigenblocks;

void wait_a_moment() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

}  // namespace

TEST_CASE("every task runs exactly once, for any number of workers and tasks") {
  for (int workers = 1; workers <= 7; ++workers) {
    const thread_pool pool(workers);
    CHECK(pool.workers() == workers);
    for (const Index tasks : {0, 1, 2, 6, 7, 8, 101}) {
      std::vector<std::atomic<int>> hits(static_cast<std::size_t>(tasks));
      pool.run(tasks, [&](Index i, int worker) {
        ++hits[static_cast<std::size_t>(i)];
        if (worker < 0 || worker >= workers) hits[static_cast<std::size_t>(i)] = 1000;
      });
      for (const auto& h : hits) CHECK(h == 1);
    }
    pool.run(-3, [](Index, int) { FAIL("no task to run"); });
  }
}

TEST_CASE("two calls that run at the same time never share a worker") {
  constexpr int kWorkers = 4;
  const thread_pool pool(kWorkers);
  std::atomic<bool> taken[kWorkers] = {};
  std::atomic<int> collisions = 0;
  for (int round = 0; round < 20; ++round) {
    pool.run(40, [&](Index, int worker) {
      if (taken[worker].exchange(true)) ++collisions;
      wait_a_moment();
      taken[worker] = false;
    });
  }
  CHECK(collisions == 0);
}

TEST_CASE("tasks do run on several threads, one worker being the caller") {
  const thread_pool pool(3);
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::set<std::pair<int, std::thread::id>> pairs;
  // Each task waits until all three workers have one: this would hang if they shared a thread.
  std::atomic<int> arrived = 0;
  pool.run(3, [&](Index, int worker) {
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
    pairs.emplace(worker, std::this_thread::get_id());
  });
  CHECK(threads.size() == 3);
  CHECK(pairs.contains({0, std::this_thread::get_id()}));
}

TEST_CASE("many short runs in a row: no task is lost or repeated between rounds") {
  const thread_pool pool(3);
  std::atomic<Index> sum = 0;
  for (Index round = 0; round < 2000; ++round) {
    pool.run(round % 5, [&](Index i, int) { sum += i + 1; });
  }
  CHECK(sum == 400 * (0 + 1 + 3 + 6 + 10));
}

TEST_CASE("the first exception reaches the caller, later tasks are skipped, the pool lives on") {
  for (const int workers : {1, 2, 5}) {
    const thread_pool pool(workers);
    for (int repeat = 0; repeat < 5; ++repeat) {
      std::atomic<int> calls = 0;
      const auto failing = [&](Index i, int) {
        ++calls;
        if (i == 3) throw std::runtime_error("task 3");
        wait_a_moment();
      };
      CHECK_THROWS_WITH_AS(pool.run(1000, failing), "task 3", std::runtime_error);
      CHECK(calls < 1000);
      CHECK(calls >= 4);
    }
    std::atomic<int> after = 0;
    pool.run(10, [&](Index, int) { ++after; });
    CHECK(after == 10);
  }
}

TEST_CASE("when every task throws, one exception comes out") {
  const thread_pool pool(4);
  CHECK_THROWS_AS(pool.run(50, [](Index, int) { throw std::length_error("each"); }),
                  std::length_error);
  int calls = 0;
  pool.run(1, [&](Index, int) { ++calls; });
  CHECK(calls == 1);
}

TEST_CASE("a task may use another pool") {
  const thread_pool outer(2), inner(3);
  std::atomic<Index> sum = 0;
  outer.run(6, [&](Index i, int) { inner.run(5, [&](Index j, int) { sum += 10 * i + j; }); });
  CHECK(sum == 5 * 10 * 15 + 6 * 10);
}

TEST_CASE("callers on several threads take turns") {
  const thread_pool pool(2);
  std::atomic<Index> sum = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) pool.run(4, [&](Index i, int) { sum += i; });
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK(sum == 3 * 50 * 6);
}

TEST_CASE("a pool binds to an ExecutorRef, and refuses to have no workers") {
  const thread_pool pool(2);
  const ExecutorRef executor = pool;
  CHECK(executor.workers() == 2);
  std::atomic<Index> sum = 0;
  executor.run(10, [&](Index i, int) { sum += i; });
  CHECK(sum == 45);
  CHECK_THROWS_WITH_AS(thread_pool(0), "eigenblocks: thread_pool: workers (0) must be at least 1",
                       eigenblocks::invalid_argument);
  CHECK_THROWS_AS(thread_pool(-2), eigenblocks::invalid_argument);
}
