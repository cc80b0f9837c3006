// vq_ema_update. Included by vq.cpp only.
//
// The rows of a code are added in their order, whatever the number of threads: each thread has components of its
// own. With few components there is one thread; reading the rows is most of the work then.
#pragma once

#include "vq_codes.h"

namespace fastldm::FASTLDM_ISA {

template <class T>
static void add_components(const VQEmaUpdate& call, int64_t begin, int64_t end) {
  const T* z = static_cast<const T*>(call.z);
  for (int64_t n = 0; n < call.rows; ++n, z += call.dim) {
    float* const sum = call.sums + call.indices[n] * call.dim;
    int64_t d = begin;
    for (; d + Vec::lanes <= end; d += Vec::lanes) (Vec::load(sum + d) + Vec::load(z + d)).store(sum + d);
    const int rest = static_cast<int>(end - d);
    if (rest > 0) (Vec::load_partial(sum + d, rest) + Vec::load_partial(z + d, rest)).store_partial(sum + d, rest);
  }
}

// For rows shorter than a vector.
static void add_short_rows(const VQEmaUpdate& call) {
  constexpr int64_t step = 64;
  float converted[step * Vec::lanes];
  for (int64_t first = 0; first < call.rows; first += step) {
    const int64_t count = smaller(step, call.rows - first);
    const float* z = as_floats(call.z_dtype, call.z, first * call.dim, count * call.dim, converted);
    for (int64_t n = 0; n < count; ++n, z += call.dim) {
      float* const sum = call.sums + call.indices[first + n] * call.dim;
      for (int64_t d = 0; d < call.dim; ++d) sum[d] += z[d];
    }
  }
}

static bool ema_update(const VQEmaUpdate& call) {
  std::memset(call.counts, 0, static_cast<std::size_t>(call.codes) * sizeof(int64_t));
  std::memset(call.sums, 0, static_cast<std::size_t>(call.codes * call.dim) * sizeof(float));
  for (int64_t n = 0; n < call.rows; ++n) ++call.counts[call.indices[n]];
  if (call.dim < Vec::lanes) {
    add_short_rows(call);
    return true;
  }
  const int64_t grain = larger(1, 32768 / (call.rows * Vec::lanes + 1));
  parallel_for(ceil_div(call.dim, Vec::lanes), grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * Vec::lanes, end = smaller(last * Vec::lanes, call.dim);
    switch (call.z_dtype) {
      case DType::float32:
        return add_components<float>(call, begin, end);
      case DType::bfloat16:
        return add_components<bfloat16>(call, begin, end);
      case DType::float16:
        return add_components<float16>(call, begin, end);
    }
  });
  return true;
}

}  // namespace fastldm::FASTLDM_ISA
