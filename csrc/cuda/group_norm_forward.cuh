// Forward of group norm: y = act(GN(x + channel_bias) * (1 + scale) + shift), with mean and rstd of each group.
//
// Two ways, chosen in group_norm_forward_plan.h:
//
// - one read: a block, or a cluster of up to 8, keeps its slab in shared memory, makes the statistics there and writes
//   y. The blocks of a cluster tell each other three numbers a group through distributed shared memory. x is read
//   once, y written once: at 4.8 TB/s (H200) 0.43 ns for each KiB of x, a tensor of 16.8 MB in 7.0 us, 10.0 us at
//   3.35 TB/s (H100). Every byte of the slab is on its way at once (copy_async), so that a multiprocessor with 28 KB
//   in flight, 4.8 TB/s times 0.75 us over 132 of them, is never short of requests.
// - two reads: `GroupNormStatistics` goes over a chunk of a slab tile by tile, `GroupNormNormalize` merges the chunks
//   of its groups and writes y, in the reverse order, so that what the L2 cache still has is read first; the plan
//   starts both for so few slabs at a time that it has nearly all.
//
// Per element the one read takes about 16 instructions beside 2 of the special function unit, of the 28 that 132
// multiprocessors issue in the time of its 4 bytes of bfloat16 traffic.
//
// The variance is never E[x^2] - E[x]^2: a tile's sums run around its own mean, found first, and a mean stays a pair
// (pivot, rest). What is added to x, channel_bias - pivot, is a pair too, so that no digits are lost where a channel
// and its bias are large and cancel.
#pragma once

#include "cuda/group_norm_common.cuh"

namespace fastldm::cuda {

template <class T>
struct GroupNormForwardParams {
  GroupNormSizes sizes;
  Global<const T> x;
  Global<T> y;
  Global<float> mean, rstd;  // (N, G)
  Global<float> partial;     // (slabs, chunks, groups of a slab, 4), where there are chunks
  GroupNormParameters given;
  float eps;
  bool silu;
  int first_slab;
  int chunks;
  int tile;  // units
};

// The steps of all three kernels, of one slab.
template <class T, bool ChannelsLast, bool Wide, int Threads>
struct GroupNormForwardSlab : GroupNormTile<T, ChannelsLast, Wide, Threads> {
  using Tile = GroupNormTile<T, ChannelsLast, Wide, Threads>;
  using Tile::columns;
  using Tile::vector;
  using Params = GroupNormForwardParams<T>;
  // Vectors of shared memory at once; with numbers of 8 channels there are no registers for two.
  static constexpr int batch = columns == 8 ? 1 : 2;

  const Params& params;
  GroupNormLayout layout;
  Shared<T> data;
  Shared<float> table, sums, constants, groups_at;

  FASTLDM_DEVICE GroupNormForwardSlab(const Params& of, int slab)
      : Tile(of.sizes, slab),
        params(of),
        layout(group_norm_layout(of.sizes, ChannelsLast, vector, sizeof(T), Threads, of.tile, 1, 2)),
        data(dynamic_shared<T>(layout.data, layout.data_size)),
        table(dynamic_shared<float>(layout.table, 2 * layout.table_size)),
        sums(dynamic_shared<float>(layout.sums, 2 * of.sizes.width())),
        constants(dynamic_shared<float>(layout.constants, 4 * of.sizes.width())),
        groups_at(dynamic_shared<float>(layout.groups, 4 * of.sizes.groups)) {}

  FASTLDM_DEVICE float channel_bias(int channel) const {
    return params.given.channel_bias.load(this->sample, this->first_channel() + channel, 0.0f);
  }

  FASTLDM_DEVICE void fetch_tile(const GroupNormRange& range) const {
    this->fetch(data, params.x + this->base(), range);
    for (int channel = thread_id(); channel < this->width; channel += Threads) {
      store_four(constants, channel, typename Tile::Channel{channel_bias(channel), 0.0f, 0.0f, 0.0f});
    }
  }

