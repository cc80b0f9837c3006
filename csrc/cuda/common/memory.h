// Memory as kernels see it: views of global and shared memory, which on a GPU are bare pointers and under the
// shim know their bounds, and in shared memory who touched what since which barrier.
//
// Offsets count elements. No kernel holds a pointer.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "cuda/common/platform.h"

namespace fastldm::cuda {

// N elements in registers.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  static_assert((N & (N - 1)) == 0, "a vector has a power of two of elements");
  T lane[N];
  FASTLDM_HOST_DEVICE T& operator[](int i) { return lane[i]; }
  FASTLDM_HOST_DEVICE const T& operator[](int i) const { return lane[i]; }
};

// `streaming` marks what nobody will read again soon, first to leave the caches.
enum class Cache { normal, streaming };

namespace detail {

// Bytes of one instruction for a run of `bytes` at an address that is a multiple of `align`.
FASTLDM_HOST_DEVICE constexpr int chunk_bytes(int bytes, int align) {
  const int most = bytes < align ? bytes : align;
  return most < 16 ? most : 16;
}

#ifndef FASTLDM_HOST_SHIM
template <int Bytes>
struct Chunk;
template <>
struct Chunk<1> {
  using type = unsigned char;
};
template <>
struct Chunk<2> {
  using type = unsigned short;
};
template <>
struct Chunk<4> {
  using type = unsigned int;
};
template <>
struct Chunk<8> {
  using type = uint2;
};
template <>
struct Chunk<16> {
  using type = uint4;
};

template <Cache Policy, bool ReadOnly, class Word>
FASTLDM_DEVICE Word load_word(const Word* from) {
  if constexpr (Policy == Cache::streaming) {
    return __ldcs(from);
  } else if constexpr (ReadOnly) {
    return __ldg(from);
  } else {
    return *from;
  }
}

template <Cache Policy, class Word>
FASTLDM_DEVICE void store_word(Word* to, Word word) {
  if constexpr (Policy == Cache::streaming) {
    __stcs(to, word);
  } else {
    *to = word;
  }
}

template <int Align, Cache Policy, bool ReadOnly, class Value>
FASTLDM_DEVICE Value load_value(const void* from) {
  constexpr int bytes = chunk_bytes(sizeof(Value), Align);
  using Word = typename Chunk<bytes>::type;
  Word words[sizeof(Value) / bytes];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Value) / bytes); ++i) {
    words[i] = load_word<Policy, ReadOnly>(static_cast<const Word*>(from) + i);
  }
  Value value;
  memcpy(&value, words, sizeof(Value));
  return value;
}

template <int Align, Cache Policy, class Value>
FASTLDM_DEVICE void store_value(void* to, const Value& value) {
  constexpr int bytes = chunk_bytes(sizeof(Value), Align);
  using Word = typename Chunk<bytes>::type;
  Word words[sizeof(Value) / bytes];
  memcpy(words, &value, sizeof(Value));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Value) / bytes); ++i) {
    store_word<Policy>(static_cast<Word*>(to) + i, words[i]);
  }
}
#endif

}  // namespace detail

// A view of global memory. `Global<const T>` is read through the read-only path: nothing that runs at the same
// time may write there. `count` is the number of elements from the first to the last that may be touched; for a
// strided tensor, of its whole span.
template <class T>
class Global {
 public:
  using Value = std::remove_const_t<T>;

  Global() = default;
#ifdef FASTLDM_HOST_SHIM
  Global(T* data, std::int64_t count)
      : data_(data), begin_(reinterpret_cast<const char*>(data)), end_(begin_ + count * sizeof(T)) {}
#else
  FASTLDM_HOST_DEVICE Global(T* data, std::int64_t) : data_(data) {}
#endif

  FASTLDM_HOST_DEVICE explicit operator bool() const { return data_ != nullptr; }

  FASTLDM_HOST_DEVICE Global operator+(std::int64_t offset) const {
    Global moved = *this;
    moved.data_ += offset;
    return moved;
  }

