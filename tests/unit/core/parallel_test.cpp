#include <eigenblocks/core/parallel.hpp>

#include <doctest/doctest.h>

#include <utility>
#include <vector>

namespace {

using namespace eigenblocks;

/// Counts how often it is asked, and runs the tasks backwards.
struct BackwardExecutor {
  int* runs;
  int workers() const { return 3; }
  void run(Index tasks, TaskRef task) const {
    ++*runs;
    for (Index i = tasks; i-- > 0;) task(i, static_cast<int>(i % 3));
  }
};

static_assert(Executor<serial_executor> && Executor<BackwardExecutor> && Executor<ExecutorRef>);
static_assert(!Executor<int>);

using Calls = std::vector<std::pair<Index, int>>;

}  // namespace

TEST_CASE("serial runs tasks in order on worker 0") {
  Calls calls;
  const auto task = [&](Index i, int worker) { calls.emplace_back(i, worker); };
  serial.run(3, task);
  CHECK(calls == Calls{{0, 0}, {1, 0}, {2, 0}});
  serial.run(0, task);
  serial.run(-1, task);
  CHECK(calls.size() == 3);
  CHECK(serial.workers() == 1);
}

TEST_CASE("an ExecutorRef is serial by default and forwards to what it refers to") {
  CHECK(ExecutorRef().workers() == 1);
  Calls calls;
  const auto task = [&](Index i, int worker) { calls.emplace_back(i, worker); };
  ExecutorRef().run(2, task);
  CHECK(calls == Calls{{0, 0}, {1, 0}});

  int runs = 0;
  const BackwardExecutor backward{&runs};
  const ExecutorRef ref = backward, copy = ref;
  CHECK(copy.workers() == 3);
  calls.clear();
  copy.run(4, task);
  CHECK(calls == Calls{{3, 0}, {2, 2}, {1, 1}, {0, 0}});
  CHECK(runs == 1);
}

TEST_CASE("no task or one task does not bother the executor") {
  int runs = 0, calls = 0;
  const BackwardExecutor backward{&runs};
  const ExecutorRef ref = backward;
  const auto task = [&](Index i, int worker) {
    ++calls;
    CHECK(i == 0);
    CHECK(worker == 0);
  };
  ref.run(0, task);
  ref.run(-5, task);
  CHECK(calls == 0);
  ref.run(1, task);
  CHECK(calls == 1);
  CHECK(runs == 0);
}

TEST_CASE("a TaskRef refers to callables of every kind") {
  int sum = 0;
  auto counting = [&sum, calls = 0](Index i, int) mutable {
    sum += static_cast<int>(i) + 10 * ++calls;
  };
  TaskRef task = counting;
  task(1, 0);
  task(2, 0);  // the state is the callable's own, not a copy's
  CHECK(sum == 11 + 22);
  struct Constant {
    int* hit;
    void operator()(Index, int worker) const { *hit = worker; }
  };
  const Constant constant{&sum};
  TaskRef{constant}(0, 7);
  CHECK(sum == 7);
}
