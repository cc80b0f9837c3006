// What happens to the scores between the matrix products of attention: masks, softmax, its gradient. Included by
// attention.cpp only.
//
// Scores lie as [key][query], so a lane is a query. They are in units in which the weights are exp2((s - m) * c):
// float operands carry the scale in q and c is log2(e); bfloat16 ones hold q as it is, so that c has the scale too
// unless a bias is added. The maximum is subtracted before the multiplication: exact where scores are huge and close
// to each other.
#pragma once

#include "attention_pack.h"

namespace fastldm::FASTLDM_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff(), kLargest = __FLT_MAX__, kSmallest = __FLT_MIN__;

// 2^x for x up to 127; 0 below -126, NaN for NaN. The integer part becomes the exponent, 2^r for the rest r in
// [0, 1) is a minimax polynomial that is 1 at 0: relative error 1e-7 for float operands, 3e-6, a thousandth of
// their rounding, for bfloat16.
static inline Vec exp2_fraction(Vec r, float) {
  Vec p = Vec::broadcast(0.0018671300705526133f);
  p = fma(p, r, Vec::broadcast(0.009017030320560936f));
  p = fma(p, r, Vec::broadcast(0.05579991310559192f));
  p = fma(p, r, Vec::broadcast(0.24016445015434035f));
  p = fma(p, r, Vec::broadcast(0.6931513118047012f));
  return fma(p, r, Vec::broadcast(1.0f));
}

static inline Vec exp2_fraction(Vec r, bfloat16) {
  Vec p = Vec::broadcast(0.013426684357627837f);
  p = fma(p, r, Vec::broadcast(0.05224247402931519f));
  p = fma(p, r, Vec::broadcast(0.24128020488949084f));
  p = fma(p, r, Vec::broadcast(0.6930448448731367f));
  return fma(p, r, Vec::broadcast(1.0f));
}

#if defined(__AVX512F__)
template <class E>
static inline Vec exp2(Vec x) {
  const Vec r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp2_fraction(r, E{}).v, x.v)};
}
#else
template <class E>
static inline Vec exp2(Vec x) {
  x = min(Vec::broadcast(128.0f), max(Vec::broadcast(-140.0f), x));
  const Vec nearest = round(x);
  const Vec whole = select_less(x, nearest, nearest - Vec::broadcast(1.0f), nearest);
  const Vec result = scale_by_power_of_two(exp2_fraction(x - whole, E{}), whole);
  return select_less(x, Vec::broadcast(-126.0f), Vec::broadcast(0.0f), keep_nan(result, x));
}
#endif

// What a mask adds to a block of scores: one number per key or one per key and query.
struct Bias {
  enum Kind { none, per_key, full } kind;
  const float* values;  // [key] or [key][query]
  int64_t ld;
  float factor;  // of the scores, to the units of the values
};

static inline void apply_bias(float* scores, int64_t ld, int64_t keys, int64_t width, const Bias& bias) {
  const Vec factor = Vec::broadcast(bias.factor), minus_infinity = Vec::broadcast(-kInfinity);
  for (int64_t k = 0; k < keys; ++k) {
    float* const line = scores + k * ld;
    const float* const values = bias.values + k * bias.ld;
    for (int64_t q = 0; q < width; q += Vec::lanes) {
      const Vec added = bias.kind == Bias::per_key ? Vec::broadcast(*values) : Vec::load(values + q);
      const Vec sum = fma(Vec::load(line + q), factor, added);
      // Not the sum where it is closed: the score there may be anything.
      select_less(added, Vec::broadcast(-kLargest), minus_infinity, sum).store(line + q);
    }
  }
}

// Closes the keys from `key` on that lie behind the queries from `query` on.
static inline void apply_causal(float* scores, int64_t ld, int64_t key, int64_t keys, int64_t query, int64_t width) {
  alignas(64) float index[Vec::lanes];
  for (int i = 0; i < Vec::lanes; ++i) index[i] = static_cast<float>(i);
  const Vec lane = Vec::load(index), minus_infinity = Vec::broadcast(-kInfinity);
  for (int64_t k = greater(0, query + 1 - key); k < keys; ++k) {
    for (int64_t q = 0; q < width; q += Vec::lanes) {
      const int64_t closed = lesser(key + k - query - q, Vec::lanes);
      if (closed <= 0) break;
      float* const line = scores + k * ld + q;
      select_less(lane, Vec::broadcast(static_cast<float>(closed)), minus_infinity, Vec::load(line)).store(line);
    }
  }
}

// The running maximum and sum of exp2 over the blocks of keys, and what the output so far has to be multiplied
// with, all per query.
struct Running {
  float *maximum, *sum, *correction;
};

// m where it is finite, else 0: what may be subtracted from a score of -infinity.
static inline Vec finite_reference(Vec m) {
  return select_less(m, Vec::broadcast(-kLargest), Vec::broadcast(0.0f), m);
}