  // A view for writing serves where one for reading is wanted.
  template <class U, class = std::enable_if_t<std::is_same_v<T, const U>>>
  FASTLDM_HOST_DEVICE Global(const Global<U>& other) : data_(other.data_) {
#ifdef FASTLDM_HOST_SHIM
    begin_ = other.begin_;
    end_ = other.end_;
#endif
  }

  template <Cache Policy = Cache::normal>
  FASTLDM_DEVICE Value load(std::int64_t i = 0) const {
    return get<Value, sizeof(Value), Policy>(i);
  }

  template <Cache Policy = Cache::normal>
  FASTLDM_DEVICE void store(std::int64_t i, Value value) const {
    put<Value, sizeof(Value), Policy>(i, value);
  }

  // Elements i .. i + N - 1. `Align` is what the plan knows of the address, in bytes: with less than the vector
  // has, several narrower instructions are used; the shim refuses an address that breaks the promise.
  template <int N, int Align = sizeof(Value) * N, Cache Policy = Cache::normal>
  FASTLDM_DEVICE Vec<Value, N> load_vector(std::int64_t i = 0) const {
    return get<Vec<Value, N>, Align, Policy>(i);
  }

  template <int N, int Align = sizeof(Value) * N, Cache Policy = Cache::normal>
  FASTLDM_DEVICE void store_vector(std::int64_t i, const Vec<Value, N>& value) const {
    put<Vec<Value, N>, Align, Policy>(i, value);
  }

  // Adds to an integer and gives what was there; integers only, whose sum does not depend on the order.
  FASTLDM_DEVICE Value atomic_add(std::int64_t i, Value value) const {
    static_assert(std::is_integral_v<Value>, "sums of floats depend on the order");
#ifdef FASTLDM_HOST_SHIM
    check(i, sizeof(Value), sizeof(Value));
    const Value before = data_[i];
    data_[i] += value;
    return before;
#else
    using Word = std::conditional_t<sizeof(Value) == 8, unsigned long long, unsigned int>;
    return static_cast<Value>(atomicAdd(reinterpret_cast<Word*>(data_ + i), static_cast<Word>(value)));
#endif
  }

  // Leaves the lesser of the two and gives what was there: a float, made an integer of the same order, with an index
  // below it, finds the first of the least across blocks.
  FASTLDM_DEVICE Value atomic_min(std::int64_t i, Value value) const {
    static_assert(std::is_integral_v<Value>, "compare floats by an integer of the same order");
#ifdef FASTLDM_HOST_SHIM
    check(i, sizeof(Value), sizeof(Value));
    const Value before = data_[i];
    data_[i] = value < before ? value : before;
    return before;
#else
    using Wide = std::conditional_t<std::is_signed_v<Value>, long long, unsigned long long>;
    using Word = std::conditional_t<sizeof(Value) == 8, Wide, Value>;
    return static_cast<Value>(atomicMin(reinterpret_cast<Word*>(data_ + i), static_cast<Word>(value)));
#endif
  }

 private:
  template <class>
  friend class Global;
  friend struct Access;

  template <class Register, int Align, Cache Policy>
  FASTLDM_DEVICE Register get(std::int64_t i) const {
#ifdef FASTLDM_HOST_SHIM
    check(i, sizeof(Register), detail::chunk_bytes(sizeof(Register), Align));
    Register value;
    std::memcpy(&value, data_ + i, sizeof(value));
    return value;
#else
    return detail::load_value<Align, Policy, std::is_const_v<T>, Register>(data_ + i);
#endif
  }

  template <class Register, int Align, Cache Policy>
  FASTLDM_DEVICE void put(std::int64_t i, const Register& value) const {
    static_assert(!std::is_const_v<T>, "this view is for reading");
#ifdef FASTLDM_HOST_SHIM
    check(i, sizeof(Register), detail::chunk_bytes(sizeof(Register), Align));
    std::memcpy(data_ + i, &value, sizeof(value));
#else
    detail::store_value<Align, Policy>(data_ + i, value);
#endif
  }

  T* data_ = nullptr;
#ifdef FASTLDM_HOST_SHIM
  void check(std::int64_t i, int bytes, int align) const {
    shim::check_bounds("global", reinterpret_cast<const char*>(data_ + i), bytes, align, begin_, end_);
  }

