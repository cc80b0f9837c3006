// Group norm over (batch, channels, pixels): a group of a sample is one slab of memory, a channel a row of it. A
// slab is read for its statistics and read again, from the cache if it fits, to be normalised. Included by
// group_norm.cpp only.
#pragma once

#include "group_norm_gradient.h"
#include "group_norm_math.h"

namespace fastldm::FASTLDM_ISA {

// With SiLU, which is bound by arithmetic, slabs up to this size are fetched into the second-level cache while the
// one before is being normalised. It gains a tenth; in the backward, which is bound by memory, it loses more.
constexpr std::int64_t kFetchAheadBytes = 1 << 19;

// The backward keeps du for its second pass up to this size of a slab; beyond, computing it again is cheaper.
constexpr std::int64_t kKeptBytes = 1 << 20;

static inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class T>
static inline void fetch_pair(const T* p) {
  fetch(p);
  if (kPair * sizeof(T) > 64) fetch(reinterpret_cast<const char*>(p) + 64);
}

// Whether each slab is worth all threads: whole slabs would leave some of them idle.
static inline bool split_slabs(std::int64_t slabs) {
  const std::int64_t threads = num_threads();
  return divide_up(slabs, threads) * threads * 4 > slabs * 5;
}

// The slabs [begin, end) of a thread, or all of them, each shared among all threads.
template <class Body>
static inline void for_slabs(bool split, std::int64_t slabs, std::int64_t length, const Body& body) {
  if (split) {
    body(0, slabs);
  } else {
    parallel_for(slabs, divide_up(kGrain, length), body);
  }
}

// In the second sum over a block of outliers, so many elements have float32 sums: what is added to a much larger
// square, as to that of an outlier, is lost.
constexpr std::int64_t kOutlierPart = 1024;

struct BlockSums {
  double sum, squares;
};

// Of x - shift over up to kBlock elements.
template <class T>
static BlockSums sums_around(const T* x, std::int64_t count, float shift) {
  Pair sum[2], squares[2];
  for (int k = 0; k < 2; ++k) sum[k] = squares[k] = Pair::broadcast(0.0f);
  const auto add = [&](int k, std::int64_t i, auto at) {
    const Pair v = at.load(x + i), centre = at.broadcast(shift);
    const Vec a = v.a - centre.a, b = v.b - centre.b;
    sum[k] = {sum[k].a + a, sum[k].b + b};
    squares[k] = {fma(a, a, squares[k].a), fma(b, b, squares[k].b)};
  };
  std::int64_t i = 0;
  for (; i + 2 * kPair <= count; i += 2 * kPair) {
    add(0, i, Whole<false>{});
    add(1, i + kPair, Whole<false>{});
  }
  each_pair(count - i, [&](std::int64_t j, auto at) { add(0, i + j, at); });
  return {reduce_add((sum[0].a + sum[1].a) + (sum[0].b + sum[1].b)),
          reduce_add((squares[0].a + squares[1].a) + (squares[0].b + squares[1].b))};
}

// Of up to kBlock elements. The shift is the mean of the first vector, which is near that of all but for outliers.
template <class T>
static Moments block_moments(const T* x, std::int64_t count) {
  const int first = count < Vec::lanes ? static_cast<int>(count) : Vec::lanes;
  const double elements = static_cast<double>(count);
  float shift = reduce_add(Vec::load_partial(x, first)) / static_cast<float>(first);
  BlockSums sums = sums_around(x, count, shift);
  if (sums.sum * sums.sum > static_cast<double>(kMostCancelled) * elements * sums.squares) {
    shift += static_cast<float>(sums.sum / elements);
    sums = {0.0, 0.0};
    for (std::int64_t i = 0; i < count; i += kOutlierPart) {
      const BlockSums part = sums_around(x + i, count - i < kOutlierPart ? count - i : kOutlierPart, shift);
      sums.sum += part.sum;
      sums.squares += part.squares;
    }
  }
  if (!(sums.squares <= static_cast<double>(FLT_MAX))) return moments_in_double(x, count, 1);
  return moments_around(shift, elements, sums.sum, sums.squares);
}

// How the elements of a slab fall into units of one channel and at most kBlock elements.
struct Units {
  std::int64_t rows, row_length, per_row;

