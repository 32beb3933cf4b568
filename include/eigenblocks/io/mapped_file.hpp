// Whole files: map one, read one, replace one.
//
//   MappedFile file("model.safetensors");       // read-only; pages are loaded when they are touched
//   std::span<const std::byte> bytes = file.bytes();
//   std::vector<std::byte> copy = read_file("model.safetensors");
//   replace_file("model.safetensors", {header, body});   // readers see the old file or the new one, never a half
//
// A mapping costs no memory of its own and is shared between processes, but it is a window on the file: if another
// program shortens the file meanwhile, touching the lost pages kills the process (SIGBUS).  read_file is immune.
//
// Errors: data_error with the path and the system's reason (missing, unreadable, a directory, disk full).
// POSIX only.
#pragma once

#include <eigenblocks/core/error.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <initializer_list>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

EIGENBLOCKS_NAMESPACE_BEGIN

namespace detail {

[[noreturn]] EIGENBLOCKS_COLD inline void raise_file_error(const char* what,
                                                           const std::string& path, int code) {
  raise<data_error>("cannot ", what, " '", path, "': ", std::generic_category().message(code));
}

/// A POSIX file descriptor that closes itself.
class FileDescriptor {
 public:
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor() { close(); }

  int get() const { return descriptor_; }
  /// 0, or the error: a failed write may only show here.
  int close() {
    if (descriptor_ < 0) return 0;
    return ::close(std::exchange(descriptor_, -1)) == 0 ? 0 : errno;
  }

 private:
  int descriptor_;
};

/// Opens a regular file for reading and tells its size.
inline int open_to_read(const std::string& path, std::size_t& size) {
  // O_NONBLOCK: opening a pipe would otherwise wait for somebody to write to it.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) raise_file_error("open", path, errno);
  struct ::stat status {};
  int code = ::fstat(descriptor, &status) == 0 ? 0 : errno;
  if (code == 0 && S_ISDIR(status.st_mode)) code = EISDIR;
  if (code == 0 && !S_ISREG(status.st_mode)) code = EINVAL;
  if (code != 0) {
    ::close(descriptor);
    raise_file_error("read", path, code);
  }
  size = static_cast<std::size_t>(status.st_size);
  return descriptor;
}

/// 0, or the error.
inline int write_all(int descriptor, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return 0;
}

}  // namespace detail

/// A file mapped into memory, read-only.  Moves, does not copy; the bytes live until the object that holds them ends.
class MappedFile {
 public:
  MappedFile() = default;

  /// Maps the whole of `path`.  Errors: data_error if it cannot be opened, is no regular file, or cannot be mapped.
  explicit MappedFile(const std::string& path) {
    const detail::FileDescriptor file(detail::open_to_read(path, size_));
    if (size_ == 0) return;  // mmap refuses a length of zero
    data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (data_ == MAP_FAILED) {
      data_ = nullptr;
      detail::raise_file_error("map", path, errno);
    }
  }

  MappedFile(MappedFile&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    MappedFile taken(std::move(other));
    std::swap(data_, taken.data_);
    std::swap(size_, taken.size_);
    return *this;
  }
  ~MappedFile() {
    if (data_) ::munmap(data_, size_);
  }

  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

/// The content of a regular file.  Errors: data_error if it cannot be opened or read.
inline std::vector<std::byte> read_file(const std::string& path) {
  std::size_t size = 0;
  const detail::FileDescriptor file(detail::open_to_read(path, size));
  std::vector<std::byte> bytes(size);
  std::size_t filled = 0;
  while (filled < size) {
    const ssize_t got = ::read(file.get(), bytes.data() + filled, size - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) detail::raise_file_error("read", path, errno);
    if (got == 0) break;  // shortened meanwhile
    filled += static_cast<std::size_t>(got);
  }
  bytes.resize(filled);
  return bytes;
}

/// Makes `path` hold the concatenated parts, all at once: they are written to a temporary file beside it, flushed to
/// the disk, and renamed.  On failure the old content, if any, is untouched and the temporary file removed.
/// Errors: data_error if the folder does not exist or may not be written, or the disk is full.
inline void replace_file(const std::string& path,
                         std::span<const std::span<const std::byte>> parts) {
  static std::atomic<unsigned> count{0};  // threads may save different states of one model
  const std::string temporary =
      detail::join_text(path, ".", ::getpid(), ".", count.fetch_add(1), ".tmp");
  const int descriptor =
      ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode_t{0666});
  if (descriptor < 0) detail::raise_file_error("create", temporary, errno);
  detail::FileDescriptor file(descriptor);
  int code = 0;
  for (const auto& part : parts) {
    if (code == 0) code = detail::write_all(file.get(), part);
  }
  if (code == 0 && ::fsync(file.get()) != 0) code = errno;
  if (const int closing = file.close(); code == 0) code = closing;
  if (code == 0 && std::rename(temporary.c_str(), path.c_str()) != 0) code = errno;
  if (code != 0) {
    ::unlink(temporary.c_str());
    detail::raise_file_error("write", path, code);
  }
}

inline void replace_file(const std::string& path,
                         std::initializer_list<std::span<const std::byte>> parts) {
  replace_file(path, std::span<const std::span<const std::byte>>(parts.begin(), parts.size()));
}

EIGENBLOCKS_NAMESPACE_END
