// The key/value cache of one attention layer.
//
//   KvCache<float> cache({.kv_heads = 8, .head_dim = 128});            // grows geometrically; .capacity reserves
//   KvCache<float> window({.kv_heads = 8, .head_dim = 128, .window = 4095});   // ring: keeps what window_left(4095) can see
//   KvCache<float> stream({.kv_heads = 8, .head_dim = 128, .window = 1019, .sinks = 4});   // and the first four (sink_cache.hpp)
//   cache.append(k, v);                         // rows of new tokens: t x (kv_heads * head_dim), t x (kv_heads * value_dim)
//   KvCache<float> snapshot = cache;            // a regular value: copy, compare, restore by assignment
//   cache.truncate(n);                          // forget positions >= n (speculative decoding)
//
// Attention over it: decode.hpp.  Positions are 0-based; size() is the number of tokens appended and the next position.
// append allocates nothing while the capacity lasts, and takes rows of any scalar that computes in the same: KvCache<bfloat16>
// stores float rows rounded to nearest even.  Codes of 8 bits: quantized_cache.hpp.  Pages shared by many sequences:
// paged_cache.hpp.
//
// Layout, hidden because decoding is won here: the keys of a head lie in panels of 16 tokens, [panel][channel][16], so
// that lanes are keys and no horizontal sum is needed; values are rows, padded to 16 scalars; each head is contiguous.
// bytes_per_token = kv_heads (head_dim + value_dim) sizeof(T), the count of arXiv 2405.04434 table 1 (times the scalar).
#pragma once

#include <eigenblocks/core/error.hpp>
#include <eigenblocks/core/types.hpp>
#include <eigenblocks/core/workspace.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

EIGENBLOCKS_NAMESPACE_BEGIN

struct KvCacheOptions {
  Index kv_heads = 1;
  Index head_dim = 1;
  Index value_dim = 0;  ///< 0 means head_dim
  Index capacity = 0;   ///< tokens to make room for at once
  bool fixed =
      false;  ///< never grow: std::length_error when more than `capacity` tokens are appended
  Index window = -1;  ///< >= 0: keep only the keys that window_left(window) can see, in a ring
  Index chunk =
      64;  ///< ring only: tokens that attention_step takes in one piece (longer chunks are split)
  Index sinks = 0;  ///< ring only: the first tokens, kept and visible for ever (arXiv 2309.17453)
  friend bool operator==(const KvCacheOptions&, const KvCacheOptions&) = default;
};

namespace detail {

/// to[c stride] = from[c].
template <class From, class To>
void scatter(const From* from, Index count, To* to, Index stride) {
  for (Index c = 0; c < count; ++c) to[c * stride] = static_cast<To>(from[c]);
}

/// Slots of keys and values, whatever an entry is: which positions are stored, where, and the memory.  The caches derive from
/// it and convert rows from and to entries.  Position p lies in slot p; in a ring the sinks lie in slots of their own, before
/// the slots that the other positions share.
template <class Entry>
class PanelStore {
 public:
  static constexpr Index kPanel =
      16;  ///< tokens per key panel: one AVX-512 register of floats, two of AVX2

  static constexpr bool kScaled =
      std::is_same_v<Entry, std::int8_t>;  ///< a float per token and head beside the codes

