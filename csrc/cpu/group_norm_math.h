// What both layouts of group norm share: vectors in pairs, SiLU, statistics, and the numbers of one channel.
// Included by the other group norm headers only.
#pragma once

#include <cfloat>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "group_norm.h"
#include "vec.h"

namespace fastldm::FASTLDM_ISA {

// Two vectors, the unit of every loop here: a cache line of 2-byte elements.
struct Pair {
  Vec a, b;

  static Pair broadcast(float x) { return {Vec::broadcast(x), Vec::broadcast(x)}; }
};

constexpr int kPair = 2 * Vec::lanes;

template <class T>
static inline Pair load_pair(const T* p) {
  return {Vec::load(p), Vec::load(p + Vec::lanes)};
}

template <class T>
static inline void store_pair(T* p, Pair x) {
  x.a.store(p);
  x.b.store(p + Vec::lanes);
}

// As store_pair, past the caches. `p` is aligned to the size of what is stored.
template <class T>
static inline void stream_pair(T* p, Pair x) {
  store_pair(p, x);
}

// Whether load_pair takes the even elements into `a` and the odd ones into `b`.
template <class T>
constexpr bool interleaved = false;

#if defined(__AVX512F__)

// Two bfloat16 share a 32-bit word, and a shift or a mask makes either a float32: half the work of widening
// neighbours, and a quarter of it on the way back. Rounds to nearest even. A NaN must have its low 16 bits clear,
// as all have that come from bfloat16 or arithmetic (see quiet_nan).
template <>
constexpr bool interleaved<bfloat16> = true;

template <>
inline Pair load_pair(const bfloat16* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
}

static inline __m512i round_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
}

static inline __m512i interleave_bf16(Pair x) {
  const __m512i even = _mm512_srli_epi32(round_to_bf16(x.a), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, even, round_to_bf16(x.b));
}

template <>
inline void store_pair(bfloat16* p, Pair x) {
  _mm512_storeu_si512(p, interleave_bf16(x));
}

template <>
inline void stream_pair(bfloat16* p, Pair x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), interleave_bf16(x));
}

template <>
inline void stream_pair(float* p, Pair x) {
  _mm512_stream_ps(p, x.a.v);
  _mm512_stream_ps(p + Vec::lanes, x.b.v);
}

// -120 .. 120, also for NaN.
static inline Vec limit_exponent(Vec t) {
  constexpr int smaller_magnitude = 2;  // with the sign of t
  return {_mm512_range_ps(t.v, _mm512_set1_ps(120.0f), smaller_magnitude)};
}

// p * 2^n, given 1.5 * 2^23 + n.
static inline Vec add_exponent(Vec p, Vec shifted) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), n))};
}

// t / d, off by a last place or, coarse, by 2^-14; 1 / d is to be a normal number. A division takes as long as the
// rest of SiLU.
template <bool Coarse>
static inline Vec quotient(Vec t, Vec d) {
  __m512 reciprocal = _mm512_rcp14_ps(d.v);
  if constexpr (!Coarse) {
    const __m512 error = _mm512_fnmadd_ps(d.v, reciprocal, _mm512_set1_ps(1.0f));
    reciprocal = _mm512_fmadd_ps(reciprocal, error, reciprocal);
  }
  return {_mm512_mul_ps(t.v, reciprocal)};
}

#elif defined(__AVX2__)

// As for AVX-512, above.
template <>
constexpr bool interleaved<bfloat16> = true;

template <>
inline Pair load_pair(const bfloat16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
}

static inline __m256i round_to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

static inline __m256i interleave_bf16(Pair x) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16(x.a), 16);
  return _mm256_blend_epi16(even, round_to_bf16(x.b), 0xaa);
}

template <>
inline void store_pair(bfloat16* p, Pair x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), interleave_bf16(x));
}

template <>
inline void stream_pair(bfloat16* p, Pair x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), interleave_bf16(x));
}

template <>
inline void stream_pair(float* p, Pair x) {
  _mm256_stream_ps(p, x.a.v);
  _mm256_stream_ps(p + Vec::lanes, x.b.v);
}

static inline Vec limit_exponent(Vec t) {
  return min(max(t, Vec::broadcast(-120.0f)), Vec::broadcast(120.0f));
}

static inline Vec add_exponent(Vec p, Vec shifted) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), n))};
}

template <bool Coarse>
static inline Vec quotient(Vec t, Vec d) {
  return t / d;
}

#else

static inline Vec limit_exponent(Vec t) {
  return min(max(t, Vec::broadcast(-120.0f)), Vec::broadcast(120.0f));
}

static inline Vec add_exponent(Vec p, Vec shifted) {
  return map([&](int i) { return from_bits(to_bits(p.v[i]) + (to_bits(shifted.v[i]) << 23)); });
}

