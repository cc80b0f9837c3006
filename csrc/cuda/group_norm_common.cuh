// What the kernels of group norm share: how a block goes over its part of a slab, sums per channel in a fixed order,
// and the numbers of a channel.
//
// A slab is what one block, or one cluster of blocks, normalizes: a group of a sample, (channels, pixels), or with the
// channels last some neighbouring groups, (pixels, channels), so that a pixel's run of channels is whole sectors of
// memory. It is cut into units of equal work: a segment of a channel, or a pixel. A range of units is a block's part.
//
// Within a range a thread has runs: vectors at equal distances whose channels do not change, so that the numbers of
// these channels stay in registers, and the loops are the same for both layouts. A run is of a segment, of which the
// lanes of a team have every team-th vector; or of a column of vectors over every n-th pixel. Each thread reads back
// from shared memory only what it put there itself: the data of a slab needs no barrier.
#pragma once

#include "cuda/common/device.h"

namespace fastldm::cuda {

struct GroupNormSizes {
  int num_groups;
  int per_group;  // channels
  int groups;     // of a slab
  int blocks;     // slabs of a sample; the last one may be of fewer groups
  int pixels;
  int segments;  // of a channel
  int segment;   // vectors; the last one of a channel may be shorter
  int team;      // lanes: a power of two

  FASTLDM_HOST_DEVICE int channels() const { return num_groups * per_group; }
  FASTLDM_HOST_DEVICE int width() const { return groups * per_group; }
  FASTLDM_HOST_DEVICE int units(bool channels_last) const { return channels_last ? pixels : per_group * segments; }
};

// Offsets into dynamic shared memory.
struct GroupNormLayout {
  int data;       // the vectors of a tile, of one tensor after the other
  int table;      // sums of runs
  int sums;       // sums of channels
  int totals;     // sums of channels over several tiles, where no tensor is kept
  int constants;  // four numbers of each channel
  int groups;     // four numbers of each group
  int table_size, data_size;
  int bytes;
};

// Of a block of `threads` that keeps `tensors` tensors and makes `sums` sums of each channel, a tile at a time.
FASTLDM_HOST_DEVICE constexpr GroupNormLayout group_norm_layout(const GroupNormSizes& sizes, bool channels_last,
                                                               int vector, int itemsize, int threads, int tile,
                                                               int tensors, int sums) {
  const int width = sizes.groups * sizes.per_group, vectors = threads * vector;
  GroupNormLayout layout{};
  layout.table_size = channels_last ? (vectors > width ? vectors : width) : tile;
  layout.data_size = tile * (channels_last ? width : sizes.segment * vector);
  SharedLayout shared;
  layout.data = shared.take<char>(tensors * layout.data_size * itemsize);
  layout.table = shared.take<float>(sums * layout.table_size);
  layout.sums = shared.take<float>(sums * width);
  layout.totals = shared.take<float>(tensors == 0 ? sums * width : 0);
  layout.constants = shared.take<float>(4 * width);
  layout.groups = shared.take<float>(4 * sizes.groups);
  layout.bytes = shared.bytes();
  return layout;
}

// An input per channel, (C,) or (N, C), in any of the dtypes; of the views at most one is there.
struct GroupNormParameter {
  Global<const float> single;
  Global<const bfloat16> brain;
  Global<const float16> half;
  std::int64_t stride;  // of a sample

