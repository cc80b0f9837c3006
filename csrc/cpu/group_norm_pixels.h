// Group norm over (batch, pixels, channels): vectors run along the channels, so every channel has its own sums
// and constants, in rows as long as a pixel. Included by group_norm.cpp only.
//
// Those rows ("planes") are padded to `width`, a multiple of kPair, and in the order in which load_pair finds the
// elements of x: channel c is at slot(c).
#pragma once

#include "group_norm_gradient.h"
#include "group_norm_math.h"

namespace fastldm::FASTLDM_ISA {

// Samples up to this size stay in the cache of the one core that reads them twice; larger ones are shared among
// all threads.
constexpr std::int64_t kSampleBytes = 1 << 20;

template <class T>
static inline std::int64_t slot(std::int64_t c, std::int64_t channels) {
  const std::int64_t pair = c / kPair * kPair, i = c - pair;
  if (!interleaved<T> || pair + kPair > channels) return c;
  return pair + i / 2 + i % 2 * Vec::lanes;
}

// The pixels of a sample in parts whose sums run in float32: enough of them for many threads, which for small
// samples costs more time in merging. The parts do not depend on the number of threads.
struct Chunks {
  std::int64_t pixels, size, count;

  explicit Chunks(std::int64_t pixels) : pixels(pixels) {
    size = divide_up(pixels, 16);
    size = size < 32 ? 32 : size > 256 ? 256 : size;
    count = divide_up(pixels, size);
  }
  std::int64_t begin(std::int64_t i) const { return i * size; }
  std::int64_t length(std::int64_t i) const {
    const std::int64_t left = pixels - begin(i);
    return left < size ? left : size;
  }
};

// The samples [begin, end) of a thread, or all of them, each shared among all threads.
template <class Body>
static inline void for_samples(const GroupNormProblem& call, std::int64_t element_bytes, const Body& body) {
  const std::int64_t threads = num_threads(), length = call.channels * call.pixels;
  const bool balanced = divide_up(call.batch, threads) * threads * 4 <= call.batch * 5;
  if (balanced && length * element_bytes <= kSampleBytes) {
    parallel_for(call.batch, divide_up(kGrain, length),
                 [&](std::int64_t begin, std::int64_t end) { body(begin, end, false); });
  } else {
    body(0, call.batch, true);
  }
}

// Sums of the pixels of one chunk around `shift`, by channel.
struct ChunkSums {
  float* shift;
  float* sum;
  float* squares;
};

template <int Pixels, class T>
static inline void add_pixels(const T* x, std::int64_t channels, const ChunkSums& sums) {
  each_pair(channels, [&](std::int64_t i, auto at) {
    const Pair shift = load_pair(sums.shift + i);
    Pair sum = load_pair(sums.sum + i), squares = load_pair(sums.squares + i);
    for (int k = 0; k < Pixels; ++k) {
      const Pair v = at.load(x + k * channels + i);
      const Vec a = v.a - shift.a, b = v.b - shift.b;
      sum = {sum.a + a, sum.b + b};
      squares = {fma(a, a, squares.a), fma(b, b, squares.b)};
    }
    store_pair(sums.sum + i, sum);
    store_pair(sums.squares + i, squares);
  });
}

// Sums again those channels, and their neighbours in a pair, whose shift is far from the mean.
template <class T>
static void sum_cancelled_again(const T* x, std::int64_t pixels, std::int64_t channels, const ChunkSums& sums) {
  constexpr std::uint32_t all_lanes = (1u << Vec::lanes) - 1u;
  const Vec share = Vec::broadcast(1.0f / static_cast<float>(pixels)), most = Vec::broadcast(kMostCancelled);
  each_pair(channels, [&](std::int64_t i, auto at) {
    Pair shift = load_pair(sums.shift + i), sum = load_pair(sums.sum + i), squares = load_pair(sums.squares + i);
    const Pair offset = {sum.a * share, sum.b * share};
    if ((bits_not_greater(offset.a * sum.a, squares.a * most) &
         bits_not_greater(offset.b * sum.b, squares.b * most)) == all_lanes) {
      return;
    }
    shift = {shift.a + offset.a, shift.b + offset.b};
    sum = squares = Pair::broadcast(0.0f);
    for (std::int64_t p = 0; p < pixels;) {
      // What is added to the square of an outlier is lost, so only few elements are.
      const std::int64_t end = pixels - p < 16 ? pixels : p + 16;
      Pair part = Pair::broadcast(0.0f), part_squares = part;
      for (; p < end; ++p) {
        const Pair v = at.load(x + p * channels + i);
        const Vec a = v.a - shift.a, b = v.b - shift.b;
        part = {part.a + a, part.b + b};
        part_squares = {fma(a, a, part_squares.a), fma(b, b, part_squares.b)};
      }
      sum = {sum.a + part.a, sum.b + part.b};
      squares = {squares.a + part_squares.a, squares.b + part_squares.b};
    }
    store_pair(sums.shift + i, shift);
    store_pair(sums.sum + i, sum);
    store_pair(sums.squares + i, squares);
  });
}

// The shift is the mean of a few pixels, near that of all but for outliers. Neighbours are alike, in a row and in a
// column, so the step is no half, quarter or multiple of the usual rows.
template <class T>
static void chunk_sums(const T* x, std::int64_t pixels, std::int64_t channels, const ChunkSums& sums) {
  const int few = pixels < 4 ? static_cast<int>(pixels) : 4;
  const std::int64_t step = (pixels < 4 ? 1 : 5 * pixels / 16) * channels;
  const Vec share = Vec::broadcast(1.0f / static_cast<float>(few));
  each_pair(channels, [&](std::int64_t i, auto at) {
    Pair mean = Pair::broadcast(0.0f);
    for (int k = 0; k < few; ++k) {
      const Pair v = at.load(x + k * step + i);
      mean = {fma(v.a, share, mean.a), fma(v.b, share, mean.b)};
    }
    store_pair(sums.shift + i, mean);
    store_pair(sums.sum + i, Pair::broadcast(0.0f));
    store_pair(sums.squares + i, Pair::broadcast(0.0f));
  });
  std::int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) add_pixels<4>(x + p * channels, channels, sums);
  for (; p < pixels; ++p) add_pixels<1>(x + p * channels, channels, sums);
  sum_cancelled_again(x, pixels, channels, sums);
}

