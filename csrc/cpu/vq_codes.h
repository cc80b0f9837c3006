// The numbers that the float32 scores of vq_nearest are made of, and how far off these scores can be. Included by
// vq.cpp only.
//
// With z' = z - c and e' = e - c, for any c, the score ||e'_k||^2 - 2 z'.e'_k is the squared distance less
// ||z'||^2, which is the same for all codes. c is the mean of some codes: the smaller e', the smaller the errors.
// Both differences and ||e'||^2 are taken in float64 and then rounded to float32, and the score is added up in
// float32 as ||e'||^2 + (-2 z'_1) e'_1 + ... By Higham, Accuracy and Stability of Numerical Algorithms, section 3.1,
// it is off by at most
//
//     g (E^2 + 2 ||z'|| E),   g = n u / (1 - n u),   n = D + 4,   u = 2^-24,   E = max_k ||e'_k||
//
// D of the n are for the additions, one for products that are not fused with them and two for rounding z' and e'.
// The last is far more than what float64 and underflow do: where E is not in 2^-30 .. 2^30, z' and e' are scaled by a
// power of two first, and rows with ||z'|| > 2^59 are not scored at all.
//
// The truth, the float64 distance as fastldm/reference/vq.py adds it up, is itself off by at most
//
//     g' (||z'|| + E)^2,   g' = n' v / (1 - n' v),   n' = D + 3,   v = 2^-53
//
// So the nearest code, ties included, is among those whose score is at most `slack`, twice the sum of both bounds,
// above the best.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "vec.h"
#include "vq.h"

namespace fastldm::FASTLDM_ISA {

using std::int64_t;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
static inline void widen_all(const T* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + Vec::lanes <= count; i += Vec::lanes) Vec::load(source + i).store(target + i);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) Vec::load_partial(source + i, rest).store_partial(target + i, rest);
}

// Elements first .. first + count - 1 as float32: in place or, if they have to be converted, in `converted`.
static inline const float* as_floats(DType dtype, const void* data, int64_t first, int64_t count, float* converted) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(data) + first;
    case DType::bfloat16:
      widen_all(static_cast<const bfloat16*>(data) + first, count, converted);
      break;
    case DType::float16:
      widen_all(static_cast<const float16*>(data) + first, count, converted);
      break;
  }
  return converted;
}

// The bound of this file's first comment.
struct Slack {
  double single, twice, largest;

  Slack(int64_t dim, double largest) : largest(largest) {
    const double n = static_cast<double>(dim + 4) * 0x1p-24;
    // Where it says nothing (D > 8 million) every code has to be compared in float64.
    single = n < 0.5 ? n / (1.0 - n) : __builtin_inf();
    twice = static_cast<double>(dim + 4) * 0x1p-53;
  }

  // For a row whose packed form has this sum of squares, 4 ||z'||^2 in float32.
  double operator()(float sum) const {
    // The last term is for squares that underflow.
    const double row_norm = 0.5 * __builtin_sqrt(static_cast<double>(sum)) * (1.0 + single) + 0x1p-50;
    const double reach = row_norm + largest;
    return 2.0 * (single * largest * (reach + row_norm) + twice * reach * reach);
  }
};

// The score that a code of a row may have to be the nearest, rounded up.
static inline float limit_above(float best, double slack) {
  const double limit = static_cast<double>(best) + slack;
  const float rounded = static_cast<float>(limit);
  return static_cast<double>(rounded) < limit ? __builtin_nextafterf(rounded, __builtin_inff()) : rounded;
}

// The codebook in panels of `width` codes: their ||e'||^2, then their first component, their second, ... Unused
// places of the last panels are at distance infinity. What does not fit in one chunk is packed chunk by chunk.
class Codes {
 public:
  Codes(const VQNearest& call, int width, int64_t panels_together)
      : width(width),
        panel_floats((1 + call.dim) * width),
        chunks(0),
        call_(call),
        centre_(call.dim),
        converted_(call.dim),
        chunk_panels_(plan(panels_together)),
        largest_of_panel_(chunk_panels_),
        packed_(chunk_panels_ * panel_floats) {}

  bool has_memory() const { return centre_.data && converted_.data && largest_of_panel_.data && packed_.data; }

  // Chooses centre and scale, measures E, and leaves the last chunk packed.
  void prepare() {
    find_centre();
    measure();
    const bool in_range = largest_ == 0.0 || (largest_ >= 0x1p-30 && largest_ <= 0x1p30);
    if (!in_range) {
      int exponent;
      __builtin_frexp(largest_, &exponent);
      scale_ = __builtin_ldexp(1.0, -exponent);
      measure();
    }
  }

  // Makes `chunk` the packed one.
  void load(int64_t chunk) {
    if (chunk != chunk_) pack(chunk);
  }

