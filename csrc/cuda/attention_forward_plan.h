// Which forward kernel a call of attention takes, and in what shape.
#pragma once

#include "cuda/attention_forward.cuh"
#include "cuda/attention_problem.h"
#include "cuda/attention_short.cuh"
#include "cuda/attention_wide.cuh"

namespace fastldm::cuda::attention {

struct ForwardArguments {
  Arguments call;
  HeadsArgument q, k, v, out;
  float* lse;        // (B, H, Sq), or null
  float* workspace;  // as forward_workspace says, or null
};

// Few keys stay in shared memory, where layers that look at text have such head dims: 40, 64, 72, 80, 160.
inline bool is_short(const Arguments& call) {
  return call.dim <= 80 ? call.keys <= 128 : call.dim > 128 && call.dim <= 160 && call.keys <= 80;
}

// Parts of the keys of a wide head: while blocks would leave multiprocessors idle, of 512 keys or more.
inline int wide_splits(const Arguments& call, const Device& device) {
  const std::int64_t blocks = ceil_div(static_cast<int>(call.queries), 64) * call.batch * call.heads;
  const std::int64_t most = call.keys / 512 < 16 ? call.keys / 512 : 16, wanted = device.multiprocessors / blocks;
  const std::int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

// Floats of working memory.
inline std::int64_t forward_workspace(const Arguments& call, const Device& device) {
  if (call.dim != kWide) return 0;
  const std::int64_t splits = wide_splits(call, device);
  return splits == 1 ? 0 : splits * call.batch * call.heads * call.queries * (kWide + 2);
}

template <class Kernel, class T>
typename Kernel::Params forward_params(const ForwardArguments& all) {
  const Arguments& call = all.call;
  typename Kernel::Params params = {};
  params.problem = problem_of(call);
  params.q = heads_of<const T>(call, all.q, call.queries);
  params.k = heads_of<const T>(call, all.k, call.keys);
  params.v = heads_of<const T>(call, all.v, call.keys);
  params.out = heads_of<T>(call, all.out, call.queries);
  if (all.lse != nullptr) params.lse = {all.lse, call.batch * call.heads * call.queries};
  return params;
}

template <class T, int Dim>
void long_forward(const ForwardArguments& all, const Context& context) {
  using Kernel = Forward<T, Dim>;
  auto params = forward_params<Kernel, T>(all);
  require(Kernel::takes_score_masks || !masks_scores(params.problem), "attention: this tile takes masks of keys only");
  params.tiles = ceil_div(params.problem.queries, Kernel::rows);
  Shape shape;
  shape.grid_x = grid_of(all.call, params.tiles);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
}

template <class T, int Dim, int Keys>
void short_forward(const ForwardArguments& all, const Context& context) {
  using Kernel = ShortForward<T, Dim, Keys>;
  auto params = forward_params<Kernel, T>(all);
  params.tiles = ceil_div(params.problem.queries, Kernel::rows);
  Shape shape;
  shape.shared_bytes = Kernel::layout().bytes;
  // As many blocks as run at once, while each warp has a tile.
  const std::int64_t resident = std::int64_t{context.device.multiprocessors} *
                                blocks_per_multiprocessor<Kernel>(shape.shared_bytes, context);
  const std::int64_t heads = all.call.batch * all.call.heads, wanted = (resident + heads - 1) / heads;
  const int most = ceil_div(params.tiles, Kernel::warps);
  params.chunks = wanted < 1 ? 1 : wanted < most ? static_cast<int>(wanted) : most;
  shape.grid_x = grid_of(all.call, params.chunks);
  launch<Kernel>(shape, params, context);
}

template <class T, int Step>
void wide_forward(const ForwardArguments& all, const Context& context) {
  using Kernel = WideForward<T, Step>;
  const Arguments& call = all.call;
  const std::int64_t rows = call.batch * call.heads * call.queries;
  auto params = forward_params<Kernel, T>(all);
  params.tiles = ceil_div(params.problem.queries, Kernel::rows);
  params.splits = wide_splits(call, context.device);
  if (params.splits > 1) {
    require(all.workspace != nullptr, "attention: keys are split, which takes working memory");
    params.partial = {all.workspace, params.splits * rows * kWide};
    params.sums = {all.workspace + params.splits * rows * kWide, 2 * params.splits * rows};
  }
  Shape shape;
  shape.grid_x = grid_of(call, std::int64_t{params.tiles} * params.splits);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
  if (params.splits > 1) {
    shape = {};
    shape.grid_x = grid_of(call, call.queries);
    launch<WideCombine<T>>(
        shape, {params.problem, params.partial, params.sums, params.out, params.lse, params.splits}, context);
  }
}

// T: float16 or bfloat16.
template <class T>
void forward(const ForwardArguments& all, const Context& context) {
  const Arguments& call = all.call;
  if (call.dim == kWide) {
    const bool roomy = WideForward<T, 64>::layout().bytes <= context.device.shared_per_block;
    return roomy ? wide_forward<T, 64>(all, context) : wide_forward<T, 32>(all, context);
  }
  if (is_short(call)) {
    if (call.keys <= 80) {
      return dim_switch<40, 64, 80, 160>(call.dim, [&](auto dim) { short_forward<T, dim, 80>(all, context); });
    }
    return dim_switch<40, 64, 80>(call.dim, [&](auto dim) { short_forward<T, dim, 128>(all, context); });
  }
  const auto found = [&](auto dim) { long_forward<T, dim>(all, context); };
  if (call.dim <= 40 && masks_scores(problem_of(call))) return dim_switch<32, 64>(call.dim, found);
  dim_switch<32, 40, 64, 72, 80, 96, 128, 160, 256>(call.dim, found);
}

}  // namespace fastldm::cuda::attention
