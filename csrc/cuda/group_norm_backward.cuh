// Backward of group norm: the gradients of x and of all parameters, without atomics, in a fixed order.
//
// Formulas: fastldm/reference/group_norm.py. With d = x + channel_bias - mean and du = grad * act'(u) all is
// arithmetic on three sums over the pixels of each channel of a sample,
//
//   sum du,   sum du d,   sum d,
//
// and dx = (weight (1 + scale) rstd) du + slope d + offset, with two numbers of each group. The sum of d over a group
// is 0; what it is instead comes from a saved mean that float32 rounded, and is subtracted from every d, after the
// fact.
//
// As the forward, in two ways: one read of x and grad, both kept in shared memory by a block or a cluster, whose
// blocks add up each other's sums in the order of their ranks (6 bytes an element of bfloat16: 0.64 ns for each KiB of
// x at 4.8 TB/s); or `GroupNormSums` of each chunk, `GroupNormCoefficients`, `GroupNormInputGradient`, for few slabs at
// a time. dweight and dbias need all samples: `GroupNormParameterGradients` at the end.
#pragma once

#include "cuda/group_norm_common.cuh"

namespace fastldm::cuda {

// An output per channel in any of the dtypes, or none.
struct GroupNormGradient {
  Global<float> single;
  Global<bfloat16> brain;
  Global<float16> half;

  FASTLDM_DEVICE void store(std::int64_t i, float value) const {
    if (single) single.store(i, value);
    if (brain) brain.store(i, from_float<bfloat16>(value));
    if (half) half.store(i, from_float<float16>(value));
  }
};

// What the gradients per channel are made of and where they go.
struct GroupNormChannelGradients {
  GroupNormSizes sizes;
  Global<const float> mean, rstd;  // (N, G)
  GroupNormParameters given;
  GroupNormGradient channel_bias, scale, shift;  // (N, C)
  Global<float> sums;                            // (N, 2, C), for dbias and dweight; may be null
  Global<float> partial;       // (slabs, chunks, 3, channels of a slab), where there are chunks
  Global<float> coefficients;  // (slabs, groups of a slab, 4), where there are chunks
  int first_slab;
  int chunks;
};

template <class T>
struct GroupNormBackwardParams {
  GroupNormChannelGradients channels;
  Global<const T> grad, x;
  Global<T> dx;  // may be null
  bool silu;
  int tile;  // units
};

// From where(k, channel), the three sums over all pixels, the two numbers of each group that dx is made with.
// `tells`: writes the gradients per channel.
template <class Tile, class Where>
FASTLDM_DEVICE void finish_gradient(const Tile& tile, const GroupNormChannelGradients& to, bool tells,
                                    const Where& where, const Shared<float>& groups_at) {
  const GroupNormParameters& given = to.given;
  const float pixels = static_cast<float>(to.sizes.pixels), count = pixels * static_cast<float>(to.sizes.per_group);
  const int n = tile.sample;
  tile.each_group([&](int group) {
    const float rstd = to.rstd.load(std::int64_t{n} * to.sizes.num_groups + tile.first_group + group);
    Vec<float, 4> sum{};
    tile.each_channel(group, [&](int channel) {
      const int c = tile.first_channel() + channel;
      const float slope = given.weight.load(0, c, 1.0f) * (1.0f + given.scale.load(n, c, 0.0f));
      sum[0] += slope * where(0, channel);
      sum[1] += slope * where(1, channel);
      sum[2] += where(2, channel);
    });
    const float off = divide(rstd * warp_reduce(sum[2], Sum()), count);
    const float mean1 = divide(warp_reduce(sum[0], Sum()), count);
    const float mean2 = divide(rstd * warp_reduce(sum[1], Sum()), count) - off * mean1;
    if (lane_id() == 0) {
      store_four(groups_at, group,
                 Vec<float, 4>{{-rstd * (rstd * mean2), rstd * (off * mean2 - mean1), 0.0f, 0.0f}});
    }
    if (!tells) return;
    tile.each_channel(group, [&](int channel) {
      const int c = tile.first_channel() + channel;
      const float weight = given.weight.load(0, c, 1.0f), bias = given.bias.load(0, c, 0.0f);
      const float slope = weight * (1.0f + given.scale.load(n, c, 0.0f));
      const float sum1 = where(0, channel), sum2 = rstd * where(1, channel) - off * sum1;
      const float sum3 = rstd * where(2, channel) - off * pixels;
      const std::int64_t sample = std::int64_t{n} * to.sizes.channels();
      to.channel_bias.store(sample + c, rstd * (slope * sum1 - pixels * mean1 - mean2 * sum3));
      to.scale.store(sample + c, weight * sum2 + bias * sum1);
      to.shift.store(sample + c, sum1);
      if (to.sums) {
        to.sums.store(2 * sample + c, sum1);
        to.sums.store(2 * sample + to.sizes.channels() + c, sum2);
      }
    });
  });
}

// The steps of the kernels that read x and grad, of one slab. `Keeps`: both stay in shared memory.
template <class T, bool ChannelsLast, bool Wide, int Threads, bool Keeps>
struct GroupNormBackwardSlab : GroupNormTile<T, ChannelsLast, Wide, Threads> {
  using Tile = GroupNormTile<T, ChannelsLast, Wide, Threads>;
  using Tile::columns;
  using Tile::vector;
  using Params = GroupNormBackwardParams<T>;
  static constexpr int tensors = Keeps ? 2 : 0;