// Planes of one sample's forward.
struct SampleScratch {
  std::int64_t width;
  Scratch<float> shifts, sums;  // a plane for each chunk
  Scratch<double> squares;      // likewise
  Scratch<double> means, variances;
  Scratch<float> centre, a, b;

  SampleScratch(std::int64_t channels, std::int64_t chunks)
      : width(divide_up(channels, kPair) * kPair),
        shifts(chunks * width),
        sums(chunks * width),
        squares(chunks * width),
        means(width),
        variances(width),
        centre(width),
        a(width),
        b(width) {}
  bool complete() const {
    return shifts.data && sums.data && squares.data && means.data && variances.data && centre.data && a.data &&
           b.data;
  }
};

// Mean and variance of every channel, by slot, from the sums of the chunks, in their order.
static void merge_chunks(const Chunks& chunks, SampleScratch& scratch) {
  const std::int64_t width = scratch.width;
  const float* const reference = scratch.shifts;
  double* const mean = scratch.means;
  double* const variance = scratch.variances;
  for (std::int64_t c = 0; c < width; ++c) mean[c] = variance[c] = 0.0;
  for (std::int64_t k = 0; k < chunks.count; ++k) {
    const float* const shifts = scratch.shifts + k * width;
    const float* const sums = scratch.sums + k * width;
    const double* const squares = scratch.squares + k * width;
    const double count = static_cast<double>(chunks.length(k));
    for (std::int64_t c = 0; c < width; ++c) {
      const double d = static_cast<double>(shifts[c]) - static_cast<double>(reference[c]), sum = sums[c];
      mean[c] += sum + count * d;
      variance[c] += squares[c] + d * (2.0 * sum + count * d);
    }
  }
  for (std::int64_t c = 0; c < width; ++c) {
    const Moments moments =
        moments_around(reference[c], static_cast<double>(chunks.pixels), mean[c], variance[c]);
    mean[c] = moments.mean;
    variance[c] = moments.squares / moments.count;
  }
}

