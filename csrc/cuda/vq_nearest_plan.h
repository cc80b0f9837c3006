// Which kernels of vq_nearest_*.cuh are launched, and how, on a GPU and under the shim alike.
#pragma once

#include "cuda/vq_nearest_few.cuh"
#include "cuda/vq_nearest_finish.cuh"
#include "cuda/vq_nearest_many.cuh"
#include "cuda/vq_nearest_pack.cuh"
#include "cuda/vq_plan.h"

namespace fastldm::cuda {

struct VqGivenCodebook {
  const void* data;
  DType type;
  std::int64_t stride_code, stride_dim;
  int count;
};

inline constexpr int kVqMaxDim = 4096, kVqMaxCodes = 1 << 28;

// The error of a score, of so many roundings (kernels/vq/bound.py).
inline float vq_relative_error(int roundings, double unit) {
  return static_cast<float>(roundings * unit / (1.0 - roundings * unit));
}

// How the codes (`units` of them: places or tiles) are divided among blocks that share the rows.
struct VqSplits {
  int units_per_split, count;
};

// The fewest splits with which the waves of blocks take about the least time. A block has to do with one unit besides
// its own, to read its rows. `resident`: blocks that the device holds at once.
inline VqSplits vq_splits(std::int64_t tiles, int units, std::int64_t resident) {
  VqSplits chosen = {units, 1};
  std::int64_t least = -1;
  for (int wanted = 1; wanted <= VqFinish::max_splits && wanted <= units; ++wanted) {
    const int per_split = vq_ceil_div(units, wanted), count = vq_ceil_div(units, per_split);
    const std::int64_t waves = vq_ceil_div(tiles * count, resident), time = waves * (per_split + 1);
    if (least < 0 || time * 20 < least * 19) {
      least = time;
      chosen = {per_split, count};
    }
  }
  return chosen;
}

// Calls body(VqSearchFew<...>{}) with the kernel for `dim` dimensions, padded to a number that there is one for. A
// thread has 8 rows, or 2 where too few blocks would share them.
template <class Body>
void vq_with_few(int dim, bool many_rows, const Body& body) {
  const auto with = [&](auto padded) {
    constexpr int Dim = decltype(padded)::value;
    if (many_rows) {
      body(VqSearchFew<Dim, 8>());
    } else {
      body(VqSearchFew<Dim, 2>());
    }
  };
  if (dim <= 1) return with(std::integral_constant<int, 1>());
  if (dim <= 2) return with(std::integral_constant<int, 2>());
  if (dim <= 3) return with(std::integral_constant<int, 3>());
  if (dim <= 4) return with(std::integral_constant<int, 4>());
  if (dim <= 6) return with(std::integral_constant<int, 6>());
  if (dim <= 8) return with(std::integral_constant<int, 8>());
  if (dim <= 12) return with(std::integral_constant<int, 12>());
  return with(std::integral_constant<int, 16>());
}

// The launches, one after the other; without memory only the bytes of it that they need.
class VqNearest {
 public:
  VqNearest(const VqGiven& z, const VqGivenCodebook& codebook, void* memory, std::int64_t* index,
            const Context& context)
      : context_(context), memory_(memory), run_(memory != nullptr), rows_(vq_rows(z)), index_(index, z.rows) {
    require(z.dim <= kVqMaxDim, "vq_nearest takes up to 4096 dimensions");
    require(codebook.count > 0 && codebook.count <= kVqMaxCodes, "vq_nearest takes up to 2^28 codes");
    const std::int64_t span = (codebook.count - 1) * codebook.stride_code + (z.dim - 1) * codebook.stride_dim + 1;
    codebook_ = {vq_numbers(codebook.data, codebook.type, span), codebook.stride_code, codebook.stride_dim,
                 codebook.count, z.dim};
    if (z.dim <= VqPackFew::max_dim) {
      few();
    } else {
      many();
    }
  }

  std::int64_t bytes() const { return memory_.bytes(); }

 private:
  void few() {
    const int places = vq_ceil_div(codebook_.count, 32);
    // 8 rows in a thread, if half of the multiprocessors have work then.
    const std::int64_t blocks = vq_ceil_div<std::int64_t>(rows_.count, 8 * 128) * (places < 32 ? places : 32);
    vq_with_few(rows_.dim, 2 * blocks >= context_.device.multiprocessors, [&](auto kernel) {
      using Kernel = decltype(kernel);
      static_assert(Kernel::place == 32 && VqPackFew::threads % 32 == 0, "the packed codes are of whole places");
      const int codes = places * Kernel::place, pack_blocks = vq_ceil_div(codes, VqPackFew::threads);
      const std::int64_t tiles = vq_ceil_div<std::int64_t>(rows_.count, Kernel::rows);
      const VqSplits splits = vq_splits(tiles, places, resident<Kernel>(Kernel::shared_bytes));
      const auto packed = memory_.take<float>(static_cast<std::int64_t>(codes) * Kernel::slots);
      const auto centre = memory_.take<float>(rows_.dim), largest = memory_.take<float>(pack_blocks);
      const VqFound found = take_found(splits.count);
      if (!run_) return;

      Shape shape;
      shape.grid_x = pack_blocks;
      launch<VqPackFew>(shape, {codebook_, packed, centre, largest, codes, Kernel::slots}, context_);
      shape.grid_x = to_int(tiles);
      shape.grid_y = splits.count;
      shape.shared_bytes = Kernel::shared_bytes;
      launch<Kernel>(shape, {rows_, packed, centre, found, places, splits.units_per_split}, context_);
      finish(found, largest, pack_blocks, splits, Kernel::place, vq_relative_error(rows_.dim + 8, 0x1p-24));
    });
  }