  struct Pair {
    Vec<T, vector> x, grad;
  };

  const Params& params;
  GroupNormLayout layout;
  Shared<T> x_kept, grad_kept;
  Shared<float> table, sums, totals, constants, groups_at;

  FASTLDM_DEVICE GroupNormBackwardSlab(const Params& of, int slab)
      : Tile(of.channels.sizes, slab),
        params(of),
        layout(group_norm_layout(of.channels.sizes, ChannelsLast, vector, sizeof(T), Threads, of.tile, tensors, 3)),
        x_kept(dynamic_shared<T>(layout.data, tensors * layout.data_size)),
        grad_kept(x_kept + layout.data_size),
        table(dynamic_shared<float>(layout.table, 3 * layout.table_size)),
        sums(dynamic_shared<float>(layout.sums, 3 * of.channels.sizes.width())),
        totals(dynamic_shared<float>(layout.totals, Keeps ? 0 : 3 * of.channels.sizes.width())),
        constants(dynamic_shared<float>(layout.constants, 4 * of.channels.sizes.width())),
        groups_at(dynamic_shared<float>(layout.groups, 4 * of.channels.sizes.groups)) {}

  FASTLDM_DEVICE Pair kept_pair(const GroupNormRun& run, int i) const {
    return {Tile::kept(x_kept, run, i), Tile::kept(grad_kept, run, i)};
  }

  template <Cache Policy>
  FASTLDM_DEVICE Pair read_pair(const GroupNormRun& run, int i) const {
    return {Tile::template read<Policy>(params.x + this->base(), run, i),
            Tile::template read<Policy>(params.grad + this->base(), run, i)};
  }

  FASTLDM_DEVICE void prepare() const {
    const GroupNormChannelGradients& of = params.channels;
    for (int channel = thread_id(); channel < this->width; channel += Threads) {
      const int n = this->sample, c = this->first_channel() + channel;
      const std::int64_t group = std::int64_t{n} * of.sizes.num_groups + c / of.sizes.per_group;
      const ExactPair pair = exact_difference(of.given.channel_bias.load(n, c, 0.0f), of.mean.load(group));
      const float gain = 1.0f + of.given.scale.load(n, c, 0.0f);
      store_four(constants, channel,
                 typename Tile::Channel{pair.high, pair.low,
                                        of.given.weight.load(0, c, 1.0f) * gain * of.rstd.load(group),
                                        of.given.bias.load(0, c, 0.0f) * gain + of.given.shift.load(n, c, 0.0f)});
    }
    block_sync();
  }

  // d and du of an element.
  FASTLDM_DEVICE static void element(T x, T grad, const typename Tile::Channel& of, bool silu, float& d, float& du) {
    d = (to_float(x) + of.high) + of.low;
    du = to_float(grad);
    if (silu) {
      const float u = d * of.slope + of.offset, s = sigmoid(u);
      du *= s * (1.0f + u * (1.0f - s));
    }
  }

  // The three sums of each channel over a range, to `sums`; load(run, i) gives the vectors.
  template <int Batch, class Load>
  FASTLDM_DEVICE void sum_range(const GroupNormRange& range, const Load& load) const {
    const bool silu = params.silu;
    this->each_run(range, [&](const GroupNormRun& run) {
      typename Tile::Channel channel[columns];
      Tile::channels_of(run, constants, channel);
      float total[3][columns] = {};
      Tile::template each_vector<Batch>(
          run, [&](int i) { return load(run, i); },
          [&](int, const Pair& pair) {
#pragma unroll
            for (int e = 0; e < vector; ++e) {
              const int j = e % columns;
              float d, du;
              element(pair.x[e], pair.grad[e], channel[j], silu, d, du);
              total[0][j] += du;
              total[1][j] += du * d;
              total[2][j] += d;
            }
          });
      this->template keep<3>(run, total, table, layout.table_size);
    });
    this->template sum_channels<3>(range, table, layout.table_size, sums);
  }