// The reference that is subtracted follows the maximum only when that has grown by 2^8 in the weights: until then
// nothing has to be rescaled, and no number is in danger.
template <int vectors>
static inline bool follow_maximum(const float* scores, int64_t ld, int64_t keys, float c, const Running& running,
                                  Vec (&reference)[vectors]) {
  Vec top[vectors];
  for (Vec& t : top) t = Vec::broadcast(-kInfinity);
  for (int64_t k = 0; k < keys; ++k) {
    for (int v = 0; v < vectors; ++v) top[v] = max(top[v], Vec::load(scores + k * ld + v * Vec::lanes));
  }
  const Vec slack = min(Vec::broadcast(8.0f / c), Vec::broadcast(0.5f * kLargest)), times = Vec::broadcast(c);
  const Vec one = Vec::broadcast(1.0f);
  bool rescale = false;
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = v * Vec::lanes;
    const Vec before = Vec::load(running.maximum + at);
    const Vec after = select_less(before + slack, top[v], top[v], before);
    reference[v] = finite_reference(after);
    const Vec correction = exp2<float>((before - reference[v]) * times);
    after.store(running.maximum + at);
    correction.store(running.correction + at);
    (Vec::load(running.sum + at) * correction).store(running.sum + at);
    rescale |= reduce_max(one - correction) > 0.0f;
  }
  return rescale;
}

// A block of keys of the forward: scores become weights, exp2((s - m) c), in `weights`, the panel of the product
// with v; for float operands that is `scores` itself. Whether the output so far has to be rescaled.
template <int vectors>
static inline bool softmax_columns(float* scores, float* weights, int64_t ld, int64_t keys, float c,
                                   const Running& running) {
  static_cast<void>(weights);
  const Vec times = Vec::broadcast(c);
  Vec reference[vectors], sum[vectors];
  const bool rescale = follow_maximum<vectors>(scores, ld, keys, c, running, reference);
  for (Vec& s : sum) s = Vec::broadcast(0.0f);
  for (int64_t k = 0; k < keys; ++k) {
    for (int v = 0; v < vectors; ++v) {
      float* const at = scores + k * ld + v * Vec::lanes;
      const Vec weight = exp2<float>((Vec::load(at) - reference[v]) * times);
      sum[v] = sum[v] + weight;
      weight.store(at);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    float* const at = running.sum + v * Vec::lanes;
    (Vec::load(at) + sum[v]).store(at);
  }
  return rescale;
}

#if defined(__AVX512BF16__)
// (low, high) of each lane, rounded to bfloat16, as a unit.
static inline __m512i make_pairs(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}

// Zeros up to where a product over `keys` ends.
static inline void clear_pairs(bfloat16* pairs, int64_t ld, int64_t keys, int64_t width) {
  for (int64_t k = divide_up(keys, 2); k < Operand<bfloat16>::depth(keys); ++k) {
    zero(units(pairs) + k * ld, width);
  }
}

template <int vectors>
static inline bool softmax_columns(float* scores, bfloat16* weights, int64_t ld, int64_t keys, float c,
                                   const Running& running) {
  Vec reference[vectors], sum[vectors];
  const bool rescale = follow_maximum<vectors>(scores, ld, keys, c, running, reference);
  const Vec times = Vec::broadcast(c);
  for (Vec& s : sum) s = Vec::broadcast(0.0f);
  for (int64_t k = 0; k < keys; k += 2) {
    for (int v = 0; v < vectors; ++v) {
      const float* const at = scores + k * ld + v * Vec::lanes;
      const Vec low = exp2<bfloat16>((Vec::load(at) - reference[v]) * times);
      Vec high = Vec::broadcast(0.0f);
      if (k + 1 < keys) high = exp2<bfloat16>((Vec::load(at + ld) - reference[v]) * times);
      sum[v] = sum[v] + (low + high);
      _mm512_storeu_si512(weights + k * ld + 2 * v * Vec::lanes, make_pairs(low, high));
    }
  }
  for (int v = 0; v < vectors; ++v) {
    float* const at = running.sum + v * Vec::lanes;
    (Vec::load(at) + sum[v]).store(at);
  }
  return rescale;
}
#endif

template <class E>
static bool softmax_block(float* scores, E* weights, int64_t ld, int64_t keys, int64_t width, float c,
                          const Running& running) {
  bool rescale = false;
  for (int64_t q = 0; q < width;) {
    const int vectors = next_vectors((width - q) / Vec::lanes);
    const Running here = {running.maximum + q, running.sum + q, running.correction + q};
    E* const target = weights + q * Operand<E>::unit;
    if constexpr (kVectors == 3) {
      if (vectors == 3) rescale |= softmax_columns<3>(scores + q, target, ld, keys, c, here);
      if (vectors == 2) rescale |= softmax_columns<2>(scores + q, target, ld, keys, c, here);
    }
    if (vectors == 1) rescale |= softmax_columns<1>(scores + q, target, ld, keys, c, here);
    q += vectors * Vec::lanes;
  }
#if defined(__AVX512BF16__)
  if constexpr (Operand<E>::unit == 2) clear_pairs(weights, ld, keys, width);
#endif
  return rescale;
}

static inline void multiply_lines(float* target, int64_t ld, int64_t lines, int64_t width, const float* factors) {
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t q = 0; q < width; q += Vec::lanes) {
      float* const at = target + line * ld + q;
      (Vec::load(at) * Vec::load(factors + q)).store(at);
    }
  }
}