  PanelStore(const char* name, const KvCacheOptions& options) : options_(options), name_(name) {
    require(options.kv_heads >= 1, name, ": kv_heads (", options.kv_heads, ") must be at least 1");
    require(options.head_dim >= 1, name, ": head_dim (", options.head_dim, ") must be at least 1");
    require(options.value_dim >= 0, name, ": value_dim (", options.value_dim,
            ") must not be negative");
    require(options.capacity >= 0, name, ": capacity (", options.capacity,
            ") must not be negative");
    require(options.window >= -1, name, ": window (", options.window, ") must be -1 (off) or >= 0");
    require(options.chunk >= 1, name, ": chunk (", options.chunk, ") must be at least 1");
    require(options.sinks >= 0, name, ": sinks (", options.sinks, ") must not be negative");
    require(!options.fixed || options.capacity >= 1, name,
            ": a fixed cache needs a capacity of at least 1");
    require(!options.fixed || options.window < 0, name,
            ": fixed and window exclude each other: a ring never grows");
    require(options.sinks == 0 || options.window >= 0, name,
            ": sinks need a window: without one every token stays");
    if (options_.value_dim == 0) options_.value_dim = options_.head_dim;
    value_stride_ = whole_panels(options_.value_dim);
    sink_slots_ = whole_panels(options_.sinks);
    allocate(ring() ? sink_slots_ + options_.window + options_.chunk : options_.capacity);
  }

  const KvCacheOptions& options() const { return options_; }
  bool ring() const { return options_.window >= 0; }
  /// Tokens appended so far = position of the next one.
  Index size() const { return size_; }
  /// Oldest position still stored; with sinks, those apart.
  Index first() const { return first_; }
  /// Tokens that fit without allocating (ring: that are kept).
  Index capacity() const {
    return options_.fixed ? options_.capacity : slots_ - sink_slots_ + options_.sinks;
  }
  /// Bytes held in all, padding included.
  std::size_t bytes() const {
    return static_cast<std::size_t>(keys_.size() + values_.size()) * sizeof(Entry) +
           static_cast<std::size_t>(key_scales_.size() + value_scales_.size()) * sizeof(float);
  }

  /// Room for `tokens` in all, so that later appends do not allocate.  Nothing to do for a ring.
  void reserve(Index tokens) {
    if (!ring() && tokens > slots_) {
      require(!options_.fixed, name_, ": reserve(", tokens, ") on a cache of fixed capacity ",
              options_.capacity);
      grow(tokens);
    }
  }

  /// std::length_error if `rows` more tokens do not fit a fixed cache.
  void require_room(Index rows) const {
    if (options_.fixed && size_ + rows > options_.capacity) {
      raise<std::length_error>(name_, ": ", size_, " tokens and ", rows,
                               " more exceed the fixed capacity ", options_.capacity);
    }
  }
  void require_rows(Index key_rows, Index key_cols, Index value_rows, Index value_cols) const {
    require_shape("key", key_rows, key_cols, key_rows, options_.kv_heads * options_.head_dim,
                  "cols = kv_heads * head_dim of the cache");
    require_shape("value", value_rows, value_cols, key_rows, options_.kv_heads * options_.value_dim,
                  "rows of key, cols = kv_heads * value_dim of the cache");
  }

  /// Forgets positions >= n.  std::out_of_range unless 0 <= n <= size() and a ring still holds the window before n (what of it
  /// are sinks, it always does).
  void truncate(Index n) {
    if (n < 0 || n > size_) {
      raise<std::out_of_range>(name_, ": truncate(", n, ") is outside [0, ", size_, "]");
    }
    const Index needed = std::max(options_.sinks, n - options_.window);
    if (ring() && needed < first_ && (options_.sinks == 0 || n > options_.sinks)) {
      raise<std::out_of_range>(name_, ": truncate(", n, ") needs position ", needed,
                               ", but the ring starts at ", first_);
    }
    size_ = n;
    first_ = std::min(first_, n);
  }
  void clear() { size_ = first_ = 0; }

  // For the attention over the cache.
  Index slot(Index position) const {
    if (!ring()) return position;
    if (sink_slots_ == 0) return position % slots_;
    return position < options_.sinks ? position : sink_slots_ + position % (slots_ - sink_slots_);
  }
  Index slots() const { return slots_; }
  Index ring_slots() const { return slots_ - sink_slots_; }
  Index value_stride() const { return value_stride_; }
  const Entry* key_panel(Index h, Index panel) const {
    return keys_.data() + (h * slots_ + panel * kPanel) * options_.head_dim;
  }
  const Entry* value_row(Index h, Index at) const {
    return values_.data() + (h * slots_ + at) * value_stride_;
  }
  const float* key_scales(Index h) const { return key_scales_.data() + h * slots_; }
  const float* value_scales(Index h) const { return value_scales_.data() + h * slots_; }
  Workspace& workspace() { return workspace_; }