  FASTLDM_DEVICE float load(int sample, int channel, float otherwise) const {
    const std::int64_t i = sample * stride + channel;
    if (single) return single.load(i);
    if (brain) return to_float(brain.load(i));
    if (half) return to_float(half.load(i));
    return otherwise;
  }
};

struct GroupNormParameters {
  GroupNormParameter weight, bias, channel_bias, scale, shift;
};

// How a thread goes through some vectors. Offsets count elements, slots count vectors.
struct GroupNormRun {
  std::int64_t offset, step;  // in the slab
  int slot, slot_step;        // in the tile
  int count;                  // of vectors
  int channel;                // of the first element, in the slab
  int entry;                  // in the table of sums
};

// Units from `begin` to `end`.
struct GroupNormRange {
  int begin, end;
};

FASTLDM_DEVICE GroupNormRange group_norm_part(int units, int part, int parts) {
  const std::int64_t all = units;
  return {static_cast<int>(all * part / parts), static_cast<int>(all * (part + 1) / parts)};
}

// `tile` units of a part from `begin` on, or those that are left.
FASTLDM_DEVICE GroupNormRange group_norm_tile(const GroupNormRange& part, int begin, int tile) {
  return {begin, part.end - begin < tile ? part.end : begin + tile};
}

// a + b exactly, as a pair: high is the sum in float32 (Knuth, The Art of Computer Programming 2, 4.2.2).
struct ExactPair {
  float high, low;
};

FASTLDM_DEVICE ExactPair exact_difference(float a, float b) {
  const float high = a - b, taken = high - a;
  return {high, (a - (high - taken)) - (b + taken)};
}

FASTLDM_DEVICE float sigmoid(float u) { return reciprocal_approx(1.0f + exp_approx(-u)); }

template <class T_, bool ChannelsLast, bool Wide, int Threads>
struct GroupNormTile {
  using T = T_;
  static constexpr int vector = Wide ? 16 / sizeof(T) : 1;
  static constexpr int columns = ChannelsLast ? vector : 1;  // channels of a vector
  static constexpr int warps = Threads / kWarp;

  // What a thread knows of the channels of a run: x + bias - mean is (x + high) + low, and what is normalized is
  // that times slope plus offset.
  struct Channel {
    float high, low, slope, offset;
  };

  const GroupNormSizes& sizes;
  int sample, first_group, groups, width;

  FASTLDM_DEVICE GroupNormTile(const GroupNormSizes& of, int slab) : sizes(of), sample(slab / of.blocks) {
    first_group = slab % of.blocks * of.groups;
    const int left = of.num_groups - first_group;
    groups = left < of.groups ? left : of.groups;
    width = groups * of.per_group;
  }

  // Of the first element.
  FASTLDM_DEVICE std::int64_t base() const {
    const std::int64_t pixels = sizes.pixels, channel = first_group * sizes.per_group;
    return sample * pixels * sizes.channels() + channel * (ChannelsLast ? 1 : pixels);
  }

  FASTLDM_DEVICE int first_channel() const { return first_group * sizes.per_group; }

  FASTLDM_DEVICE int units() const { return sizes.units(ChannelsLast); }

  // Elements of a group before a unit: less than 2^32 (`check_group_norm`).
  FASTLDM_DEVICE std::uint32_t elements_before(int unit) const {
    if constexpr (ChannelsLast) {
      return static_cast<std::uint32_t>(unit) * static_cast<std::uint32_t>(sizes.per_group);
    } else {
      const std::uint32_t channel = unit / sizes.segments, segment = unit % sizes.segments;
      return channel * sizes.pixels + segment * sizes.segment * vector;
    }
  }

  FASTLDM_DEVICE std::uint32_t elements(const GroupNormRange& range) const {
    return elements_before(range.end) - elements_before(range.begin);
  }

  // Pixels that are read side by side, with the channels last.
  FASTLDM_DEVICE int rows() const {
    const int row = width / vector;
    return row < Threads ? Threads / row : 1;
  }

