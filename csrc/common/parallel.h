// PyTorch's thread pool as kernels see it. They include no PyTorch header: a source is compiled once per
// instruction set, and an inline function of a shared header, compiled for AVX-512, could be the copy that the
// linker keeps for everybody.
#pragma once

#include <cstdint>

namespace fastldm {

// Splits 0 .. count - 1 into at most num_threads() ranges of at least `grain` and calls body(begin, end,
// context) on each, on several threads; returns when all are done. Nested calls run on the calling thread.
void parallel_ranges(std::int64_t count, std::int64_t grain,
                     void (*body)(std::int64_t begin, std::int64_t end, void* context), void* context);

int num_threads();

// The same for a callable (begin, end).
template <class Body>
static inline void parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
  parallel_ranges(
      count, grain,
      [](std::int64_t begin, std::int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

}  // namespace fastldm