 protected:
  /// Makes room for `rows` more and calls put(row, slot) for those that stay.
  template <class Put>
  void append_rows(Index rows, const Put& put) {
    if (!ring() && size_ + rows > slots_) grow(std::max(size_ + rows, 2 * slots_));
    for (Index r = 0; r < rows; ++r) {
      if (rows - r <= ring_slots() || size_ + r < options_.sinks) put(r, slot(size_ + r));
    }
    size_ += rows;
    first_ = std::max(first_, size_ - ring_slots());
  }
  /// Where channel 0 of a key goes; channel c lies c * kPanel further.
  Entry* key_to_fill(Index h, Index at) {
    return keys_.data() + (h * slots_ + at / kPanel * kPanel) * options_.head_dim + at % kPanel;
  }
  Entry* value_to_fill(Index h, Index at) {
    return values_.data() + (h * slots_ + at) * value_stride_;
  }
  float& key_scale_to_fill(Index h, Index at) { return key_scales_[h * slots_ + at]; }
  float& value_scale_to_fill(Index h, Index at) { return value_scales_[h * slots_ + at]; }

  const Entry* key(Index h, Index at) const { return key_panel(h, at / kPanel) + at % kPanel; }
  void require_range(Index begin, Index end) const {
    const bool among_sinks =
        options_.sinks > 0 && begin >= 0 && end <= std::min(options_.sinks, size_);
    const bool recent = begin >= (first_ <= options_.sinks ? 0 : first_) && end <= size_;
    if (begin > end || !(among_sinks || recent)) {
      raise<std::out_of_range>(name_, ": positions [", begin, ", ", end,
                               ") are not within the stored [", first_, ", ", size_, ")",
                               options_.sinks > 0 ? " or among the sinks" : "");
    }
  }
  /// Whether two stores of equal options and positions agree in same(begin, end) for all that is stored.
  template <class Same>
  bool same_positions(const PanelStore& other, const Same& same) const {
    return options_ == other.options_ && size_ == other.size_ && first_ == other.first_ &&
           same(std::max(first_, std::min(options_.sinks, size_)), size_) &&
           same(Index{0}, std::min(options_.sinks, size_));
  }

 private:
  static constexpr Index whole_panels(Index n) { return (n + kPanel - 1) / kPanel * kPanel; }

  void allocate(Index tokens) {
    slots_ = whole_panels(tokens);
    keys_.setZero(options_.kv_heads * slots_ * options_.head_dim);
    values_.setZero(options_.kv_heads * slots_ * value_stride_);
    if constexpr (kScaled) {
      key_scales_.setZero(options_.kv_heads * slots_);
      value_scales_.setZero(options_.kv_heads * slots_);
    }
  }
  void grow(Index tokens) {
    PanelStore bigger(*this, tokens);
    for (Index h = 0; h < options_.kv_heads; ++h) {
      std::copy_n(key_panel(h, 0), slots_ * options_.head_dim, bigger.key_to_fill(h, 0));
      std::copy_n(value_row(h, 0), slots_ * value_stride_, bigger.value_to_fill(h, 0));
      if constexpr (kScaled) {
        std::copy_n(key_scales(h), slots_, &bigger.key_scales_[h * bigger.slots_]);
        std::copy_n(value_scales(h), slots_, &bigger.value_scales_[h * bigger.slots_]);
      }
    }
    keys_.swap(bigger.keys_);
    values_.swap(bigger.values_);
    key_scales_.swap(bigger.key_scales_);
    value_scales_.swap(bigger.value_scales_);
    slots_ = bigger.slots_;
  }
  PanelStore(const PanelStore& like, Index tokens)
      : options_(like.options_), name_(like.name_), value_stride_(like.value_stride_) {
    allocate(tokens);
  }

