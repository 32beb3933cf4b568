// Scratch memory that kernels reuse: one 64-byte aligned block per worker, grown on demand, never shrunk.
//
//   Workspace workspace;                                // owned by the caller or by a block's state
//   workspace.prepare(executor.workers());
//   ... inside a task: Arena arena = workspace.arena(worker, bytes); float* tile = arena.take<float>(n);
//
// A second call with the same sizes allocates nothing, which is how step functions keep their promise.
// Memory is uninitialised.
#pragma once

#include <eigenblocks/core/types.hpp>

#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

inline constexpr std::size_t kAlignment = 64;  // one cache line, one AVX-512 register

template <class T>
constexpr std::size_t padded_bytes(Index count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Owning, aligned, uninitialised bytes.  Copies are empty: scratch is not part of a block's value.
class ScratchBlock {
 public:
  ScratchBlock() = default;
  ScratchBlock(const ScratchBlock&) {}
  ScratchBlock& operator=(const ScratchBlock&) { return *this; }
  ScratchBlock(ScratchBlock&& other) noexcept { swap(other); }
  ScratchBlock& operator=(ScratchBlock&& other) noexcept {
    swap(other);
    return *this;
  }
  ~ScratchBlock() { release(); }

  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment}));
      size_ = bytes;
    }
    return data_;
  }
  std::size_t size() const { return size_; }

 private:
  void swap(ScratchBlock& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void release() {
    if (data_ != nullptr) ::operator delete (data_, std::align_val_t{kAlignment});
    data_ = nullptr;
    size_ = 0;
  }
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Hands out consecutive aligned pieces of one block.
class Arena {
 public:
  explicit Arena(std::byte* begin) : next_(begin) {}
  template <class T>
  T* take(Index count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += padded_bytes<T>(count);
    return piece;
  }

 private:
  std::byte* next_;
};

}  // namespace detail

/// Scratch of one block call: a piece shared by all workers and one piece for each worker.
class Workspace {
 public:
  /// Makes `workers` private pieces of at least `bytes` each; call before the parallel region.  Which worker gets a task is
  /// chance, so pieces that grow inside the region may still allocate in a later call.
  void prepare(int workers, std::size_t bytes = 0) {
    if (private_.size() < static_cast<std::size_t>(workers)) {
      private_.resize(static_cast<std::size_t>(workers));
    }
    for (std::size_t i = 0; bytes > 0 && i < static_cast<std::size_t>(workers); ++i) {
      private_[i].reserve(bytes);
    }
  }
  detail::Arena shared(std::size_t bytes) { return detail::Arena(shared_.reserve(bytes)); }
  detail::Arena arena(int worker, std::size_t bytes) {
    return detail::Arena(private_[static_cast<std::size_t>(worker)].reserve(bytes));
  }
  std::size_t bytes() const {
    std::size_t sum = shared_.size();
    for (const detail::ScratchBlock& block : private_) sum += block.size();
    return sum;
  }

 private:
  detail::ScratchBlock shared_;
  std::vector<detail::ScratchBlock> private_;
};

EIGENBLOCKS_NAMESPACE_END
