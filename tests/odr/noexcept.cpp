// The whole library compiled with -fno-exceptions -fno-rtti. A good call works; a bad call prints
// its message and aborts, which this program turns into its exit code.
#include <eigenblocks/eigenblocks.hpp>

#include <csignal>
#include <cstdlib>

#if defined(__cpp_exceptions) || defined(__cpp_rtti)
#error "to be compiled with -fno-exceptions -fno-rtti"
#endif

namespace eb = eigenblocks;

int main() {
  const eb::thread_pool pool(2);
  std::atomic<eb::Index> sum = 0;
  pool.run(5, [&](eb::Index task, int) { sum += task; });
  if (sum != 10) return 1;

  std::signal(SIGABRT, [](int) { std::_Exit(0); });
  const eb::thread_pool refused(0);
  return 1;
}