  Units(std::int64_t rows, std::int64_t row_length)
      : rows(rows), row_length(row_length), per_row(divide_up(row_length, kBlock)) {}
  std::int64_t count() const { return rows * per_row; }
  std::int64_t length() const { return row_length < kBlock ? row_length : kBlock; }

  struct Unit {
    std::int64_t row, begin, count;
  };
  Unit operator[](std::int64_t i) const {
    if (per_row == 1) return {i, i * row_length, row_length};
    const std::int64_t row = i / per_row, start = i % per_row * kBlock, left = row_length - start;
    return {row, row * row_length + start, left < kBlock ? left : kBlock};
  }
};

// The place of a slab in the tensors, and how it is to be worked on.
struct Slab {
  std::int64_t n, g, first_channel, channels, begin, length;
  bool split;  // among all threads

  Slab(const GroupNormProblem& call, std::int64_t index, bool split)
      : n(index / call.groups),
        g(index % call.groups),
        first_channel(g * (call.channels / call.groups)),
        channels(call.channels / call.groups),
        begin(index * channels * call.pixels),
        length(channels * call.pixels),
        split(split) {}
};

// `scratch` holds one Moments for each unit.
template <class T>
static Moments slab_moments(const GroupNormProblem& call, const Slab& slab, Moments* scratch) {
  const T* x = static_cast<const T*>(call.x) + slab.begin;
  // Without a channel bias the slab is one long row.
  const Units units = call.channel_bias ? Units(slab.channels, call.pixels) : Units(1, slab.length);
  for_units(slab.split, units.count(), units.length(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto unit = units[i];
      scratch[i] = block_moments(x + unit.begin, unit.count);
    }
  });
  Moments total;
  for (std::int64_t i = 0; i < units.count(); ++i) {
    Moments part = scratch[i];
    if (call.channel_bias) {
      part.mean += call.channel_bias[slab.n * call.channels + slab.first_channel + i / units.per_row];
    }
    total.merge(part);
  }
  return total;
}

// `ahead` is the distance from an element to one to fetch, or 0.
template <bool Silu, bool Stream, class T>
static void normalize_row(const T* x, T* y, std::int64_t count, const Affine& affine, std::int64_t ahead) {
  const Vec a = Vec::broadcast(affine.a), b = Vec::broadcast(affine.b);
  const Vec centre = Vec::broadcast(affine.centre);
  each_pair<Stream>(count, [&](std::int64_t i, auto at) {
    if (ahead != 0) fetch_pair(x + i + ahead);
    const Pair v = at.load(x + i);
    at.store(y + i, {activate<T, Silu>(v.a, centre, a, b), activate<T, Silu>(v.b, centre, a, b)});
  });
}

template <class T, bool Silu, bool Stream>
static void normalize_slab(const GroupNormForward& call, const Slab& slab, bool fetch_next, Moments* scratch) {
  const Moments moments = slab_moments<T>(call, slab, scratch);
  const double rstd = reciprocal_std(moments.squares / moments.count, call.eps);
  call.mean[slab.n * call.groups + slab.g] = static_cast<float>(moments.mean);
  call.rstd[slab.n * call.groups + slab.g] = static_cast<float>(rstd);
  const T* x = static_cast<const T*>(call.x) + slab.begin;
  T* y = static_cast<T*>(call.y) + slab.begin;
  const Units units(slab.channels, call.pixels);
  for_units(slab.split, units.count(), units.length(), [&](std::int64_t begin, std::int64_t end) {
    // What was read last is in the cache.
    for (std::int64_t i = end - 1; i >= begin; --i) {
      const auto unit = units[i];
      const Channel channel(call, slab.n, slab.first_channel + unit.row, moments.mean);
      normalize_row<Silu, Stream>(x + unit.begin, y + unit.begin, unit.count, Affine(call, channel, rstd),
                                  fetch_next ? slab.length : 0);
    }
    if (Stream) finish_streaming();
  });
}