template <bool Coarse>
static inline Vec quotient(Vec t, Vec d) {
  return t / d;
}

#endif

// Makes streamed stores visible before the threads meet.
static inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T>
static inline bool can_stream(const T* p, std::int64_t row_length) {
  return reinterpret_cast<std::uintptr_t>(p) % 64 == 0 && row_length * sizeof(T) % 64 == 0;
}

// Where the loops of each_pair stand: on a whole pair, or on the last `count` elements of a row.
template <bool Stream>
struct Whole {
  template <class T>
  Pair load(const T* p) const {
    return load_pair(p);
  }
  template <class T>
  void store(T* p, Pair x) const {
    if constexpr (Stream) {
      stream_pair(p, x);
    } else {
      store_pair(p, x);
    }
  }
  Pair broadcast(float x) const { return Pair::broadcast(x); }
};

// Absent elements are 0 and not written.
struct Part {
  int count;

  template <class T>
  Pair load(const T* p) const {
    if (count <= Vec::lanes) return {Vec::load_partial(p, count), Vec::broadcast(0.0f)};
    return {Vec::load(p), Vec::load_partial(p + Vec::lanes, count - Vec::lanes)};
  }
  template <class T>
  void store(T* p, Pair x) const {
    if (count <= Vec::lanes) {
      x.a.store_partial(p, count);
    } else {
      x.a.store(p);
      x.b.store_partial(p + Vec::lanes, count - Vec::lanes);
    }
  }
  Pair broadcast(float x) const {
    float all[kPair];
    store_pair(all, Pair::broadcast(x));
    return load(all);
  }
};

// body(position, Whole or Part) over a row.
template <bool Stream = false, class Body>
static inline void each_pair(std::int64_t length, const Body& body) {
  std::int64_t i = 0;
  for (; i + kPair <= length; i += kPair) body(i, Whole<Stream>{});
  if (i < length) body(i, Part{static_cast<int>(length - i)});
}

static inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Elements worth a thread.
constexpr std::int64_t kGrain = 16384;

// body(begin, end) over units of `unit_length` elements: on all threads, or all here.
template <class Body>
static inline void for_units(bool threads, std::int64_t units, std::int64_t unit_length, const Body& body) {
  if (threads) {
    parallel_for(units, divide_up(kGrain, unit_length), body);
  } else {
    body(0, units);
  }
}

// SiLU. t = -log2(e) u costs nothing where u is a product, so all below begin there.

constexpr float kMinusLog2E = -1.44269504088896341f;

// 2^t has t limited to +-120, which keeps it and its reciprocal normal numbers. So t itself must not be huge: see
// Saturation.
constexpr double kLargestExponent = 120.0;

// exp(-u) = 2^t, relative error 2^-22 or, coarse, 2^-13. The polynomials are minimax for 2^f over |f| <= 1/2.
template <bool Coarse>
static inline Vec exp2_limited(Vec t) {
  const Vec magic = Vec::broadcast(0x1.8p23f);  // adding it rounds to a whole number
  t = limit_exponent(t);
  const Vec shifted = t + magic;
  const Vec f = t - (shifted - magic);
  Vec p;
  if constexpr (Coarse) {
    p = Vec::broadcast(0.05517167f);
    p = fma(p, f, Vec::broadcast(0.24261113f));
    p = fma(p, f, Vec::broadcast(0.69326097f));
    p = fma(p, f, Vec::broadcast(0.99992806f));
  } else {
    p = Vec::broadcast(0.0013276472f);
    p = fma(p, f, Vec::broadcast(0.009675541f));
    p = fma(p, f, Vec::broadcast(0.05550713f));
    p = fma(p, f, Vec::broadcast(0.2402212f));
    p = fma(p, f, Vec::broadcast(0.69314694f));
    p = fma(p, f, Vec::broadcast(1.0f));
  }
  return add_exponent(p, shifted);
}

template <class T>
constexpr bool coarse_is_enough = false;
template <>
constexpr bool coarse_is_enough<bfloat16> = true;

// u sigmoid(u) = t / (-log2(e) (1 + exp(-u))), for a result of type T.
template <class T>
static inline Vec silu(Vec t) {
  const Vec scale = Vec::broadcast(kMinusLog2E);
  constexpr bool coarse = coarse_is_enough<T>;
  return quotient<coarse>(t, fma(exp2_limited<coarse>(t), scale, scale));
}

// d(u sigmoid(u))/du / -log2(e).
static inline Vec silu_slope(Vec t) {
  const Vec one = Vec::broadcast(1.0f), scale = Vec::broadcast(kMinusLog2E);
  const Vec e = exp2_limited<false>(t);
  const Vec s = quotient<false>(one, fma(e, scale, scale));  // sigmoid(u) / -log2(e)
  // sigmoid (1 + u (1 - sigmoid)), 1 - sigmoid written as exp(-u) sigmoid, which does not cancel.
  return s * fma(t, e * s, one);
}