  // dx of a range, from the two numbers of each group in groups_at.
  template <int Batch, class Load>
  FASTLDM_DEVICE void write_dx(const GroupNormRange& range, const Load& load) const {
    const Global<T> dx = params.dx + this->base();
    const bool silu = params.silu;
    this->each_run(range, [&](const GroupNormRun& run) {
      typename Tile::Channel channel[columns];
      Tile::channels_of(run, constants, channel);
      Vec<float, 2> group[columns];
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        group[j] = groups_at.template load_vector<2>((run.channel + j) / this->sizes.per_group * 4);
      }
      Tile::template each_vector<Batch>(
          run, [&](int i) { return load(run, i); },
          [&](int i, const Pair& pair) {
            float values[vector];
#pragma unroll
            for (int e = 0; e < vector; ++e) {
              const int j = e % columns;
              float d, du;
              element(pair.x[e], pair.grad[e], channel[j], silu, d, du);
              values[e] = channel[j].slope * du + (d * group[j][0] + group[j][1]);
            }
            Tile::write(dx, run, i, values);
          });
    });
  }
};

// One read. Grid: slabs, fastest, each of as many neighbouring blocks as a cluster has; without a cluster of one.
template <class T, bool ChannelsLast, bool Wide, bool Clustered>
struct GroupNormBackward {
  static constexpr int threads = Clustered ? 512 : 256;
  static constexpr int min_blocks = Clustered ? 1 : 2;
  static constexpr int min_capability = Clustered ? 90 : 80;
  using Params = GroupNormBackwardParams<T>;
  using Slab = GroupNormBackwardSlab<T, ChannelsLast, Wide, threads, true>;

  FASTLDM_DEVICE static void run(const Params& params) {
    const int blocks = Clustered ? cluster_blocks() : 1, rank = Clustered ? cluster_rank() : 0;
    const Slab slab(params, block_x() / blocks);
    const GroupNormRange range = group_norm_part(slab.units(), rank, blocks);
    slab.fetch(slab.x_kept, params.x + slab.base(), range);
    slab.fetch(slab.grad_kept, params.grad + slab.base(), range);
    slab.prepare();
    wait_group<0>();
    const auto kept = [&](const GroupNormRun& run, int i) { return slab.kept_pair(run, i); };
    slab.template sum_range<1>(range, kept);
    if constexpr (Clustered) {
      cluster_sync();
      const auto everywhere = [&](int k, int channel) {
        float sum = 0.0f;
        for (int part = 0; part < blocks; ++part) sum += peer(slab.sums, part).load(k * slab.width + channel);
        return sum;
      };
      finish_gradient(slab, params.channels, rank == 0, everywhere, slab.groups_at);
    } else {
      const auto here = [&](int k, int channel) { return slab.sums.load(k * slab.width + channel); };
      finish_gradient(slab, params.channels, true, here, slab.groups_at);
    }
    block_sync();
    if (params.dx) slab.template write_dx<1>(range, kept);
    // Others may still read this block's sums.
    if constexpr (Clustered) cluster_sync();
  }
};

// The three sums of each channel over a chunk of a slab. Grid: slabs from first_slab, fastest the chunks.
template <class T, bool ChannelsLast, bool Wide>
struct GroupNormSums {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 2;
  static constexpr int min_capability = 80;
  using Params = GroupNormBackwardParams<T>;
  using Slab = GroupNormBackwardSlab<T, ChannelsLast, Wide, threads, false>;

  FASTLDM_DEVICE static void run(const Params& params) {
    const GroupNormChannelGradients& to = params.channels;
    const Slab slab(params, to.first_slab + block_x() / to.chunks);
    slab.prepare();
    const GroupNormRange part = group_norm_part(slab.units(), block_x() % to.chunks, to.chunks);
    const std::int64_t at = std::int64_t{block_x()} * 3 * to.sizes.width();
    // The table has room for the runs of one tile.
    for (int begin = part.begin; begin < part.end; begin += params.tile) {
      const GroupNormRange range = group_norm_tile(part, begin, params.tile);
      slab.template sum_range<2>(range, [&](const GroupNormRun& run, int i) {
        return slab.template read_pair<Cache::normal>(run, i);
      });
      for (int i = thread_id(); i < 3 * slab.width; i += threads) {
        const float sum = slab.sums.load(i);
        slab.totals.store(i, begin == part.begin ? sum : slab.totals.load(i) + sum);
      }
    }
    for (int i = thread_id(); i < 3 * slab.width; i += threads) to.partial.store(at + i, slab.totals.load(i));
  }
};