// Of a group, from those of its channels.
template <class T>
static Moments group_moments(const GroupNormProblem& call, std::int64_t n, std::int64_t g, SampleScratch& scratch) {
  const std::int64_t count = call.channels / call.groups, begin = g * count, end = begin + count;
  const float* const bias = call.channel_bias ? call.channel_bias + n * call.channels : nullptr;
  const auto mean_of = [&](std::int64_t c) {
    const double mean = scratch.means[slot<T>(c, call.channels)];
    return bias ? mean + static_cast<double>(bias[c]) : mean;
  };
  Moments moments{static_cast<double>(count)};  // of channels
  for (std::int64_t c = begin; c < end; ++c) moments.mean += mean_of(c);
  moments.mean /= moments.count;
  for (std::int64_t c = begin; c < end; ++c) {
    const double d = mean_of(c) - moments.mean;
    moments.squares += scratch.variances[slot<T>(c, call.channels)] + d * d;
  }
  return moments;
}

// Statistics of the sample's groups and the constants of its channels.
template <class T>
static void finish_statistics(const GroupNormForward& call, std::int64_t n, SampleScratch& scratch) {
  const std::int64_t count = call.channels / call.groups;
  for (std::int64_t g = 0; g < call.groups; ++g) {
    const std::int64_t begin = g * count, end = begin + count;
    const Moments moments = group_moments<T>(call, n, g, scratch);
    const double mean = moments.mean, rstd = reciprocal_std(moments.squares / moments.count, call.eps);
    call.mean[n * call.groups + g] = static_cast<float>(mean);
    call.rstd[n * call.groups + g] = static_cast<float>(rstd);
    for (std::int64_t c = begin; c < end; ++c) {
      const Affine affine(call, Channel(call, n, c, mean), rstd);
      const std::int64_t i = slot<T>(c, call.channels);
      scratch.centre[i] = affine.centre;
      scratch.a[i] = affine.a;
      scratch.b[i] = affine.b;
    }
  }
}

template <class T, bool Silu, bool Stream>
static void normalize_pixels(const T* x, T* y, std::int64_t pixels, std::int64_t channels,
                             const SampleScratch& scratch) {
  const float *const centres = scratch.centre.data, *const as = scratch.a.data, *const bs = scratch.b.data;
  for (std::int64_t p = 0; p < pixels; ++p, x += channels, y += channels) {
    each_pair<Stream>(channels, [&](std::int64_t i, auto at) {
      const Pair v = at.load(x + i), centre = load_pair(centres + i), a = load_pair(as + i),
                 b = load_pair(bs + i);
      at.store(y + i, {activate<T, Silu>(v.a, centre.a, a.a, b.a), activate<T, Silu>(v.b, centre.b, a.b, b.b)});
    });
  }
}

