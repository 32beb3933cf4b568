// Built with OpenMP, into a program of its own: see tests/CMakeLists.txt.
#include <eigenblocks/core/parallel.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <vector>

namespace {

using namespace eigenblocks;

static_assert(Executor<openmp_executor>);

}  // namespace

TEST_CASE("openmp_executor runs every task once, on workers of its own") {
  for (int threads = 1; threads <= 7; ++threads) {
    const openmp_executor executor{threads};
    CHECK(executor.workers() == threads);
    for (const Index tasks : {0, 1, 5, 101}) {
      std::vector<std::atomic<int>> hits(static_cast<std::size_t>(tasks));
      std::vector<std::atomic<int>> taken(static_cast<std::size_t>(threads));
      std::atomic<int> collisions = 0;
      executor.run(tasks, [&](Index i, int worker) {
        if (taken[static_cast<std::size_t>(worker)].exchange(1) != 0) ++collisions;
        ++hits[static_cast<std::size_t>(i)];
        taken[static_cast<std::size_t>(worker)] = 0;
      });
      for (const auto& h : hits) CHECK(h == 1);
      CHECK(collisions == 0);
    }
  }
}

TEST_CASE("by default it takes what OpenMP offers") {
  CHECK(openmp_executor{}.workers() == omp_get_max_threads());
  const openmp_executor executor;
  const ExecutorRef ref = executor;
  std::atomic<Index> sum = 0;
  ref.run(10, [&](Index i, int) { sum += i; });
  CHECK(sum == 45);
}