  KvCacheOptions options_;
  const char* name_;
  Index value_stride_ = 0, sink_slots_ = 0;
  Index slots_ = 0;
  Index size_ = 0, first_ = 0;
  Vector<Entry> keys_, values_;
  Vector<float> key_scales_, value_scales_;  // kScaled only
  Workspace workspace_;  // scratch of the attention over the cache; not part of the value
};

}  // namespace detail

/// Rows that a cache of scalar T stores: the same, or one that computes in the same.
template <class M, class T>
concept CacheRows = MatrixLike<M> && std::same_as<compute_t<scalar_t<M>>, compute_t<T>>;

template <StorageScalar T>
class KvCache : public detail::PanelStore<T> {
  using Store = detail::PanelStore<T>;

 public:
  using Store::kPanel;
  /// Whether queries of scalar U compute in what is stored.
  template <StorageScalar U>
  static constexpr bool serves = std::same_as<compute_t<U>, compute_t<T>>;

  KvCache() : KvCache(KvCacheOptions{}) {}
  /// Errors: kv_heads, head_dim < 1, value_dim < 0, capacity < 0, window < -1, chunk < 1, sinks < 0; fixed without capacity or
  /// with a window; sinks without a window.
  explicit KvCache(const KvCacheOptions& options) : Store("KvCache", options) {}

  Index bytes_per_token() const {
    const KvCacheOptions& o = this->options();
    return o.kv_heads * (o.head_dim + o.value_dim) * static_cast<Index>(sizeof(T));
  }

  /// Appends key and value rows.  Errors: invalid_argument for shapes; std::length_error when a fixed cache is full; nothing
  /// is written then.
  template <CacheRows<T> K, CacheRows<T> V>
  void append(const K& key, const V& value) {
    this->require_rows(key.rows(), key.cols(), value.rows(), value.cols());
    this->require_room(key.rows());
    const Index heads = this->options().kv_heads, d = this->options().head_dim,
                e = this->options().value_dim;
    this->append_rows(key.rows(), [&](Index r, Index at) {
      for (Index h = 0; h < heads; ++h) {
        detail::scatter(key.data() + r * key.outerStride() + h * d, d, this->key_to_fill(h, at),
                        kPanel);
        detail::scatter(value.data() + r * value.outerStride() + h * e, e,
                        this->value_to_fill(h, at), 1);
      }
    });
  }

  /// Copies positions [begin, end) out, token-major.  std::out_of_range unless they are stored:
  /// first() <= begin <= end <= size(), or all of them are sinks.
  Matrix<T> keys(Index begin, Index end) const {
    this->require_range(begin, end);
    const Index d = this->options().head_dim;
    Matrix<T> rows(end - begin, this->options().kv_heads * d);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < this->options().kv_heads; ++h) {
        const T* const key = this->key(h, this->slot(p));
        for (Index c = 0; c < d; ++c) rows(p - begin, h * d + c) = key[c * kPanel];
      }
    }
    return rows;
  }
  Matrix<T> values(Index begin, Index end) const {
    this->require_range(begin, end);
    const Index e = this->options().value_dim;
    Matrix<T> rows(end - begin, this->options().kv_heads * e);
    for (Index p = begin; p < end; ++p) {
      for (Index h = 0; h < this->options().kv_heads; ++h)
        std::copy_n(this->value_row(h, this->slot(p)), e, &rows(p - begin, h * e));
    }
    return rows;
  }

  /// Same options, positions and stored rows.
  friend bool operator==(const KvCache& a, const KvCache& b) {
    return a.same_positions(b, [&](Index begin, Index end) {
      return begin == end || (a.keys(begin, end) == b.keys(begin, end) &&
                              a.values(begin, end) == b.values(begin, end));
    });
  }
};

EIGENBLOCKS_NAMESPACE_END