template <class T>
static bool sample_sums(const T* x, std::int64_t channels, const Chunks& chunks, bool split, SampleScratch& scratch) {
  bool enough_memory = true;
  for_units(split, chunks.count, chunks.size * channels, [&](std::int64_t begin, std::int64_t end) {
    Scratch<float> squares(scratch.width);
    if (squares.data == nullptr) {
      __atomic_store_n(&enough_memory, false, __ATOMIC_RELAXED);
      return;
    }
    for (std::int64_t k = begin; k < end; ++k) {
      const T* const part = x + chunks.begin(k) * channels;
      const ChunkSums sums = {scratch.shifts + k * scratch.width, scratch.sums + k * scratch.width, squares};
      chunk_sums(part, chunks.length(k), channels, sums);
      double* const result = scratch.squares + k * scratch.width;
      bool in_range = true;
      for (std::int64_t c = 0; c < scratch.width; ++c) {
        result[c] = squares[c];
        in_range &= squares[c] <= FLT_MAX;
      }
      for (std::int64_t c = 0; c < channels && !in_range; ++c) {
        const Moments moments = moments_in_double(part + c, chunks.length(k), channels);
        const std::int64_t i = slot<T>(c, channels);
        sums.shift[i] = static_cast<float>(moments.mean);
        const double rest = moments.mean - static_cast<double>(sums.shift[i]);
        sums.sum[i] = static_cast<float>(moments.count * rest);
        result[i] = moments.squares + moments.count * rest * rest;
      }
    }
  });
  return enough_memory;
}

template <class T, bool Silu, bool Stream>
static bool forward_pixels(const GroupNormForward& call) {
  const std::int64_t channels = call.channels;
  const Chunks chunks(call.pixels);
  bool enough_memory = true;
  for_samples(call, sizeof(T), [&](std::int64_t first, std::int64_t last, bool split) {
    SampleScratch scratch(channels, chunks.count);
    for (std::int64_t c = 0; scratch.complete() && c < scratch.width; ++c) {
      scratch.centre[c] = scratch.a[c] = scratch.b[c] = 0.0f;
    }
    for (std::int64_t n = first; n < last; ++n) {
      const T* const x = static_cast<const T*>(call.x) + n * call.pixels * channels;
      T* const y = static_cast<T*>(call.y) + n * call.pixels * channels;
      if (!scratch.complete() || !sample_sums(x, channels, chunks, split, scratch)) {
        __atomic_store_n(&enough_memory, false, __ATOMIC_RELAXED);
        return;
      }
      merge_chunks(chunks, scratch);
      finish_statistics<T>(call, n, scratch);
      for_units(split, chunks.count, chunks.size * channels, [&](std::int64_t begin, std::int64_t end) {
        // What was read last is in the cache.
        for (std::int64_t k = end - 1; k >= begin; --k) {
          const std::int64_t at = chunks.begin(k) * channels;
          normalize_pixels<T, Silu, Stream>(x + at, y + at, chunks.length(k), channels, scratch);
        }
        if (Stream) finish_streaming();
      });
    }
  });
  return enough_memory;
}

// Planes of one sample's backward.
struct GradientScratch {
  std::int64_t width;
  Scratch<float> parts;    // for each chunk three planes: sums of du, du xhat, xhat
  Scratch<double> totals;  // the same over all chunks
  Scratch<float> planes;   // the seven constants of ChannelGradient
  Scratch<ChannelGradient> channels;
  Scratch<ChannelSums> sums;
  Scratch<double> means;  // of the groups

  GradientScratch(std::int64_t channel_count, std::int64_t groups, std::int64_t chunks)
      : width(divide_up(channel_count, kPair) * kPair),
        parts(3 * chunks * width),
        totals(3 * width),
        planes(7 * width),
        channels(channel_count),
        sums(channel_count),
        means(groups) {}
  bool complete() const {
    return parts.data && totals.data && planes.data && channels.data && sums.data && means.data;
  }
  const float* plane(int i) const { return planes.data + i * width; }

  template <class T>
  void fill_planes(std::int64_t channel_count) {
    for (std::int64_t c = 0; c < channel_count; ++c) {
      float* const at = planes + slot<T>(c, channel_count);
      const ChannelGradient& channel = channels[c];
      const float values[7] = {channel.centre, channel.rstd, channel.gain, channel.offset,
                               channel.p,      channel.q,    channel.r};
      for (int i = 0; i < 7; ++i) at[i * width] = values[i];
    }
  }
};