  void many() {
    const int slices = vq_ceil_div(rows_.dim, VqPackMany::slice);
    const int code_tiles = vq_ceil_div(codebook_.count, VqPackMany::tile);
    const int most_splits = code_tiles < VqFinish::max_splits ? code_tiles : VqFinish::max_splits;
    const std::int64_t blocks = vq_ceil_div<std::int64_t>(rows_.count, 128) * most_splits;
    const bool has_room = VqSearchMany<128>::layout(slices).bytes <= context_.device.shared_per_block;
    if (has_room && blocks >= context_.device.multiprocessors) {
      search_many<VqSearchMany<128>>(slices, code_tiles);
    } else {
      search_many<VqSearchMany<64>>(slices, code_tiles);
    }
  }

  template <class Kernel>
  void search_many(int slices, int code_tiles) {
    int chunk = slices;
    while (Kernel::layout(chunk).bytes > context_.device.shared_per_block) --chunk;
    const int shared_bytes = Kernel::layout(chunk).bytes, padded = slices * Kernel::slice;
    const std::int64_t tiles = vq_ceil_div<std::int64_t>(rows_.count, Kernel::rows);
    const VqSplits splits = vq_splits(tiles, code_tiles, resident<Kernel>(shared_bytes));
    const std::int64_t codes = static_cast<std::int64_t>(code_tiles) * Kernel::codes;
    const auto packed = memory_.take<float16>(2 * codes * padded);
    const auto norms = memory_.take<float>(codes), scales = memory_.take<float>(code_tiles);
    const auto centre = memory_.take<float>(rows_.dim), largest = memory_.take<float>(code_tiles);
    const VqFound found = take_found(splits.count);
    if (!run_) return;

    Shape shape;
    shape.grid_x = code_tiles;
    shape.shared_bytes = VqPackMany::shared_bytes(slices);
    launch<VqPackMany>(shape, {codebook_, packed, norms, scales, centre, largest, slices}, context_);
    shape.grid_x = to_int(tiles);
    shape.grid_y = splits.count;
    shape.shared_bytes = shared_bytes;
    launch<Kernel>(
        shape,
        {rows_, packed, norms, scales, centre, found, code_tiles, splits.units_per_split, slices, chunk}, context_);
    // One addition more than there, of the two sums, is within its 6.
    finish(found, largest, code_tiles, splits, 1, vq_relative_error(padded + 6, 0x1p-22), Kernel::codes);
  }

  // `unit`: codes of what the splits are made of; `place`: of what a search finds.
  void finish(const VqFound& found, const Global<float>& largest, int largest_count, const VqSplits& splits, int place,
              float relative, int unit = 32) {
    // Where each row has a place to look through, enough warps for all multiprocessors come before few of them.
    int rows_per_warp = place > 1 ? 4 : kWarp;
    while (rows_per_warp > 1 && rows_.count / rows_per_warp < 8 * context_.device.multiprocessors) rows_per_warp /= 2;
    Shape shape;
    shape.grid_x = to_int(vq_ceil_div<std::int64_t>(rows_.count, rows_per_warp * (VqFinish::threads / kWarp)));
    launch<VqFinish>(shape,
                     {rows_, codebook_, found, largest, index_, relative, largest_count, splits.count,
                      splits.units_per_split * unit, place, rows_per_warp},
                     context_);
  }

  VqFound take_found(int splits) {
    const std::int64_t count = splits * rows_.count;
    return {memory_.take<float>(count), memory_.take<float>(count), memory_.take<std::int32_t>(count),
            memory_.take<float>(rows_.count)};
  }

  template <class Kernel>
  std::int64_t resident(int shared_bytes) const {
    const int blocks = blocks_per_multiprocessor<Kernel>(shared_bytes, context_);
    return static_cast<std::int64_t>(blocks > 0 ? blocks : 1) * context_.device.multiprocessors;
  }

  static int to_int(std::int64_t blocks) {
    require(blocks < std::int64_t{1} << 31, "vq_nearest takes fewer rows");
    return static_cast<int>(blocks);
  }

  const Context& context_;
  VqMemory memory_;
  bool run_;
  VqRows rows_;
  VqCodebook codebook_;
  Global<std::int64_t> index_;
};

// Bytes of working memory that vq_nearest takes.
inline std::int64_t vq_nearest_memory(const VqGiven& z, const VqGivenCodebook& codebook, const Context& context) {
  return VqNearest(z, codebook, nullptr, nullptr, context).bytes();
}

// `index` (N,): the nearest code of each row.
inline void vq_nearest(const VqGiven& z, const VqGivenCodebook& codebook, void* memory, std::int64_t* index,
                       const Context& context) {
  VqNearest(z, codebook, memory, index, context);
}

}  // namespace fastldm::cuda