  // body(run) for each of the thread's runs; with the channels first all lanes of a warp come equally often, with
  // `count` 0 and `entry` -1 where there is none for them.
  template <class Body>
  FASTLDM_DEVICE void each_run(const GroupNormRange& range, const Body& body) const {
    if constexpr (ChannelsLast) {
      const int row = width / vector, across = row < Threads ? row : Threads, down = rows();
      const int my_row = thread_id() / across;
      if (my_row >= down) return;
      const int units = range.end - range.begin;
      const int count = units > my_row ? (units - my_row + down - 1) / down : 0;
      const std::int64_t channels = sizes.channels();
      for (int column = thread_id() % across; column < row; column += across) {
        const int channel = column * vector;
        body(GroupNormRun{(range.begin + my_row) * channels + channel, down * channels, my_row * row + column,
                          down * row, count, channel, my_row * width + channel});
      }
    } else {
      const int lane = thread_id() % sizes.team, teams = Threads / sizes.team;
      const int units = range.end - range.begin, vectors = sizes.pixels / vector;
      for (int first = 0; first < units; first += teams) {
        const int mine = first + thread_id() / sizes.team;
        if (mine >= units) {
          body(GroupNormRun{0, 0, 0, 0, 0, 0, -1});
          continue;
        }
        const int channel = (range.begin + mine) / sizes.segments;
        const int begin = (range.begin + mine - channel * sizes.segments) * sizes.segment;
        const int left = vectors - begin, length = left < sizes.segment ? left : sizes.segment;
        const int count = lane < length ? (length - lane + sizes.team - 1) / sizes.team : 0;
        const std::int64_t at = std::int64_t{vectors} * channel + begin + lane;
        body(GroupNormRun{at * vector, std::int64_t{sizes.team} * vector, mine * sizes.segment + lane, sizes.team,
                          count, channel, mine});
      }
    }
  }

  // body(i, values) over the vectors of a run, `Batch` of them read before the first is used.
  template <int Batch, class Load, class Body>
  FASTLDM_DEVICE static void each_vector(const GroupNormRun& run, const Load& load, const Body& body) {
    int i = 0;
    if constexpr (Batch > 1) {
      for (; i + Batch <= run.count; i += Batch) {
        decltype(load(0)) values[Batch];
#pragma unroll
        for (int j = 0; j < Batch; ++j) values[j] = load(i + j);
#pragma unroll
        for (int j = 0; j < Batch; ++j) body(i + j, values[j]);
      }
    }
    for (; i < run.count; ++i) body(i, load(i));
  }

  // The vectors of a range into shared memory; each thread waits for its own with wait_group.
  FASTLDM_DEVICE void fetch(const Shared<T>& data, const Global<const T>& slab, const GroupNormRange& range) const {
    each_run(range, [&](const GroupNormRun& run) {
      if constexpr (Wide) {
        for (int i = 0; i < run.count; ++i) {
          copy_async<16>(data + (run.slot + i * run.slot_step) * vector, slab + (run.offset + i * run.step));
        }
      } else {
        each_vector<4>(
            run, [&](int i) { return slab.load(run.offset + i * run.step); },
            [&](int i, T value) { data.store(run.slot + i * run.slot_step, value); });
      }
    });
    commit_group();
  }

  FASTLDM_DEVICE static Vec<T, vector> kept(const Shared<T>& data, const GroupNormRun& run, int i) {
    return data.template load_vector<vector>((run.slot + i * run.slot_step) * vector);
  }

  template <Cache Policy>
  FASTLDM_DEVICE static Vec<T, vector> read(const Global<const T>& slab, const GroupNormRun& run, int i) {
    return slab.template load_vector<vector, sizeof(T) * vector, Policy>(run.offset + i * run.step);
  }

  FASTLDM_DEVICE static void write(const Global<T>& slab, const GroupNormRun& run, int i,
                                   const float (&values)[vector]) {
    Vec<T, vector> rounded;
    if constexpr (sizeof(T) == 2 && Wide) {
      std::uint32_t words[vector / 2];
#pragma unroll
      for (int e = 0; e < vector / 2; ++e) words[e] = pack<T>(values[2 * e], values[2 * e + 1]);
      memcpy(&rounded, words, sizeof(words));
    } else {
#pragma unroll
      for (int e = 0; e < vector; ++e) rounded[e] = from_float<T>(values[e]);
    }
    slab.template store_vector<vector>(run.offset + i * run.step, rounded);
  }

  FASTLDM_DEVICE static void channels_of(const GroupNormRun& run, const Shared<float>& constants,
                                         Channel (&found)[columns]) {
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      const Vec<float, 4> four = constants.load_vector<4>((run.channel + j) * 4);
      found[j] = {four[0], four[1], four[2], four[3]};
    }
  }