template <class T, bool Silu, bool Stream>
static bool forward_rows(const GroupNormForward& call) {
  const std::int64_t slabs = call.batch * call.groups, channels = call.channels / call.groups;
  const std::int64_t length = channels * call.pixels;
  const bool split = split_slabs(slabs);
  const bool fetch_ahead = Silu && length * static_cast<std::int64_t>(sizeof(T)) <= kFetchAheadBytes;
  bool enough_memory = true;
  for_slabs(split, slabs, length, [&](std::int64_t begin, std::int64_t end) {
    Scratch<Moments> scratch(channels * divide_up(call.pixels, kBlock));
    if (scratch.data == nullptr) {
      __atomic_store_n(&enough_memory, false, __ATOMIC_RELAXED);
      return;
    }
    for (std::int64_t i = begin; i < end; ++i) {
      const bool fetch_next = fetch_ahead && !split && i + 1 < end;
      normalize_slab<T, Silu, Stream>(call, Slab(call, i, split), fetch_next, scratch);
    }
  });
  return enough_memory;
}

// Backward. Constants of one channel of one sample for the loops over its row.
struct RowGradient {
  Vec centre, rstd, gain, offset;  // xhat = (x - centre) * rstd; the argument of SiLU = xhat * gain + offset
  Vec p, q, r;                     // dx = du * p + xhat * q + r

  RowGradient(const ChannelGradient& c)
      : centre(Vec::broadcast(c.centre)),
        rstd(Vec::broadcast(c.rstd)),
        gain(Vec::broadcast(c.gain)),
        offset(Vec::broadcast(c.offset)),
        p(Vec::broadcast(c.p)),
        q(Vec::broadcast(c.q)),
        r(Vec::broadcast(c.r)) {}
};

// Sums of du, du * xhat and xhat over up to kBlock elements of a row. Where `kept` is not null, du is kept there.
template <bool Silu, class T>
static ChannelSums row_sums(const T* x, const T* grad, float* kept, std::int64_t count,
                            const ChannelGradient& channel) {
  const RowGradient row(channel);
  Pair du = Pair::broadcast(0.0f), du_xhat = du, xhat = du;
  const auto slope = [&](Vec h, Vec g) {
    if constexpr (Silu) return g * silu_slope(fma(h, row.gain, row.offset));
    return g;
  };
  each_pair(count, [&](std::int64_t i, auto at) {
    const Pair v = at.load(x + i), g = at.load(grad + i), centre = at.broadcast(channel.centre);
    const Pair h = {(v.a - centre.a) * row.rstd, (v.b - centre.b) * row.rstd};
    const Pair d = {slope(h.a, g.a), slope(h.b, g.b)};
    if (Silu && kept != nullptr) at.store(kept + i, d);
    du = {du.a + d.a, du.b + d.b};
    du_xhat = {fma(d.a, h.a, du_xhat.a), fma(d.b, h.b, du_xhat.b)};
    xhat = {xhat.a + h.a, xhat.b + h.b};
  });
  return {reduce_add(du.a + du.b), reduce_add(du_xhat.a + du_xhat.b), reduce_add(xhat.a + xhat.b)};
}

// `source` is du, or, with Slope, the gradient of y.
template <bool Slope, bool Stream, class T, class Source>
static void grad_row(const T* x, const Source* source, T* dx, std::int64_t count, const RowGradient& row) {
  const auto step = [&](Vec v, Vec s) {
    const Vec h = (v - row.centre) * row.rstd;
    if constexpr (Slope) s = s * silu_slope(fma(h, row.gain, row.offset));
    return fma(s, row.p, fma(h, row.q, row.r));
  };
  each_pair<Stream>(count, [&](std::int64_t i, auto at) {
    const Pair v = at.load(x + i), s = at.load(source + i);
    at.store(dx + i, {step(v.a, s.a), step(v.b, s.b)});
  });
}

