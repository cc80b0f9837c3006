// Vec in plain C++, for every machine. Included by vec.h only.
#pragma once

namespace fastldm::FASTLDM_ISA {

static inline float widen(float x) { return x; }

static inline float from_bits(std::uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

static inline std::uint32_t to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float widen(bfloat16 x) { return from_bits(static_cast<std::uint32_t>(x.bits) << 16); }

static inline float widen(float16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const std::uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 0x1fu) return from_bits(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
}

static inline void narrow(float x, float& target) { target = x; }

// Round to nearest even; NaN stays NaN.
static inline void narrow(float x, bfloat16& target) {
  const std::uint32_t bits = to_bits(x);
  const std::uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  target.bits = static_cast<std::uint16_t>(rounded >> 16);
}

static inline void narrow(float x, float16& target) {
  const std::uint32_t bits = to_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // from halfway between 65504 and 65536 on
  } else if (magnitude < 0x38800000u) {
    // Below the normal range: adding 0.5 rounds at 2^-24, the step there.
    result = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  target.bits = static_cast<std::uint16_t>(sign | result);
}

struct Vec {
  static constexpr int lanes = 8;
  float v[lanes];

  static Vec broadcast(float x) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = x;
    return r;
  }

  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = widen(p[i]);
    return r;
  }

  // The first `count` (0 .. lanes) elements; the other lanes are 0 and their memory is not touched.
  template <class T>
  static Vec load_partial(const T* p, int count) {
    Vec r = broadcast(0.0f);
    for (int i = 0; i < count; ++i) r.v[i] = widen(p[i]);
    return r;
  }

  template <class T>
  void store(T* p) const {
    for (int i = 0; i < lanes; ++i) narrow(v[i], p[i]);
  }

  template <class T>
  void store_partial(T* p, int count) const {
    for (int i = 0; i < count; ++i) narrow(v[i], p[i]);
  }
};

template <class F>
static inline Vec map(const F& f) {
  Vec r;
  for (int i = 0; i < Vec::lanes; ++i) r.v[i] = f(i);
  return r;
}

static inline Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
static inline Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
static inline Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
static inline Vec operator/(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c, rounded twice: a fused one is a slow library call where the machine has none.
static inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// The second operand where either is NaN.
static inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline Vec min(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// To the nearest whole number, ties to even, for |a| < 2^22.
static inline Vec round(Vec a) {
  return map([&](int i) { return (a.v[i] + 0x1.8p23f) - 0x1.8p23f; });
}

static inline float reduce_add(Vec a) {
  for (int width = Vec::lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}

static inline float reduce_max(Vec a) {
  for (int width = Vec::lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}

// x * 2^n for whole n in -150 .. 129 and x in 0.5 .. 2, with underflow to 0 and overflow to infinity.
static inline Vec scale_by_power_of_two(Vec x, Vec n) {
  return map([&](int i) {
    // In two steps: 2^n itself may be out of range.
    const int whole = static_cast<int>(n.v[i]);
    const int half = whole >> 1;
    return x.v[i] * from_bits(static_cast<std::uint32_t>(half + 127) << 23) *
           from_bits(static_cast<std::uint32_t>(whole - half + 127) << 23);
  });
}
// `result`, but NaN where `x` is.
static inline Vec keep_nan(Vec result, Vec x) {
  return map([&](int i) { return x.v[i] != x.v[i] ? x.v[i] : result.v[i]; });
}
// x where a < b, else y; y where either is NaN.
static inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return map([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
// Bit i is 1 unless a > b in lane i, so also where either is NaN.
static inline std::uint32_t bits_not_greater(Vec a, Vec b) {
  std::uint32_t bits = 0;
  for (int i = 0; i < Vec::lanes; ++i) bits |= static_cast<std::uint32_t>(!(a.v[i] > b.v[i])) << i;
  return bits;
}

}  // namespace fastldm::FASTLDM_ISA