template <bool Silu>
static inline Vec activation_gradient(Vec xhat, Vec grad, Vec gain, Vec offset) {
  if constexpr (Silu) return grad * silu_slope(fma(xhat, gain, offset));
  return grad;
}

template <int Pixels, bool Silu, class T>
static inline void add_gradients(const T* x, const T* grad, std::int64_t channels, const GradientScratch& scratch,
                                 float* sums) {
  const std::int64_t width = scratch.width;
  each_pair(channels, [&](std::int64_t i, auto at) {
    const Pair centre = load_pair(scratch.plane(0) + i), rstd = load_pair(scratch.plane(1) + i),
               gain = load_pair(scratch.plane(2) + i), offset = load_pair(scratch.plane(3) + i);
    Pair du = load_pair(sums + i), du_xhat = load_pair(sums + width + i), xhat = load_pair(sums + 2 * width + i);
    for (int k = 0; k < Pixels; ++k) {
      const Pair v = at.load(x + k * channels + i), g = at.load(grad + k * channels + i);
      const Pair h = {(v.a - centre.a) * rstd.a, (v.b - centre.b) * rstd.b};
      const Pair d = {activation_gradient<Silu>(h.a, g.a, gain.a, offset.a),
                      activation_gradient<Silu>(h.b, g.b, gain.b, offset.b)};
      du = {du.a + d.a, du.b + d.b};
      du_xhat = {fma(d.a, h.a, du_xhat.a), fma(d.b, h.b, du_xhat.b)};
      xhat = {xhat.a + h.a, xhat.b + h.b};
    }
    store_pair(sums + i, du);
    store_pair(sums + width + i, du_xhat);
    store_pair(sums + 2 * width + i, xhat);
  });
}

template <bool Silu, class T>
static void chunk_gradients(const T* x, const T* grad, std::int64_t pixels, std::int64_t channels,
                            const GradientScratch& scratch, float* sums) {
  for (std::int64_t c = 0; c < 3 * scratch.width; ++c) sums[c] = 0.0f;
  std::int64_t p = 0;
  for (; p + 4 <= pixels; p += 4) {
    add_gradients<4, Silu>(x + p * channels, grad + p * channels, channels, scratch, sums);
  }
  for (; p < pixels; ++p) {
    add_gradients<1, Silu>(x + p * channels, grad + p * channels, channels, scratch, sums);
  }
}

template <bool Silu, bool Stream, class T>
static void grad_pixels(const T* x, const T* grad, T* dx, std::int64_t pixels, std::int64_t channels,
                        const GradientScratch& scratch) {
  for (std::int64_t k = 0; k < pixels; ++k, x += channels, grad += channels, dx += channels) {
    each_pair<Stream>(channels, [&](std::int64_t i, auto at) {
      const Pair centre = load_pair(scratch.plane(0) + i), rstd = load_pair(scratch.plane(1) + i),
                 gain = load_pair(scratch.plane(2) + i), offset = load_pair(scratch.plane(3) + i),
                 p = load_pair(scratch.plane(4) + i), q = load_pair(scratch.plane(5) + i),
                 r = load_pair(scratch.plane(6) + i);
      const Pair v = at.load(x + i), g = at.load(grad + i);
      const Vec ha = (v.a - centre.a) * rstd.a, hb = (v.b - centre.b) * rstd.b;
      const Vec da = activation_gradient<Silu>(ha, g.a, gain.a, offset.a);
      const Vec db = activation_gradient<Silu>(hb, g.b, gain.b, offset.b);
      at.store(dx + i, {fma(da, p.a, fma(ha, q.a, r.a)), fma(db, p.b, fma(hb, q.b, r.b))});
    });
  }
}

