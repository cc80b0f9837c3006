// Vector quantisation on the CPU: arguments and entry points. Contract: fastldm/ops/vq.py.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace fastldm {

struct VQNearest {
  DType z_dtype, codebook_dtype;
  std::int64_t rows, codes, dim;
  const void* z;         // (rows, dim) contiguous
  const void* codebook;  // (codes, dim) contiguous, finite
  std::int64_t* indices;  // (rows)
};

struct VQEmaUpdate {
  DType z_dtype;
  std::int64_t rows, codes, dim;
  const void* z;                // (rows, dim) contiguous
  const std::int64_t* indices;  // (rows), each in 0 .. codes - 1
  std::int64_t* counts;         // (codes)
  float* sums;                  // (codes, dim)
};

// Both return false where memory has run out.
struct VQKernels {
  bool (*nearest)(const VQNearest&);
  bool (*ema_update)(const VQEmaUpdate&);
};

}  // namespace fastldm
