// How group norm is cut into slabs, clusters and chunks, for both directions.
//
// Traffic decides: bytes over bandwidth (H100 3.35 TB/s, H200 4.8). What the choice aims at is one read of every
// tensor; two blocks on each multiprocessor, so that one reads while the other writes; work for three fourths of the
// multiprocessors at least; 16-byte accesses, and with the channels last whole sectors of 32 bytes, better two.
//
// bfloat16, forward, an H200 (132 multiprocessors, 227 KiB a block):
//   (1, 320, 64, 64)     slab  80 KiB  32 slabs  cluster of 4, blocks of  21 KiB, 128 of them at once
//   (1, 512, 128, 128)   slab 512 KiB  32 slabs  cluster of 8, blocks of  66 KiB, two on a multiprocessor (registers)
//   (4, 128, 256, 256)   slab 512 KiB 128 slabs  cluster of 8, as above, four waves
//   (1, 128, 512, 512)   slab   2 MiB  32 slabs  two reads, 8 slabs of 16 MiB at a time: the second out of L2
// tests/cuda/test_group_norm.py has these as cases.
#pragma once

#include "cuda/common/launch.h"
#include "cuda/group_norm_common.cuh"

namespace fastldm::cuda {

struct GroupNormProblem {
  DType dtype;
  int batch, channels, num_groups, pixels;
  bool channels_last;
  bool aligned;  // all tensors of elements begin at multiples of 16 bytes