  // Of a tile that was fetched: each group's moments, told to body(group, moments) in lane 0 of a warp.
  template <class Body>
  FASTLDM_DEVICE void tile_moments(const GroupNormRange& range, const Body& body) const {
    wait_group<0>();
    block_sync();
    const float count = static_cast<float>(this->elements(range));
    this->each_run(range, [&](const GroupNormRun& run) {
      typename Tile::Channel channel[columns];
      Tile::channels_of(run, constants, channel);
      float total[1][columns] = {};
      Tile::template each_vector<batch>(
          run, [&](int i) { return Tile::kept(data, run, i); },
          [&](int, const Vec<T, vector>& x) {
#pragma unroll
            for (int e = 0; e < vector; ++e) total[0][e % columns] += to_float(x[e]);
          });
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        total[0][j] += channel[j].high * static_cast<float>(run.count * (vector / columns));
      }
      this->template keep<1>(run, total, table, layout.table_size);
    });
    this->template sum_channels<1>(range, table, layout.table_size, sums);
    this->each_group([&](int group) {
      float sum = 0.0f;
      this->each_channel(group, [&](int channel) { sum += sums.load(channel); });
      const float pivot = divide(warp_reduce(sum, Sum()), count);
      this->each_channel(group, [&](int channel) {
        const ExactPair pair = exact_difference(channel_bias(channel), pivot);
        store_four(constants, channel, typename Tile::Channel{pair.high, pair.low, pivot, 0.0f});
      });
    });
    block_sync();
    this->each_run(range, [&](const GroupNormRun& run) {
      typename Tile::Channel channel[columns];
      Tile::channels_of(run, constants, channel);
      float total[2][columns] = {};
      Tile::template each_vector<batch>(
          run, [&](int i) { return Tile::kept(data, run, i); },
          [&](int, const Vec<T, vector>& x) {
#pragma unroll
            for (int e = 0; e < vector; ++e) {
              const int j = e % columns;
              const float deviation = (to_float(x[e]) + channel[j].high) + channel[j].low;
              total[0][j] += deviation;
              total[1][j] += deviation * deviation;
            }
          });
      this->template keep<2>(run, total, table, layout.table_size);
    });
    this->template sum_channels<2>(range, table, layout.table_size, sums);
    this->each_group([&](int group) {
      float sum = 0.0f, squares = 0.0f;
      this->each_channel(group, [&](int channel) {
        sum += sums.load(channel);
        squares += sums.load(this->width + channel);
      });
      sum = warp_reduce(sum, Sum());
      squares = warp_reduce(squares, Sum());
      if (lane_id() == 0) {
        const float pivot = constants.load(group * this->sizes.per_group * 4 + 2);
        const float rest = divide(sum, count), spread = squares - sum * rest;
        body(group, GroupNormMoments{pivot, rest, spread < 0.0f ? 0.0f : spread, this->elements(range)});
      }
    });
  }

  // Merges the `parts` moments of each group in a fixed order, where(group, part), and leaves the numbers that
  // normalize its channels. `tells`: writes mean and rstd.
  template <class Where>
  FASTLDM_DEVICE void finish(int parts, bool tells, const Where& where) const {
    this->each_group([&](int group) {
      GroupNormMoments moments{0.0f, 0.0f, 0.0f, 0};
      for (int part = lane_id(); part < parts; part += kWarp) moments = GroupNormMerge()(moments, where(group, part));
      moments = shuffle_from(warp_reduce(moments, GroupNormMerge()), 0);
      const float variance = divide(moments.spread, static_cast<float>(moments.count));
      const float rstd = divide(1.0f, square_root(variance + params.eps));
      const int number = this->first_group + group;
      if (tells && lane_id() == 0) {
        const std::int64_t at = std::int64_t{this->sample} * this->sizes.num_groups + number;
        params.mean.store(at, moments.pivot + moments.rest);
        params.rstd.store(at, rstd);
      }
      this->each_channel(group, [&](int channel) {
        const int n = this->sample, c = this->first_channel() + channel;
        const GroupNormParameters& given = params.given;
        const ExactPair pair = exact_difference(channel_bias(channel), moments.pivot);
        const float gain = 1.0f + given.scale.load(n, c, 0.0f);
        const float slope = given.weight.load(0, c, 1.0f) * gain * rstd;
        const float offset = given.bias.load(0, c, 0.0f) * gain + given.shift.load(n, c, 0.0f);
        store_four(constants, channel,
                   typename Tile::Channel{pair.high, pair.low - moments.rest, slope, offset});
      });
    });
    block_sync();
  }

  // y of a range; load(run, i) gives the vectors of x.
  template <int Batch, class Load>
  FASTLDM_DEVICE void normalize(const GroupNormRange& range, const Load& load) const {
    const Global<T> y = params.y + this->base();
    const bool silu = params.silu;
    this->each_run(range, [&](const GroupNormRun& run) {
      typename Tile::Channel channel[columns];
      Tile::channels_of(run, constants, channel);
      Tile::template each_vector<Batch>(
          run, [&](int i) { return load(run, i); },
          [&](int i, const Vec<T, vector>& x) {
            float values[vector];
#pragma unroll
            for (int e = 0; e < vector; ++e) {
              const typename Tile::Channel& of = channel[e % columns];
              const float u = ((to_float(x[e]) + of.high) + of.low) * of.slope + of.offset;
              values[e] = silu ? u * sigmoid(u) : u;
            }
            Tile::write(y, run, i, values);
          });
    });
  }
};

