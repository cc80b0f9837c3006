// What the plans of both operations on codebooks share.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/vq_rows.cuh"

namespace fastldm::cuda {

template <class T>
constexpr T vq_ceil_div(T count, T by) {
  return (count + by - 1) / by;
}

// The rows of z as VqRows has them, and their type.
struct VqGiven {
  const void* data;
  DType type;
  std::int64_t rows, inner, stride_outer, stride_inner, stride_dim;
  int dim;
};

inline VqNumbers vq_numbers(const void* data, DType type, std::int64_t span) {
  VqNumbers numbers = {};
  numbers.type = type;
  if (type == DType::float32) {
    numbers.wide = {static_cast<const float*>(data), span};
  } else {
    numbers.narrow = {static_cast<const std::uint16_t*>(data), span};
  }
  return numbers;
}

inline VqRows vq_rows(const VqGiven& z) {
  require(z.rows > 0 && z.dim > 0 && z.inner > 0 && z.rows % z.inner == 0, "rows must be some, and whole runs of inner");
  const std::int64_t span = (z.rows / z.inner - 1) * z.stride_outer + (z.inner - 1) * z.stride_inner +
                            (z.dim - 1) * z.stride_dim + 1;
  return {vq_numbers(z.data, z.type, span), z.rows, z.inner, z.stride_outer, z.stride_inner, z.stride_dim, z.dim};
}

// Hands out parts of one piece of working memory; without memory it only counts.
class VqMemory {
 public:
  explicit VqMemory(void* data) : data_(static_cast<char*>(data)) {}

  template <class T>
  Global<T> take(std::int64_t count) {
    const std::int64_t at = bytes_;
    bytes_ += vq_ceil_div<std::int64_t>(count * sizeof(T), 256) * 256;
    return {data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + at), count};
  }

  std::int64_t bytes() const { return bytes_; }

 private:
  char* data_;
  std::int64_t bytes_ = 0;
};

}  // namespace fastldm::cuda