  int itemsize() const { return dtype == DType::float32 ? 4 : 2; }
  int per_group() const { return channels / num_groups; }
  std::int64_t slab_bytes(int groups) const { return std::int64_t{groups} * per_group() * pixels * itemsize(); }
  std::int64_t numel() const { return std::int64_t{batch} * channels * pixels; }
};

struct GroupNormChoice {
  int cluster;  // blocks that keep a slab for one read; 0: two reads
  int groups;   // of a slab
  bool wide;    // vectors of 16 bytes, not single elements
  int chunks;   // of a slab, in two reads
  int tile;     // units
  int range;    // slabs of a launch
};

// A parameter or its gradient: (C,), or (N, C) with rows `stride` elements apart.
struct GroupNormArgument {
  void* data;
  DType dtype;
  std::int64_t stride;
};

struct GroupNormArguments {
  GroupNormArgument weight, bias, channel_bias, scale, shift;
};

inline constexpr int kGroupNormMaxChannels = 2048;       // of a group: its numbers are in shared memory
inline constexpr int kGroupNormMaxSize = 1 << 30;        // of a dimension: they are counted in 32 bits
inline constexpr int kGroupNormL2Bytes = 16 << 20;       // of a launch of two reads: L2 is 40 MiB and more
inline constexpr int kGroupNormLeastPart = 8 << 10;      // bytes of a block of a cluster
inline constexpr int kGroupNormLoneSlab = 128 << 10;     // bytes that one block reads sooner than two launches start
inline constexpr int kGroupNormLeastChunk = 16 << 10;

inline bool group_norm_wide(const GroupNormProblem& problem, int groups) {
  const int channels = problem.channels_last ? groups * problem.per_group() : problem.pixels;
  const int row = problem.channels_last ? problem.channels : problem.pixels;
  const int vector = 16 / problem.itemsize();
  return problem.aligned && channels % vector == 0 && row % vector == 0;
}

// The least number of groups whose channels of a pixel are `bytes` or more, in vectors if any are.
inline int group_norm_groups(const GroupNormProblem& problem, int bytes) {
  if (!problem.channels_last) return 1;
  const int group_bytes = problem.per_group() * problem.itemsize();
  const int enough = (bytes + group_bytes - 1) / group_bytes;
  const int least = enough < problem.num_groups ? enough : problem.num_groups;
  for (int groups = least; groups <= problem.num_groups; ++groups) {
    if (groups * problem.per_group() > kGroupNormMaxChannels) break;
    if (group_norm_wide(problem, groups)) return groups;
  }
  return least;
}

inline GroupNormSizes group_norm_sizes(const GroupNormProblem& problem, const GroupNormChoice& choice) {
  const int vectors = problem.pixels / (choice.wide && !problem.channels_last ? 16 / problem.itemsize() : 1);
  const int wanted = (vectors + 63) / 64, segments = wanted < 65536 ? wanted : 65536;
  GroupNormSizes sizes{};
  sizes.num_groups = problem.num_groups;
  sizes.per_group = problem.per_group();
  sizes.groups = choice.groups;
  sizes.blocks = (problem.num_groups + choice.groups - 1) / choice.groups;
  sizes.pixels = problem.pixels;
  sizes.segment = (vectors + segments - 1) / segments;
  sizes.segments = (vectors + sizes.segment - 1) / sizes.segment;
  sizes.team = 1;
  while (sizes.team < kWarp && sizes.team < sizes.segment) sizes.team *= 2;
  return sizes;
}

inline int group_norm_shared_bytes(const GroupNormProblem& problem, const GroupNormChoice& choice, int threads,
                                   int tensors, int sums) {
  const int vector = choice.wide ? 16 / problem.itemsize() : 1;
  return group_norm_layout(group_norm_sizes(problem, choice), problem.channels_last, vector, problem.itemsize(),
                           threads, choice.tile, tensors, sums)
      .bytes;
}

// One read, as a forward (tensors 1, sums 2) or a backward (2, 3); of cluster 0 where that cannot be or would leave
// most of the device idle. clusters(choice, shared bytes): how many clusters the device holds at once.
template <class Clusters>
GroupNormChoice choose_one_read(const GroupNormProblem& problem, int groups, const Device& device, int tensors,
                                int sums, const Clusters& clusters) {
  const bool wide = group_norm_wide(problem, groups);
  GroupNormChoice best{0, groups, wide, 0, 0, 0};
  const std::int64_t slab = problem.slab_bytes(groups) * tensors;
  const int most = device.capability >= 90 && wide ? 8 : 1;
  for (int cluster = 1; cluster <= most; cluster *= 2) {
    GroupNormChoice choice{cluster, groups, wide, 0, 0, 0};
    const GroupNormSizes sizes = group_norm_sizes(problem, choice);
    const int units = sizes.units(problem.channels_last), threads = cluster > 1 ? 512 : 256;
    if (slab / cluster > device.shared_per_block) continue;
    if (cluster > 1 && (units < cluster || slab / cluster < kGroupNormLeastPart)) break;
    choice.tile = (units + cluster - 1) / cluster;
    choice.range = problem.batch * sizes.blocks;
    const int bytes = group_norm_shared_bytes(problem, choice, threads, tensors, sums);
    if (bytes > device.shared_per_block) continue;
    const int by_shared = device.shared_per_multiprocessor / (bytes + 1024);
    const int at_once = cluster > 1 ? clusters(choice, bytes) : device.multiprocessors * by_shared;
    if (at_once == 0) continue;
    best = choice;
    const int busy = (at_once < choice.range ? at_once : choice.range) * cluster;
    if (4 * busy >= 3 * device.multiprocessors && by_shared >= 2) break;
  }
  const bool alone = best.cluster == 1 && most == 1;
  if (alone && slab > kGroupNormLoneSlab && 2 * best.range < device.multiprocessors) best.cluster = 0;
  return best;
}

inline GroupNormChoice choose_two_reads(const GroupNormProblem& problem, const Device& device, int tensors) {
  GroupNormChoice choice{};
  choice.groups = group_norm_groups(problem, 128);
  choice.wide = group_norm_wide(problem, choice.groups);
  const GroupNormSizes sizes = group_norm_sizes(problem, choice);
  const int slabs = problem.batch * sizes.blocks, units = sizes.units(problem.channels_last);
  const std::int64_t slab = problem.slab_bytes(choice.groups), in_cache = kGroupNormL2Bytes / tensors / slab;
  choice.range = in_cache < 1 ? 1 : in_cache < slabs ? static_cast<int>(in_cache) : slabs;
  // Eight blocks a multiprocessor, whose merging of all chunks, 16 bytes each, is a fourth of their reading at most.
  const int wanted = (8 * device.multiprocessors + choice.range - 1) / choice.range;
  std::int64_t most = slab / kGroupNormLeastChunk;
  while (most > 1 && most * most > problem.slab_bytes(1) / 64) most = most * 7 / 8;
  choice.chunks = wanted < most ? wanted : static_cast<int>(most);
  if (choice.chunks > units) choice.chunks = units;
  if (choice.chunks < 1) choice.chunks = 1;
  if (tensors == 1) {
    // A tile is kept: six blocks a multiprocessor.
    choice.tile = static_cast<int>((32 << 10) / (slab / units + 1));
  } else {
    choice.tile = problem.channels_last ? 4096 : 1024;
  }
  if (choice.tile > units) choice.tile = units;
  if (choice.tile < 1) choice.tile = 1;
  return choice;
}

template <class Clusters>
GroupNormChoice choose_group_norm(const GroupNormProblem& problem, const Device& device, int tensors, int sums,
                                  const Clusters& clusters) {
  const int groups = group_norm_groups(problem, 64);
  GroupNormChoice choice = choose_one_read(problem, groups, device, tensors, sums, clusters);
  // Rows of one whole sector before two reads.
  const int fewer = group_norm_groups(problem, 32);
  const bool sectors = fewer * problem.per_group() * problem.itemsize() % 32 == 0;
  if (choice.cluster == 0 && fewer < groups && sectors) {
    choice = choose_one_read(problem, fewer, device, tensors, sums, clusters);
  }
  return choice.cluster > 0 ? choice : choose_two_reads(problem, device, tensors);
}

// `Kernel` keeps a slab in a cluster; its occupancy says how many clusters the device holds.
template <template <class, bool, bool, bool> class Kernel, class T>
GroupNormChoice choose_group_norm(const GroupNormProblem& problem, const Context& context, int tensors, int sums) {
  const auto clusters = [&](const GroupNormChoice& choice, int bytes) {
    Shape shape;
    shape.grid_x = choice.range * choice.cluster;
    shape.cluster = choice.cluster;
    shape.shared_bytes = bytes;
    return problem.channels_last ? resident_clusters<Kernel<T, true, true, true>>(shape, context)
                                 : resident_clusters<Kernel<T, false, true, true>>(shape, context);
  };
  return choose_group_norm(problem, context.device, tensors, sums, clusters);
}

inline void check_group_norm(const GroupNormProblem& problem) {
  require(problem.per_group() <= kGroupNormMaxChannels && problem.pixels <= kGroupNormMaxSize,
          "group norm in CUDA takes up to 2048 channels a group and 2^30 pixels");
  require(std::int64_t{problem.per_group()} * problem.pixels < std::int64_t{1} << 32,
          "group norm in CUDA takes less than 2^32 elements a group");
  require(std::int64_t{problem.batch} * problem.num_groups < (1 << 27), "group norm in CUDA takes up to 2^27 groups");
}

inline void check_group_norm_choice(const GroupNormProblem& problem, const GroupNormChoice& choice) {
  check_group_norm(problem);
  require(!choice.wide || group_norm_wide(problem, choice.groups), "vectors need rows of whole 16 bytes");
  require(choice.wide || choice.cluster <= 1, "clusters need vectors");
  const int units = group_norm_sizes(problem, choice).units(problem.channels_last);
  require(choice.cluster <= units && choice.chunks <= units, "every block needs a unit");
}

// body(true or false as a type, ...) for the variants of a kernel.
template <class Body>
void group_norm_variant(const GroupNormProblem& problem, bool wide, const Body& body) {
  const auto with = [&](auto last) {
    wide ? body(last, std::true_type{}) : body(last, std::false_type{});
  };
  problem.channels_last ? with(std::true_type{}) : with(std::false_type{});
}

// The views of a parameter of `rows` rows, read or written.
template <class View>
View group_norm_view(const GroupNormArgument& argument, int rows, int channels) {
  View view{};
  const std::int64_t count = argument.data == nullptr ? 0 : (rows - 1) * argument.stride + channels;
  switch (argument.dtype) {
    case DType::float32:
      view.single = {static_cast<float*>(argument.data), count};
      break;
    case DType::bfloat16:
      view.brain = {static_cast<bfloat16*>(argument.data), count};
      break;
    case DType::float16:
      view.half = {static_cast<float16*>(argument.data), count};
      break;
  }
  if constexpr (std::is_same_v<View, GroupNormParameter>) view.stride = argument.stride;
  return view;
}

inline GroupNormParameters group_norm_parameters(const GroupNormArguments& given, const GroupNormProblem& problem) {
  const auto view = [&](const GroupNormArgument& argument, int rows) {
    return group_norm_view<GroupNormParameter>(argument, rows, problem.channels);
  };
  return {view(given.weight, 1), view(given.bias, 1), view(given.channel_bias, problem.batch),
          view(given.scale, problem.batch), view(given.shift, problem.batch)};
}

}  // namespace fastldm::cuda