// 1 / sum, or 0 in a row without keys.
static inline Vec inverse_sum(Vec sum) {
  return select_less(sum, Vec::broadcast(kSmallest), Vec::broadcast(0.0f), Vec::broadcast(1.0f) / sum);
}

// What the backward knows of its queries: weights are exp2((s - reference) c) * factor, delta is the sum over keys
// of weight times gradient of the weight.
struct RowStatistics {
  float *reference, *factor, *delta;

  RowStatistics from(int64_t first) const { return {reference + first, factor + first, delta + first}; }
};

// The weights and the gradient of the scores from it, P (dP - delta). A weight of 0 makes 0 of any dP.
template <class E>
static inline void differentiate(Vec score, Vec grad, Vec reference, Vec times, Vec factor, Vec delta, Vec& weight,
                                 Vec& result) {
  weight = exp2<E>((score - reference) * times) * factor;
  result = select_less(weight, Vec::broadcast(kSmallest), Vec::broadcast(0.0f), weight * (grad - delta));
}

// A block of keys of the backward. In: scores and dP = dout v^T, [key][query]. Out: the weights as rows, the
// gradient of the scores as rows and as a panel. Float operands: in place, rows and panel are one.
static inline void softmax_gradient(float* scores, float* grads, int64_t ld, int64_t keys, int64_t width, float c,
                                    const RowStatistics& statistics) {
  const Vec times = Vec::broadcast(c);
  for (int64_t q = 0; q < width; q += Vec::lanes) {
    const Vec reference = Vec::load(statistics.reference + q), factor = Vec::load(statistics.factor + q);
    const Vec delta = Vec::load(statistics.delta + q);
    for (int64_t k = 0; k < keys; ++k) {
      float *const score = scores + k * ld + q, *const grad = grads + k * ld + q;
      Vec weight, result;
      differentiate<float>(Vec::load(score), Vec::load(grad), reference, times, factor, delta, weight, result);
      weight.store(score);
      result.store(grad);
    }
  }
}

#if defined(__AVX512BF16__)
static inline void softmax_gradient(const float* scores, const float* grads, bfloat16* weight_rows,
                                    bfloat16* grad_rows, bfloat16* grad_panel, int64_t ld, int64_t keys,
                                    int64_t width, float c, const RowStatistics& statistics) {
  const Vec times = Vec::broadcast(c);
  for (int64_t q = 0; q < width; q += Vec::lanes) {
    const Vec reference = Vec::load(statistics.reference + q), factor = Vec::load(statistics.factor + q);
    const Vec delta = Vec::load(statistics.delta + q);
    for (int64_t k = 0; k < keys; k += 2) {
      Vec result[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (k + i) * ld + q;
        Vec weight = Vec::broadcast(0.0f);
        result[i] = weight;
        if (k + i < keys) {
          differentiate<bfloat16>(Vec::load(scores + at), Vec::load(grads + at), reference, times, factor, delta,
                                  weight, result[i]);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight_rows + at), (__m256i)_mm512_cvtneps_pbh(weight.v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(grad_rows + at), (__m256i)_mm512_cvtneps_pbh(result[i].v));
      }
      _mm512_storeu_si512(grad_panel + k * ld + 2 * q, make_pairs(result[0], result[1]));
    }
  }
  clear_pairs(grad_panel, ld, keys, width);
}
#endif

// One block of keys of the statistics of rows whose log-sum-exp is too large to stand for maximum and sum:
// `totals` gathers the sum over keys of weight times dP, and the running values are exact.
static inline void gather_statistics(const float* scores, const float* grads, int64_t ld, int64_t keys, int64_t width,
                                     float c, float* maximum, float* sum, float* totals) {
  const Vec times = Vec::broadcast(c);
  for (int64_t q = 0; q < width; q += Vec::lanes) {
    const Vec before = Vec::load(maximum + q);
    Vec top = before;
    for (int64_t k = 0; k < keys; ++k) top = max(top, Vec::load(scores + k * ld + q));
    const Vec reference = finite_reference(top);
    const Vec correction = exp2<float>((before - reference) * times);
    Vec block_sum = Vec::broadcast(0.0f), block_total = block_sum;
    for (int64_t k = 0; k < keys; ++k) {
      const Vec weight = exp2<float>((Vec::load(scores + k * ld + q) - reference) * times);
      const Vec product = weight * Vec::load(grads + k * ld + q);
      block_sum = block_sum + weight;
      block_total = block_total + select_less(weight, Vec::broadcast(kSmallest), Vec::broadcast(0.0f), product);
    }
    top.store(maximum + q);
    fma(Vec::load(sum + q), correction, block_sum).store(sum + q);
    fma(Vec::load(totals + q), correction, block_total).store(totals + q);
  }
}

}  // namespace fastldm::FASTLDM_ISA