// Working memory of one slab's backward.
struct SlabScratch {
  Scratch<Moments> moments;
  Scratch<ChannelSums> units;
  Scratch<ChannelSums> sums;
  Scratch<ChannelGradient> channels;
  Scratch<float> kept;  // du; null where it is cheaper to compute it twice

  SlabScratch(std::int64_t unit_count, std::int64_t channel_count, std::int64_t kept_count)
      : moments(unit_count), units(unit_count), sums(channel_count), channels(channel_count), kept(kept_count) {}
  bool complete() const { return moments.data && units.data && sums.data && channels.data && kept.data; }
};

template <class T, bool Silu, bool Stream>
static void grad_slab(const GroupNormBackward& call, const Slab& slab, SlabScratch& scratch, bool keep,
                      double* parameter_sums) {
  const T* x = static_cast<const T*>(call.x) + slab.begin;
  const T* grad = static_cast<const T*>(call.grad) + slab.begin;
  float* const kept = keep ? scratch.kept.data : nullptr;
  const Units units(slab.channels, call.pixels);
  double mean = call.mean[slab.n * call.groups + slab.g];
  if (mean_is_coarse(mean, call.rstd[slab.n * call.groups + slab.g])) {
    mean = slab_moments<T>(call, slab, scratch.moments).mean;
  }
  start_group<Silu>(call, slab.n, slab.g, mean, scratch.channels);
  for_units(slab.split, units.count(), units.length(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto unit = units[i];
      scratch.units[i] = row_sums<Silu>(x + unit.begin, grad + unit.begin, keep ? kept + unit.begin : nullptr,
                                        unit.count, scratch.channels[unit.row]);
    }
  });
  for (std::int64_t row = 0; row < slab.channels; ++row) {
    ChannelSums total;
    for (std::int64_t i = row * units.per_row; i < (row + 1) * units.per_row; ++i) total.add(scratch.units[i]);
    scratch.sums[row] = total;
  }
  finish_group<Silu>(call, slab.n, slab.g, scratch.sums, scratch.channels, parameter_sums);
  if (call.grad_x == nullptr) return;
  T* dx = static_cast<T*>(call.grad_x) + slab.begin;
  for_units(slab.split, units.count(), units.length(), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = end - 1; i >= begin; --i) {
      const auto unit = units[i];
      const RowGradient row(scratch.channels[unit.row]);
      const std::int64_t at = unit.begin;
      if (!Silu) {
        grad_row<false, Stream>(x + at, grad + at, dx + at, unit.count, row);
      } else if (keep) {
        grad_row<false, Stream>(x + at, kept + at, dx + at, unit.count, row);
      } else {
        grad_row<true, Stream>(x + at, grad + at, dx + at, unit.count, row);
      }
    }
    if (Stream) finish_streaming();
  });
}

template <class T, bool Silu, bool Stream>
static bool backward_rows(const GroupNormBackward& call, double* parameter_sums) {
  const std::int64_t slabs = call.batch * call.groups, channels = call.channels / call.groups;
  const std::int64_t length = channels * call.pixels;
  const bool split = split_slabs(slabs);
  const bool keep =
      Silu && call.grad_x != nullptr && length * static_cast<std::int64_t>(sizeof(float)) <= kKeptBytes;
  bool enough_memory = true;
  for_slabs(split, slabs, length, [&](std::int64_t begin, std::int64_t end) {
    SlabScratch scratch(channels * divide_up(call.pixels, kBlock), channels, keep ? length : 1);
    if (!scratch.complete()) {
      __atomic_store_n(&enough_memory, false, __ATOMIC_RELAXED);
      return;
    }
    for (std::int64_t i = begin; i < end; ++i) {
      grad_slab<T, Silu, Stream>(call, Slab(call, i, split), scratch, keep, parameter_sums);
    }
  });
  return enough_memory;
}

}  // namespace fastldm::FASTLDM_ISA