// Adds up the chunks in their order; grid: slabs from first_slab.
struct GroupNormCoefficients {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 4;
  static constexpr int min_capability = 80;
  using Params = GroupNormChannelGradients;
  using Tile = GroupNormTile<float, true, false, threads>;

  struct Layout {
    int totals, groups, bytes;
  };

  FASTLDM_HOST_DEVICE static constexpr Layout layout(const GroupNormSizes& sizes) {
    SharedLayout shared;
    const int totals = shared.take<float>(3 * sizes.groups * sizes.per_group);
    const int groups = shared.take<float>(4 * sizes.groups);
    return {totals, groups, shared.bytes()};
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const Tile tile(params.sizes, params.first_slab + block_x());
    const int sums = 3 * tile.width;
    const Layout at = layout(params.sizes);
    const Shared<float> totals = dynamic_shared<float>(at.totals, sums);
    const Shared<float> groups_at = dynamic_shared<float>(at.groups, 4 * params.sizes.groups);
    const Global<float> partial = params.partial + std::int64_t{block_x()} * params.chunks * 3 * params.sizes.width();
    for (int i = thread_id(); i < sums; i += threads) {
      float sum = 0.0f;
#pragma unroll 4
      for (int chunk = 0; chunk < params.chunks; ++chunk) {
        sum += partial.load(std::int64_t{chunk} * 3 * params.sizes.width() + i);
      }
      totals.store(i, sum);
    }
    block_sync();
    finish_gradient(tile, params, true, [&](int k, int channel) { return totals.load(k * tile.width + channel); },
                    groups_at);
    block_sync();
    const std::int64_t first = std::int64_t{block_x()} * params.sizes.groups;
    for (int group = thread_id(); group < tile.groups; group += threads) {
      params.coefficients.store_vector<4>((first + group) * 4, groups_at.load_vector<4>(group * 4));
    }
  }
};

// dx of a chunk of a slab. Grid: that of `GroupNormSums`, backwards, so that what the L2 cache still has is read
// first.
template <class T, bool ChannelsLast, bool Wide>
struct GroupNormInputGradient {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 2;
  static constexpr int min_capability = 80;
  using Params = GroupNormBackwardParams<T>;
  using Slab = GroupNormBackwardSlab<T, ChannelsLast, Wide, threads, false>;

  FASTLDM_DEVICE static void run(const Params& params) {
    const GroupNormChannelGradients& to = params.channels;
    const int block = grid_x() - 1 - block_x(), number = block / to.chunks;
    const Slab slab(params, to.first_slab + number);
    for (int group = thread_id(); group < slab.groups; group += threads) {
      const std::int64_t at = (std::int64_t{number} * to.sizes.groups + group) * 4;
      slab.groups_at.template store_vector<4>(group * 4, to.coefficients.load_vector<4>(at));
    }
    slab.prepare();
    slab.template write_dx<2>(group_norm_part(slab.units(), block % to.chunks, to.chunks),
                              [&](const GroupNormRun& run, int i) {
                                return slab.template read_pair<Cache::streaming>(run, i);
                              });
  }
};

// dweight and dbias, added up over the samples of `sums` (N, 2, C). Grid: 32 channels a block.
struct GroupNormParameterGradients {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 4;
  static constexpr int min_capability = 80;
  static constexpr int slices = threads / kWarp;

  struct Params {
    Global<const float> sums;
    GroupNormParameter scale;
    GroupNormGradient weight, bias;
    int batch, channels;
  };

  FASTLDM_DEVICE static void run(const Params& params) {
    FASTLDM_SHARED(float, parts, 2 * threads);
    const int lane = lane_id(), c = block_x() * kWarp + lane;
    const bool exists = c < params.channels;
    float weight = 0.0f, bias = 0.0f;
    if (exists) {
#pragma unroll 4
      for (int n = warp_id(); n < params.batch; n += slices) {
        const float gain = 1.0f + params.scale.load(n, c, 0.0f);
        const std::int64_t at = std::int64_t{n} * 2 * params.channels + c;
        bias += gain * params.sums.load(at);
        weight += gain * params.sums.load(at + params.channels);
      }
    }
    parts.store(thread_id(), weight);
    parts.store(threads + thread_id(), bias);
    block_sync();
    if (warp_id() != 0 || !exists) return;
    for (int slice = 1; slice < slices; ++slice) {
      weight += parts.load(slice * kWarp + lane);
      bias += parts.load(threads + slice * kWarp + lane);
    }
    params.weight.store(c, weight);
    params.bias.store(c, bias);
  }
};

}  // namespace fastldm::cuda