// Elements whose sums run in float32, around a value near their mean; beyond, sums are float64.
constexpr std::int64_t kBlock = 8192;

// Count, mean and sum of squares around the mean.
struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;

  // Chan, Golub and LeVeque, The American Statistician 37, 1983.
  void merge(const Moments& other) {
    const double total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }
};

// From sums of x - shift and (x - shift)^2.
static inline Moments moments_around(double shift, double count, double sum, double squares) {
  const double offset = sum / count, around_mean = squares - sum * offset;
  return {count, shift + offset, around_mean < 0.0 ? 0.0 : around_mean};  // NaN stays
}

// Sums around a shift far from the mean cancel: what counts is squares - sum^2 / count. Where that costs two bits
// a block is summed again around the mean that came out. Once is enough: the mean of k among n elements is at most
// sqrt(n / k) standard deviations from that of all, so what came out is off in its last places only.
constexpr float kMostCancelled = 0.75f;

// Beyond 1e17 or so squares leave the range of float32.
template <class T>
static Moments moments_in_double(const T* x, std::int64_t count, std::int64_t stride) {
  Moments moments{static_cast<double>(count)};
  for (std::int64_t i = 0; i < count; ++i) moments.mean += static_cast<double>(to_float(x[i * stride]));
  moments.mean /= moments.count;
  for (std::int64_t i = 0; i < count; ++i) {
    const double d = static_cast<double>(to_float(x[i * stride])) - moments.mean;
    moments.squares += d * d;
  }
  return moments;
}

static inline double reciprocal_std(double variance, float eps) {
  return 1.0 / __builtin_sqrt(variance + static_cast<double>(eps));
}

// A NaN with a payload could round to a number in round_to_bf16.
static inline float quiet_nan(double x) { return x == x ? static_cast<float>(x) : __builtin_nanf(""); }

// One channel of one sample: with r the reciprocal standard deviation of its group,
//   u = ((x - centre) * r - residual * r) * gain + offset
// The channel bias is part of `centre`; the residual is what float32 cannot hold of it, which counts where the
// mean is far from 0.
struct Channel {
  float centre;
  double residual, gain, offset;

  Channel(const GroupNormProblem& call, std::int64_t n, std::int64_t c, double mean) {
    const std::int64_t nc = n * call.channels + c;
    const double exact = call.channel_bias ? mean - static_cast<double>(call.channel_bias[nc]) : mean;
    centre = quiet_nan(exact);
    residual = exact - static_cast<double>(centre);
    const double scale = call.scale ? 1.0 + static_cast<double>(call.scale[nc]) : 1.0;
    gain = call.weight ? static_cast<double>(call.weight[c]) * scale : scale;
    offset = call.bias ? static_cast<double>(call.bias[c]) * scale : 0.0;
    if (call.shift) offset += static_cast<double>(call.shift[nc]);
  }
};

// Whether the argument t = -log2(e) u of SiLU is beyond the limit of its exponent for a whole channel: |xhat| is at
// most sqrt(elements) in a group. The loops would multiply the limited exponential by the unlimited t.
struct Saturation {
  bool low, high;  // u far below and far above 0; neither where anything is infinite or NaN

  Saturation(const GroupNormProblem& call, const Channel& channel) {
    const double elements = static_cast<double>(call.channels / call.groups * call.pixels);
    const double scale = static_cast<double>(kMinusLog2E), t = scale * channel.offset;
    const double reach = __builtin_fabs(scale * channel.gain) * __builtin_sqrt(elements) + kLargestExponent;
    low = t > reach && t < __builtin_inf();
    high = t < -reach && t > -__builtin_inf();
  }
};

// y = act'((x - centre) * a + b), where act' takes -log2(e) u for SiLU and u for none.
struct Affine {
  float centre, a, b;

  Affine(const GroupNormProblem& call, const Channel& channel, double rstd) : centre(channel.centre) {
    const double scale = call.silu ? static_cast<double>(kMinusLog2E) : 1.0, slope = channel.gain * rstd;
    a = quiet_nan(scale * slope);
    b = quiet_nan(scale * (channel.offset - channel.residual * slope));
    if (!call.silu) return;
    if (Saturation(call, channel).low) a = b = 0.0f;  // SiLU(0) is 0, too
    if (channel.offset == -__builtin_inf()) b = __builtin_nanf("");  // -inf * 0
  }
};

template <class T, bool Silu>
static inline Vec activate(Vec x, Vec centre, Vec a, Vec b) {
  const Vec u = fma(x - centre, a, b);
  if constexpr (Silu) return silu<T>(u);
  return u;
}

}  // namespace fastldm::FASTLDM_ISA
