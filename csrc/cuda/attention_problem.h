// A call of attention as launchers and drivers describe it, and what the kernels are told of it.
#pragma once

#include <cmath>

#include "cuda/attention_tile.cuh"
#include "cuda/common/launch.h"

namespace fastldm::cuda::attention {

// The one head dim above 256, which has kernels of its own.
inline constexpr int kWide = 512;

// A (B, H, S, D) tensor: strides of batch, head and row in elements; the last dimension is dense.
struct HeadsArgument {
  void* data;
  std::int64_t strides[3];
};

// Of a mask's elements: bool, q's dtype, float32.
enum class MaskType { boolean, half, single };

struct Arguments {
  std::int64_t batch, heads, queries, keys, dim;
  bool causal;
  double scale;
  const void* mask;  // (B, H, Sq, Sk) by its strides, in elements, 0 where it is broadcast; or null
  MaskType mask_type;
  std::int64_t mask_strides[4];
};

// The length of a (B, H, S, D) tensor from its first to its last element.
inline std::int64_t span_of(const Arguments& call, std::int64_t length, const std::int64_t (&strides)[3],
                            std::int64_t dim) {
  return (call.batch - 1) * strides[0] + (call.heads - 1) * strides[1] + (length - 1) * strides[2] + dim;
}

template <class T>
Heads<T> heads_of(const Arguments& call, const HeadsArgument& x, std::int64_t length) {
  bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
  for (std::int64_t stride : x.strides) aligned = aligned && stride % 8 == 0;
  require(aligned, "attention: rows of heads must begin at multiples of 16 bytes");
  return {{static_cast<T*>(x.data), span_of(call, length, x.strides, call.dim)},
          x.strides[0],
          x.strides[1],
          x.strides[2]};
}

inline Mask mask_of(const Arguments& call) {
  if (call.mask == nullptr) return {};
  const MaskKind kinds[] = {MaskKind::scores, MaskKind::added, MaskKind::added_floats};
  const int type = static_cast<int>(call.mask_type), bytes = 1 << type;
  const auto& strides = call.mask_strides;
  const std::int64_t last = (call.batch - 1) * strides[0] + (call.heads - 1) * strides[1] +
                            (call.queries - 1) * strides[2] + (call.keys - 1) * strides[3];
  const bool of_keys = call.mask_type == MaskType::boolean && strides[2] == 0;
  return {{static_cast<const std::uint8_t*>(call.mask), (last + 1) * bytes},
          strides[0] * bytes,
          strides[1] * bytes,
          strides[2] * bytes,
          strides[3] * bytes,
          of_keys ? MaskKind::keys : kinds[type]};
}

inline Problem problem_of(const Arguments& call) {
  const std::int64_t most = 1 << 30;
  require(call.batch > 0 && call.heads > 0 && call.queries > 0 && call.keys > 0, "attention: nothing to compute");
  require(call.queries <= most && call.keys <= most, "attention: takes up to 2^30 queries and keys");
  require(call.dim % 8 == 0 && call.dim > 0, "attention: head dims are multiples of 8");
  const Mask mask = mask_of(call);
  const bool added = mask.kind == MaskKind::added || mask.kind == MaskKind::added_floats;
  // Kernels divide by the scale; what 1e-30 times a score adds to it is nothing.
  const float scale = std::fabs(call.scale) < 1e-30 ? 1e-30f : static_cast<float>(std::fabs(call.scale));
  const float size = added ? 1.0f : scale;
  return {static_cast<int>(call.heads), static_cast<int>(call.queries), static_cast<int>(call.keys),
          static_cast<int>(call.dim),   call.causal ? 1 : 0,             call.scale < 0.0 ? 0x80008000u : 0u,
          scale,                        size,                           size * kLog2E,
          mask};
}

inline int grid_of(const Arguments& call, std::int64_t blocks_of_a_head) {
  const std::int64_t blocks = blocks_of_a_head * call.batch * call.heads;
  require(blocks < (std::int64_t{1} << 31), "attention: takes up to 2^31 tiles of queries and heads");
  return static_cast<int>(blocks);
}

// Calls body(std::integral_constant<int, Dim>) with the least Dim of a list that covers the head dim.
template <int Dim, int... Larger, class Body>
void dim_switch(std::int64_t dim, const Body& body) {
  if (dim <= Dim) return body(std::integral_constant<int, Dim>{});
  if constexpr (sizeof...(Larger) > 0) {
    dim_switch<Larger...>(dim, body);
  } else {
    require(false, "attention: no kernel is made for head dim " + std::to_string(dim));
  }
}

}  // namespace fastldm::cuda::attention
