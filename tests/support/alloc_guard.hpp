// Counts allocations of the whole program, so that a test can claim there were none.
//
//   const AllocationCount count;
//   step();
//   CHECK(count.calls() == 0);
//
// Eigen allocates with malloc and the library with operator new, which calls it.  Under AddressSanitizer its hooks do the
// counting; with glibc the header defines malloc itself (weakly: several files of a program may include it).  Elsewhere
// AllocationCount::available is false.
#pragma once

#if __has_include(<mm_malloc.h>)
#include <mm_malloc.h>  // clang's declares posix_memalign and must come before ours
#endif

#include <atomic>
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EIGENBLOCKS_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EIGENBLOCKS_TEST_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define EIGENBLOCKS_TEST_TSAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define EIGENBLOCKS_TEST_TSAN 1
#endif

namespace alloc_guard {

inline std::atomic<long> calls{0};
inline std::atomic<long> bytes{0};
inline void note(std::size_t size) {
  calls.fetch_add(1, std::memory_order_relaxed);
  bytes.fetch_add(static_cast<long>(size), std::memory_order_relaxed);
}

}  // namespace alloc_guard

#if defined(EIGENBLOCKS_TEST_ASAN)

// Declared in <sanitizer/allocator_interface.h>, which g++ does not ship everywhere.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*,
                                                                  std::size_t),
                                                         void (*)(const volatile void*));

namespace alloc_guard {
inline constexpr bool kAvailable = true;
inline const int hooks = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, std::size_t size) { note(size); }, [](const volatile void*) {});
}  // namespace alloc_guard

#elif defined(__GLIBC__) && !defined(EIGENBLOCKS_TEST_TSAN)

extern "C" {
void* __libc_malloc(std::size_t) noexcept;
void* __libc_calloc(std::size_t, std::size_t) noexcept;
void* __libc_realloc(void*, std::size_t) noexcept;
void* __libc_memalign(std::size_t, std::size_t) noexcept;

__attribute__((weak)) void* malloc(std::size_t size) noexcept {
  alloc_guard::note(size);
  return __libc_malloc(size);
}
__attribute__((weak)) void* calloc(std::size_t count, std::size_t size) noexcept {
  alloc_guard::note(count * size);
  return __libc_calloc(count, size);
}
__attribute__((weak)) void* realloc(void* old, std::size_t size) noexcept {
  alloc_guard::note(size);
  return __libc_realloc(old, size);
}
__attribute__((weak)) void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  alloc_guard::note(size);
  return __libc_memalign(alignment, size);
}
__attribute__((weak)) int posix_memalign(void** out, std::size_t alignment,
                                         std::size_t size) noexcept {
  alloc_guard::note(size);
  *out = __libc_memalign(alignment, size);
  return *out == nullptr ? 12 : 0;  // ENOMEM
}
}

namespace alloc_guard {
inline constexpr bool kAvailable = true;
}

#else

namespace alloc_guard {
inline constexpr bool kAvailable = false;
}

#endif

/// Allocations since it was made, of all threads.
class AllocationCount {
 public:
  static constexpr bool available = alloc_guard::kAvailable;
  long calls() const { return alloc_guard::calls - calls_; }
  long bytes() const { return alloc_guard::bytes - bytes_; }

 private:
  long calls_ = alloc_guard::calls, bytes_ = alloc_guard::bytes;
};