  // The thread's sums of a run to the table.
  template <int Sums>
  FASTLDM_DEVICE void keep(const GroupNormRun& run, float (&sums)[Sums][columns], const Shared<float>& table,
                           int table_size) const {
#pragma unroll
    for (int k = 0; k < Sums; ++k) {
      if constexpr (!ChannelsLast) {
        for (int distance = sizes.team / 2; distance > 0; distance /= 2) {
          sums[k][0] += shuffle_xor(sums[k][0], distance);
        }
        if (run.entry >= 0 && thread_id() % sizes.team == 0) table.store(k * table_size + run.entry, sums[k][0]);
      } else if constexpr (columns == 1) {
        table.store(k * table_size + run.entry, sums[k][0]);
      } else {
#pragma unroll
        for (int j = 0; j < columns; j += 4) {
          table.template store_vector<4>(
              k * table_size + run.entry + j,
              Vec<float, 4>{{sums[k][j], sums[k][j + 1], sums[k][j + 2], sums[k][j + 3]}});
        }
      }
    }
  }

  // From the table the sums of each channel over the range, in the order of its runs: sums[k * width + channel]. A
  // barrier before and after.
  template <int Sums>
  FASTLDM_DEVICE void sum_channels(const GroupNormRange& range, const Shared<float>& table, int table_size,
                                   const Shared<float>& sums) const {
    block_sync();
    for (int i = thread_id(); i < Sums * width; i += Threads) {
      const int k = i / width, channel = i - k * width;
      float sum = 0.0f;
      if constexpr (ChannelsLast) {
        for (int row = 0; row < rows(); ++row) sum += table.load(k * table_size + row * width + channel);
      } else {
        const int first = channel * sizes.segments - range.begin, last = first + sizes.segments;
        const int units = range.end - range.begin;
        const int end = last < units ? last : units;
        for (int unit = first > 0 ? first : 0; unit < end; ++unit) sum += table.load(k * table_size + unit);
      }
      sums.store(i, sum);
    }
    block_sync();
  }

  // body(group) for the groups of a warp, all its lanes at once.
  template <class Body>
  FASTLDM_DEVICE void each_group(const Body& body) const {
    for (int group = warp_id(); group < groups; group += warps) body(group);
  }

  // body(channel) for the lane's channels of a group, in the slab.
  template <class Body>
  FASTLDM_DEVICE void each_channel(int group, const Body& body) const {
    const int first = group * sizes.per_group;
    for (int i = lane_id(); i < sizes.per_group; i += kWarp) body(first + i);
  }
};

// What is known of the elements of a group seen so far. Their mean is pivot + rest, a pair so that x - mean loses
// nothing where the mean is large; spread is the sum of (x - mean)^2. The count is exact: float32 would add 131 to 2^24
// as 132, at every tile again.
struct GroupNormMoments {
  float pivot, rest, spread;
  std::uint32_t count;
};

// Of both together (Chan, Golub, LeVeque, The American Statistician 37, 1983). Not commutative in the last bits: only
// lane 0 has the result of a reduction.
struct GroupNormMerge {
  FASTLDM_DEVICE GroupNormMoments operator()(const GroupNormMoments& a, const GroupNormMoments& b) const {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const std::uint32_t count = a.count + b.count;
    const float share = divide(static_cast<float>(b.count), static_cast<float>(count));
    const float apart = (b.pivot - a.pivot) + (b.rest - a.rest);
    return {a.pivot, a.rest + apart * share,
            a.spread + b.spread + apart * apart * (static_cast<float>(a.count) * share), count};
  }
};

// The four numbers of a group or channel in shared memory.
template <class Four>
FASTLDM_DEVICE void store_four(const Shared<float>& to, int index, const Four& four) {
  static_assert(sizeof(Four) == 16, "four numbers");
  Vec<float, 4> vector;
  memcpy(&vector, &four, sizeof(four));
  to.store_vector<4>(index * 4, vector);
}

// `index` counts groups, in shared or global memory.
template <class View>
FASTLDM_DEVICE GroupNormMoments moments_at(const View& from, std::int64_t index) {
  const Vec<float, 4> four = from.template load_vector<4>(index * 4);
  GroupNormMoments moments;
  memcpy(&moments, &four, sizeof(four));
  return moments;
}

}  // namespace fastldm::cuda
