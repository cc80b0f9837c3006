// Working memory of one call or one thread.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace fastldm {

// 64-byte aligned, uninitialised, freed at the end of the scope. `data` is null where memory has run out.
template <class T>
struct Scratch {
  T* data;

  explicit Scratch(std::size_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator T*() { return data; }
};

}  // namespace fastldm
