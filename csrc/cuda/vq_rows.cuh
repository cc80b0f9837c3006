// What the kernels on codebooks share: rows of any layout and type, and what a search finds for each.
#pragma once

#include "cuda/common/device.h"

namespace fastldm::cuda {

// Numbers of a type that is known when the kernel runs: every one is read once or twice, so that a branch costs less
// than an instance of each kernel for each pair of types.
struct VqNumbers {
  DType type;
  Global<const float> wide;            // one of the two, as `type` says
  Global<const std::uint16_t> narrow;

  FASTLDM_DEVICE float load(std::int64_t i) const {
    if (type == DType::float32) return wide.load(i);
    const std::uint16_t bits = narrow.load(i);
    return type == DType::float16 ? to_float(float16{bits}) : to_float(bfloat16{bits});
  }
};

// Row r begins at r / inner * stride_outer + r % inner * stride_inner, so that the NHWC view of an NCHW tensor needs
// no copy.
struct VqRows {
  VqNumbers numbers;
  std::int64_t count, inner, stride_outer, stride_inner, stride_dim;
  int dim;

  FASTLDM_DEVICE std::int64_t start(std::int64_t row) const {
    if (inner >= count) return row * stride_inner;
    return row / inner * stride_outer + row % inner * stride_inner;
  }
};

// Code k begins at k * stride_code.
struct VqCodebook {
  VqNumbers numbers;
  std::int64_t stride_code, stride_dim;
  int count, dim;

  FASTLDM_DEVICE float load(std::int64_t code, int d) const {
    return numbers.load(code * stride_code + d * stride_dim);
  }
};

// What a search leaves for each row and each of the splits of the codebook that share it, (splits, rows); `squares`
// are of rows alone, ||z'||^2, or NaN where z has NaN or infinity.
struct VqFound {
  Global<float> least, others;
  Global<std::int32_t> place;  // its first code
  Global<float> squares;
};

FASTLDM_DEVICE float vq_infinity() { return bits_as_float(0x7f800000u); }
FASTLDM_DEVICE float vq_nan() { return bits_as_float(0x7fc00000u); }

FASTLDM_DEVICE bool vq_is_finite(float x) { return x - x == 0.0f; }

}  // namespace fastldm::cuda