// One read. Grid: slabs, fastest, each of as many neighbouring blocks as a cluster has; without a cluster of one.
template <class T, bool ChannelsLast, bool Wide, bool Clustered>
struct GroupNormForward {
  static constexpr int threads = Clustered ? 512 : 256;
  static constexpr int min_blocks = Clustered ? 2 : 3;
  static constexpr int min_capability = Clustered ? 90 : 80;
  using Params = GroupNormForwardParams<T>;
  using Slab = GroupNormForwardSlab<T, ChannelsLast, Wide, threads>;

  FASTLDM_DEVICE static void run(const Params& params) {
    const int blocks = Clustered ? cluster_blocks() : 1, rank = Clustered ? cluster_rank() : 0;
    const Slab slab(params, block_x() / blocks);
    const GroupNormRange range = group_norm_part(slab.units(), rank, blocks);
    slab.fetch_tile(range);
    slab.tile_moments(range, [&](int group, const GroupNormMoments& moments) {
      store_four(slab.groups_at, group, moments);
    });
    if constexpr (Clustered) {
      cluster_sync();
      slab.finish(blocks, rank == 0,
                  [&](int group, int part) { return moments_at(peer(slab.groups_at, part), group); });
    } else {
      block_sync();
      slab.finish(1, true, [&](int group, int) { return moments_at(slab.groups_at, group); });
    }
    slab.template normalize<1>(range,
                               [&](const GroupNormRun& run, int i) { return Slab::kept(slab.data, run, i); });
    // Others may still read this block's moments.
    if constexpr (Clustered) cluster_sync();
  }
};

// Moments of a chunk of a slab. Grid: slabs from first_slab, fastest the chunks.
template <class T, bool ChannelsLast, bool Wide>
struct GroupNormStatistics {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 3;
  static constexpr int min_capability = 80;
  using Params = GroupNormForwardParams<T>;
  using Slab = GroupNormForwardSlab<T, ChannelsLast, Wide, threads>;

  FASTLDM_DEVICE static void run(const Params& params) {
    const int slab_index = params.first_slab + block_x() / params.chunks, chunk = block_x() % params.chunks;
    const Slab slab(params, slab_index);
    const GroupNormRange part = group_norm_part(slab.units(), chunk, params.chunks);
    for (int begin = part.begin; begin < part.end; begin += params.tile) {
      const GroupNormRange range = group_norm_tile(part, begin, params.tile);
      slab.fetch_tile(range);
      slab.tile_moments(range, [&](int group, const GroupNormMoments& moments) {
        const bool first = begin == part.begin;
        store_four(slab.groups_at, group,
                   first ? moments : GroupNormMerge()(moments_at(slab.groups_at, group), moments));
      });
      block_sync();
    }
    const std::int64_t at = std::int64_t{block_x()} * params.sizes.groups;
    for (int group = thread_id(); group < slab.groups; group += threads) {
      params.partial.template store_vector<4>((at + group) * 4, slab.groups_at.template load_vector<4>(group * 4));
    }
  }
};

// y of a chunk of a slab. Grid: that of `GroupNormStatistics`, backwards.
template <class T, bool ChannelsLast, bool Wide>
struct GroupNormNormalize {
  static constexpr int threads = 256;
  static constexpr int min_blocks = 3;
  static constexpr int min_capability = 80;
  using Params = GroupNormForwardParams<T>;
  using Slab = GroupNormForwardSlab<T, ChannelsLast, Wide, threads>;

  FASTLDM_DEVICE static void run(const Params& params) {
    const int block = grid_x() - 1 - block_x(), chunk = block % params.chunks;
    const int number = block / params.chunks;
    const Slab slab(params, params.first_slab + number);
    slab.finish(params.chunks, chunk == 0, [&](int group, int part) {
      const std::int64_t at = (std::int64_t{number} * params.chunks + part) * params.sizes.groups + group;
      return moments_at(params.partial, at);
    });
    const Global<const T> x = params.x + slab.base();
    // A run of a segment is two vectors long, one of a column much longer.
    constexpr int batch = ChannelsLast ? 4 : 2;
    slab.template normalize<batch>(group_norm_part(slab.units(), chunk, params.chunks),
                                   [&](const GroupNormRun& run, int i) {
                                     return Slab::template read<Cache::streaming>(x, run, i);
                                   });
  }
};

}  // namespace fastldm::cuda