  double largest() const { return largest_; }
  const double* centre() const { return centre_.data; }
  double scale() const { return scale_; }

  int64_t chunk() const { return chunk_; }
  int64_t first_code() const { return chunk_ * chunk_panels_ * width; }
  int64_t panels() const { return chunk_panels_; }
  const float* packed() const { return packed_.data; }

  const int width;
  const int64_t panel_floats;
  int64_t chunks;

 private:
  // With what the threads take, a call stays below 1 MB: a chunk is 576 KB, which is 16384 codes of 8 dimensions.
  static constexpr int64_t chunk_bytes = 576 << 10;
  // Any c will do, and the mean of some codes is hardly further off than that of all.
  static constexpr int64_t centre_codes = 256;

  int64_t plan(int64_t together) {
    const int64_t groups = ceil_div(ceil_div(call_.codes, width), together);
    const int64_t group_bytes = together * panel_floats * static_cast<int64_t>(sizeof(float));
    const int64_t groups_of_chunk = ceil_div(groups, ceil_div(groups, larger(1, chunk_bytes / group_bytes)));
    chunks = ceil_div(groups, groups_of_chunk);
    return groups_of_chunk * together;
  }

  void find_centre() {
    // An odd step, for codebooks with a period.
    const int64_t step = ceil_div(call_.codes, centre_codes) | 1;
    for (int64_t d = 0; d < call_.dim; ++d) centre_[d] = 0.0;
    int64_t count = 0;
    for (int64_t k = 0; k < call_.codes; k += step, ++count) {
      const float* code = as_floats(call_.codebook_dtype, call_.codebook, k * call_.dim, call_.dim, converted_);
      for (int64_t d = 0; d < call_.dim; ++d) centre_[d] += static_cast<double>(code[d]);
    }
    for (int64_t d = 0; d < call_.dim; ++d) centre_[d] /= static_cast<double>(count);
  }

  void measure() {
    double largest = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      pack(chunk);
      for (int64_t p = 0; p < chunk_panels_; ++p) {
        if (largest_of_panel_[p] > largest) largest = largest_of_panel_[p];
      }
    }
    largest_ = __builtin_sqrt(largest);
  }

  void pack(int64_t chunk) {
    chunk_ = chunk;
    const int64_t grain = larger(1, 8192 / (width * call_.dim));
    parallel_for(chunk_panels_, grain, [this](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) largest_of_panel_[p] = pack_panel(p);
    });
  }

  // The largest ||e'||^2 in it.
  double pack_panel(int64_t panel) {
    constexpr int max_width = 2 * Vec::lanes;
    constexpr int64_t depth = 64;
    alignas(64) float converted[max_width * depth];
    alignas(64) double norms[max_width];
    float* const target = packed_ + panel * panel_floats;
    const int64_t first = first_code() + panel * width, dim = call_.dim;
    const int count = static_cast<int>(larger(0, smaller(width, call_.codes - first)));
    for (int w = 0; w < width; ++w) norms[w] = 0.0;
    if (count < width) std::memset(target, 0, static_cast<std::size_t>(panel_floats) * sizeof(float));
    for (int64_t begin = 0; begin < dim && count > 0; begin += depth) {
      const int64_t size = smaller(depth, dim - begin);
      const float* source;
      int64_t stride = dim;
      if (call_.codebook_dtype == DType::float32 || dim <= depth) {
        source = as_floats(call_.codebook_dtype, call_.codebook, first * dim + begin, count * size, converted);
      } else {
        for (int w = 0; w < count; ++w) {
          as_floats(call_.codebook_dtype, call_.codebook, (first + w) * dim + begin, size, converted + w * depth);
        }
        source = converted;
        stride = depth;
      }
      for (int64_t d = 0; d < size; ++d) {
        const double c = centre_[begin + d];
        float* const out = target + (1 + begin + d) * width;
        for (int w = 0; w < count; ++w) {
          const double centred = (static_cast<double>(source[w * stride + d]) - c) * scale_;
          norms[w] += centred * centred;
          out[w] = static_cast<float>(centred);
        }
      }
    }
    double largest = 0.0;
    for (int w = 0; w < width; ++w) {
      target[w] = w < count ? static_cast<float>(norms[w]) : __builtin_inff();
      if (norms[w] > largest) largest = norms[w];
    }
    return largest;
  }

  const VQNearest& call_;
  Scratch<double> centre_;
  Scratch<float> converted_;
  int64_t chunk_panels_;
  Scratch<double> largest_of_panel_;
  Scratch<float> packed_;
  int64_t chunk_ = -1;
  double scale_ = 1.0, largest_ = 0.0;
};

}  // namespace fastldm::FASTLDM_ISA