  const char* begin_ = nullptr;
  const char* end_ = nullptr;
#endif
};

// A view of shared memory, of this block or (cluster.h, `peer`) of another of the cluster. Elements are of two
// bytes or more: the shim tells accesses apart by pairs of bytes.
template <class T>
class Shared {
 public:
  using Value = std::remove_const_t<T>;
  static_assert(sizeof(T) >= 2, "hold single bytes in 16 bits");

  Shared() = default;
#ifdef FASTLDM_HOST_SHIM
  Shared(char* data, std::int64_t count) : data_(data), begin_(data), end_(data + count * sizeof(T)) {}
#else
  FASTLDM_DEVICE Shared(char* data, std::int64_t) : data_(data) {}
#endif

  FASTLDM_DEVICE Shared operator+(int offset) const {
    Shared moved = *this;
    moved.data_ += offset * static_cast<int>(sizeof(T));
    return moved;
  }

  // A view for writing serves where one for reading is wanted.
  template <class U, class = std::enable_if_t<std::is_same_v<T, const U>>>
  FASTLDM_DEVICE Shared(const Shared<U>& other) : Shared(other.template as<T>()) {}

  // The same bytes as elements of another type.
  template <class U>
  FASTLDM_DEVICE Shared<U> as() const {
    Shared<U> view;
    view.data_ = data_;
#ifdef FASTLDM_HOST_SHIM
    view.begin_ = begin_;
    view.end_ = end_;
#endif
    return view;
  }

  FASTLDM_DEVICE Value load(int i = 0) const { return get<Value, sizeof(Value)>(i); }

  FASTLDM_DEVICE void store(int i, Value value) const { put<Value, sizeof(Value)>(i, value); }

  template <int N, int Align = sizeof(Value) * N>
  FASTLDM_DEVICE Vec<Value, N> load_vector(int i = 0) const {
    return get<Vec<Value, N>, Align>(i);
  }

  template <int N, int Align = sizeof(Value) * N>
  FASTLDM_DEVICE void store_vector(int i, const Vec<Value, N>& value) const {
    put<Vec<Value, N>, Align>(i, value);
  }

  FASTLDM_DEVICE Value atomic_add(int i, Value value) const {
    static_assert(std::is_integral_v<Value>, "sums of floats depend on the order");
    return atomic(i, value, [](Value a, Value b) { return static_cast<Value>(a + b); });
  }

  FASTLDM_DEVICE Value atomic_min(int i, Value value) const {
    static_assert(std::is_integral_v<Value>, "compare floats by an integer of the same order");
    return atomic(i, value, [](Value a, Value b) { return a < b ? a : b; });
  }

 private:
  template <class>
  friend class Shared;
  friend struct Access;

  template <class Register, int Align>
  FASTLDM_DEVICE Register get(int i) const {
    const char* from = data_ + i * static_cast<int>(sizeof(T));
    Register value;
#ifdef FASTLDM_HOST_SHIM
    shim::check_bounds("shared", from, sizeof(value), detail::chunk_bytes(sizeof(value), Align), begin_, end_);
    shim::shared_read(from, sizeof(value));
    std::memcpy(&value, from, sizeof(value));
#else
    value = detail::load_value<Align, Cache::normal, false, Register>(from);
#endif
    return value;
  }

  template <class Register, int Align>
  FASTLDM_DEVICE void put(int i, const Register& value) const {
    static_assert(!std::is_const_v<T>, "this view is for reading");
    char* to = data_ + i * static_cast<int>(sizeof(T));
#ifdef FASTLDM_HOST_SHIM
    shim::check_bounds("shared", to, sizeof(value), detail::chunk_bytes(sizeof(value), Align), begin_, end_);
    shim::shared_write(to, sizeof(value), false);
    std::memcpy(to, &value, sizeof(value));
#else
    detail::store_value<Align, Cache::normal>(to, value);
#endif
  }