// The means of the sample's groups, as they were saved or, where float32 cannot hold them, computed again.
template <class T>
static bool sample_means(const GroupNormBackward& call, std::int64_t n, const T* x, const Chunks& chunks, bool split,
                         double* means) {
  const float* const saved = call.mean + n * call.groups;
  const float* const rstd = call.rstd + n * call.groups;
  bool coarse = false;
  for (std::int64_t g = 0; g < call.groups; ++g) {
    means[g] = saved[g];
    coarse |= mean_is_coarse(saved[g], rstd[g]);
  }
  if (!coarse) return true;
  SampleScratch scratch(call.channels, chunks.count);
  if (!scratch.complete() || !sample_sums(x, call.channels, chunks, split, scratch)) return false;
  merge_chunks(chunks, scratch);
  for (std::int64_t g = 0; g < call.groups; ++g) {
    if (mean_is_coarse(saved[g], rstd[g])) means[g] = group_moments<T>(call, n, g, scratch).mean;
  }
  return true;
}

template <class T, bool Silu, bool Stream>
static bool grad_sample(const GroupNormBackward& call, std::int64_t n, const Chunks& chunks, bool split,
                        GradientScratch& scratch, double* parameter_sums) {
  const std::int64_t channels = call.channels, width = scratch.width;
  const std::int64_t sample = n * call.pixels * channels;
  const T* const x = static_cast<const T*>(call.x) + sample;
  const T* const grad = static_cast<const T*>(call.grad) + sample;
  const std::int64_t per_group = channels / call.groups;
  if (!sample_means(call, n, x, chunks, split, scratch.means)) return false;
  for (std::int64_t g = 0; g < call.groups; ++g) {
    start_group<Silu>(call, n, g, scratch.means[g], scratch.channels + g * per_group);
  }
  scratch.fill_planes<T>(channels);
  for_units(split, chunks.count, chunks.size * channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t at = chunks.begin(k) * channels;
      chunk_gradients<Silu>(x + at, grad + at, chunks.length(k), channels, scratch, scratch.parts + 3 * k * width);
    }
  });
  double* const totals = scratch.totals;
  for (std::int64_t i = 0; i < 3 * width; ++i) totals[i] = 0.0;
  for (std::int64_t k = 0; k < chunks.count; ++k) {
    const float* const part = scratch.parts + 3 * k * width;
    for (std::int64_t i = 0; i < 3 * width; ++i) totals[i] += part[i];
  }
  for (std::int64_t c = 0; c < channels; ++c) {
    const double* const at = totals + slot<T>(c, channels);
    scratch.sums[c] = {at[0], at[width], at[2 * width]};
  }
  for (std::int64_t g = 0; g < call.groups; ++g) {
    finish_group<Silu>(call, n, g, scratch.sums + g * per_group,
                       scratch.channels + g * per_group, parameter_sums);
  }
  if (call.grad_x == nullptr) return true;
  scratch.fill_planes<T>(channels);
  T* const dx = static_cast<T*>(call.grad_x) + sample;
  for_units(split, chunks.count, chunks.size * channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = end - 1; k >= begin; --k) {
      const std::int64_t at = chunks.begin(k) * channels;
      grad_pixels<Silu, Stream>(x + at, grad + at, dx + at, chunks.length(k), channels, scratch);
    }
    if (Stream) finish_streaming();
  });
  return true;
}

template <class T, bool Silu, bool Stream>
static bool backward_pixels(const GroupNormBackward& call, double* parameter_sums) {
  const Chunks chunks(call.pixels);
  bool enough_memory = true;
  for_samples(call, 2 * sizeof(T), [&](std::int64_t first, std::int64_t last, bool split) {
    GradientScratch scratch(call.channels, call.groups, chunks.count);
    bool complete = scratch.complete();
    for (std::int64_t i = 0; complete && i < 7 * scratch.width; ++i) scratch.planes[i] = 0.0f;
    for (std::int64_t n = first; complete && n < last; ++n) {
      complete = grad_sample<T, Silu, Stream>(call, n, chunks, split, scratch, parameter_sums);
    }
    if (!complete) __atomic_store_n(&enough_memory, false, __ATOMIC_RELAXED);
  });
  return enough_memory;
}

}  // namespace fastldm::FASTLDM_ISA