  // On a GPU a loop of compare-and-swap: any combination, of 4 or 8 bytes.
  template <class Combine>
  FASTLDM_DEVICE Value atomic(int i, Value value, const Combine& combine) const {
    static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "atomics are of 4 or 8 bytes");
#ifdef FASTLDM_HOST_SHIM
    Value* at = reinterpret_cast<Value*>(data_) + i;
    const char* bytes = reinterpret_cast<const char*>(at);
    shim::check_bounds("shared", bytes, sizeof(Value), sizeof(Value), begin_, end_);
    shim::shared_write(bytes, sizeof(Value), true);
    const Value before = *at;
    *at = combine(before, value);
    return before;
#else
    using Word = std::conditional_t<sizeof(Value) == 8, unsigned long long, unsigned int>;
    Word* at = reinterpret_cast<Word*>(data_) + i;
    Word seen = *at, expected;
    do {
      expected = seen;
      seen = atomicCAS(at, expected, static_cast<Word>(combine(static_cast<Value>(expected), value)));
    } while (seen != expected);
    return static_cast<Value>(seen);
#endif
  }

  char* data_ = nullptr;
#ifdef FASTLDM_HOST_SHIM
  const char* begin_ = nullptr;
  const char* end_ = nullptr;
#endif
};

// The addresses inside views, for the other primitives only.
struct Access {
  template <class T>
  FASTLDM_DEVICE static auto* address(const Global<T>& view) {
    return view.data_;
  }
  template <class T>
  FASTLDM_DEVICE static char* address(const Shared<T>& view) {
    return view.data_;
  }
#ifdef FASTLDM_HOST_SHIM
  template <class View>
  static void check(const char* space, const View& view, int bytes, int align) {
    const char* from = reinterpret_cast<const char*>(view.data_);
    shim::check_bounds(space, from, bytes, align, view.begin_, view.end_);
  }
  template <class T>
  static Shared<T> moved(const Shared<T>& view, std::ptrdiff_t bytes) {
    Shared<T> result = view;
    result.data_ += bytes;
    result.begin_ += bytes;
    result.end_ += bytes;
    return result;
  }
#else
  template <class T>
  FASTLDM_DEVICE static unsigned shared_address(const Shared<T>& view) {
    return static_cast<unsigned>(__cvta_generic_to_shared(view.data_));
  }
#endif
};

// Where arrays lie in dynamic shared memory: the launch plan and the kernel call one function that takes them in
// turn, so that the plan's bytes are those that the kernel uses.
class SharedLayout {
 public:
  // The offset in bytes of `count` elements of T.
  template <class T>
  FASTLDM_HOST_DEVICE constexpr int take(int count, int align = 16) {
    const int offset = (bytes_ + align - 1) / align * align;
    bytes_ = offset + count * static_cast<int>(sizeof(T));
    return offset;
  }

  FASTLDM_HOST_DEVICE constexpr int bytes() const { return bytes_; }

 private:
  int bytes_ = 0;
};

#ifndef FASTLDM_HOST_SHIM
extern __shared__ __align__(128) char dynamic_shared_bytes[];
#endif

// `count` elements at a byte offset of dynamic shared memory, which begins at a multiple of 128.
template <class T>
FASTLDM_DEVICE Shared<T> dynamic_shared(int offset, int count) {
#ifdef FASTLDM_HOST_SHIM
  return {shim::dynamic_shared(offset, count * static_cast<int>(sizeof(T))), count};
#else
  return {dynamic_shared_bytes + offset, count};
#endif
}

// Declares `name`, a Shared<type> of `count` elements (a constant) in static shared memory.
#ifdef FASTLDM_HOST_SHIM
#define FASTLDM_SHARED(type, name, count)                                   \
  static const char name##_key = 0;                                         \
  const ::fastldm::cuda::Shared<type> name(                                 \
      ::fastldm::shim::static_shared(&name##_key, sizeof(type) * (count)), (count))
#else
#define FASTLDM_SHARED(type, name, count)                                    \
  __shared__ __align__(16) char name##_bytes[sizeof(type) * (count)];        \
  const ::fastldm::cuda::Shared<type> name(name##_bytes, (count))
#endif

}  // namespace fastldm::cuda
