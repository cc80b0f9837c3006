// The kernels of the backward of attention, in their order and shape.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_problem.h"
#include "cuda/attention_statistics.cuh"
#include "cuda/attention_wide_backward.cuh"

namespace fastldm::cuda::attention {

struct BackwardArguments {
  Arguments call;
  HeadsArgument grad, q, k, v, out;
  const float* lse;  // (B, H, Sq)
  HeadsArgument dq, dk, dv;
  float* workspace;  // as backward_workspace says
};

template <class Body>
void backward_dim_switch(std::int64_t dim, const Body& body) {
  dim_switch<32, 40, 64, 72, 80, 96, 128, 160, 256>(dim, body);
}

// As many parts as wanted, of 128 rows or more each, and one at least.
inline int parts_of(std::int64_t rows, std::int64_t wanted) {
  const std::int64_t most = rows / 128, found = wanted < most ? wanted : most;
  return found < 1 ? 1 : static_cast<int>(found);
}

// Parts of the queries: while blocks of keys are fewer than two a multiprocessor.
inline int backward_chunks(const Arguments& call, const Device& device) {
  int chunks = 1;
  backward_dim_switch(call.dim, [&](auto dim) {
    const int keys = BackwardKeys<bfloat16, dim, Part::both>::keys;
    const std::int64_t blocks = (call.keys + keys - 1) / keys * call.batch * call.heads;
    chunks = parts_of(call.queries, 2 * device.multiprocessors / blocks);
  });
  return chunks;
}

// Parts of what the blocks of a wide head walk along: while they are fewer than the multiprocessors.
inline int wide_chunks(const Arguments& call, Side rows, const Device& device) {
  const bool of_keys = rows == Side::keys;
  const std::int64_t blocks = ((of_keys ? call.keys : call.queries) + 31) / 32 * call.batch * call.heads;
  return parts_of(of_keys ? call.queries : call.keys, device.multiprocessors / blocks);
}

// Floats of the statistics. Sums, which follow, are read by vectors of 4.
inline std::int64_t statistics_floats(const Arguments& call) {
  return (3 * call.batch * call.heads * call.queries + 3) / 4 * 4;
}

// Floats of the sums of `chunks` of `count` tensors of `rows` rows.
inline std::int64_t partial_floats(const Arguments& call, int chunks, int count, std::int64_t rows) {
  return chunks > 1 ? count * chunks * call.batch * call.heads * rows * call.dim : 0;
}

// Floats of working memory.
inline std::int64_t backward_workspace(const Arguments& call, const Device& device) {
  std::int64_t partial;
  if (call.dim == kWide) {
    // One after the other.
    const std::int64_t of_keys = partial_floats(call, wide_chunks(call, Side::keys, device), 2, call.keys);
    const std::int64_t of_queries = partial_floats(call, wide_chunks(call, Side::queries, device), 1, call.queries);
    partial = of_keys > of_queries ? of_keys : of_queries;
  } else {
    partial = partial_floats(call, backward_chunks(call, device), 2, call.keys);
  }
  return statistics_floats(call) + partial;
}

template <class Kernel>
typename Kernel::Params backward_params(const BackwardArguments& all) {
  const Arguments& call = all.call;
  typename Kernel::Params params = {};
  params.problem = problem_of(call);
  params.scale = static_cast<float>(call.scale);
  params.statistics.all = call.batch * call.heads * call.queries;
  params.statistics.values = {all.workspace, 3 * params.statistics.all};
  return params;
}

// Adds up the chunks of `count` gradients of `rows` rows.
template <class T>
void backward_reduce(const Arguments& call, const Global<float>& partial, int chunks, int count, std::int64_t rows,
                     const Heads<T>& first, const Heads<T>& second, const Context& context) {
  using Kernel = BackwardReduce<T>;
  const std::int64_t size = call.batch * call.heads * rows * call.dim;
  Shape shape;
  shape.grid_x = static_cast<int>((size / 8 + Kernel::threads - 1) / Kernel::threads);
  shape.grid_y = count;
  launch<Kernel>(shape,
                 {partial, first, second, size, static_cast<int>(call.heads), static_cast<int>(rows),
                  static_cast<int>(call.dim), chunks},
                 context);
}

// The four tensors that kernels of the narrow heads read.
template <class T, class Params>
void set_inputs(Params& params, const BackwardArguments& all) {
  params.q = heads_of<const T>(all.call, all.q, all.call.queries);
  params.k = heads_of<const T>(all.call, all.k, all.call.keys);
  params.v = heads_of<const T>(all.call, all.v, all.call.keys);
  params.grad = heads_of<const T>(all.call, all.grad, all.call.queries);
}

template <class T, int Dim, Part Wanted>
void backward_keys(const BackwardArguments& all, const Context& context) {
  using Kernel = BackwardKeys<T, Dim, Wanted>;
  const Arguments& call = all.call;
  auto params = backward_params<Kernel>(all);
  set_inputs<T>(params, all);
  params.dk = heads_of<T>(call, all.dk, call.keys);
  params.dv = heads_of<T>(call, all.dv, call.keys);
  params.tiles = ceil_div(params.problem.keys, Kernel::keys);
  params.chunks = backward_chunks(call, context.device);
  const std::int64_t floats = partial_floats(call, params.chunks, 2, call.keys);
  if (floats > 0) params.partial = {all.workspace + statistics_floats(call), floats};
  Shape shape;
  shape.grid_x = grid_of(call, std::int64_t{params.tiles} * params.chunks);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
  if (params.chunks > 1 && Wanted != Part::key) {
    backward_reduce(call, params.partial, params.chunks, 2, call.keys, params.dk, params.dv, context);
  }
}

template <class T, int Dim>
void backward_queries(const BackwardArguments& all, const Context& context) {
  using Kernel = BackwardQueries<T, Dim>;
  auto params = backward_params<Kernel>(all);
  set_inputs<T>(params, all);
  params.dq = heads_of<T>(all.call, all.dq, all.call.queries);
  params.tiles = ceil_div(params.problem.queries, Kernel::rows);
  Shape shape;
  shape.grid_x = grid_of(all.call, params.tiles);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
}

template <class T, int Stages, Side Rows>
void wide_backward(const BackwardArguments& all, const Context& context) {
  using Kernel = WideBackward<T, Stages, Rows>;
  constexpr bool of_keys = Rows == Side::keys;
  const Arguments& call = all.call;
  const auto q = heads_of<const T>(call, all.q, call.queries), grad = heads_of<const T>(call, all.grad, call.queries);
  const auto k = heads_of<const T>(call, all.k, call.keys), v = heads_of<const T>(call, all.v, call.keys);
  const std::int64_t rows = of_keys ? call.keys : call.queries;
  auto params = backward_params<Kernel>(all);
  params.rows = of_keys ? k : q, params.row_values = of_keys ? v : grad;
  params.steps = of_keys ? q : k, params.step_values = of_keys ? grad : v;
  params.out = heads_of<T>(call, of_keys ? all.dk : all.dq, rows);
  if constexpr (of_keys) params.out_values = heads_of<T>(call, all.dv, rows);
  params.tiles = ceil_div(static_cast<int>(rows), Kernel::rows);
  params.chunks = wide_chunks(call, Rows, context.device);
  const int count = of_keys ? 2 : 1;
  const std::int64_t floats = partial_floats(call, params.chunks, count, rows);
  if (floats > 0) params.partial = {all.workspace + statistics_floats(call), floats};
  Shape shape;
  shape.grid_x = grid_of(call, std::int64_t{params.tiles} * params.chunks);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
  if (params.chunks > 1) {
    backward_reduce(call, params.partial, params.chunks, count, rows, params.out, params.out_values, context);
  }
}

template <class T>
void backward_statistics(const BackwardArguments& all, bool eight, const Context& context) {
  using Kernel = BackwardStatistics<T>;
  const Arguments& call = all.call;
  const std::int64_t rows = call.batch * call.heads * call.queries;
  typename Kernel::Params params = {};
  params.problem = problem_of(call);
  params.q = heads_of<const T>(call, all.q, call.queries);
  params.k = heads_of<const T>(call, all.k, call.keys);
  params.out = heads_of<const T>(call, all.out, call.queries);
  params.grad = heads_of<const T>(call, all.grad, call.queries);
  params.lse = {all.lse, rows};
  params.values = {all.workspace, 3 * rows};
  params.all = rows;
  params.tiles = ceil_div(params.problem.queries, Kernel::rows);
  params.eight = eight;
  Shape shape;
  shape.grid_x = grid_of(call, params.tiles);
  launch<Kernel>(shape, params, context);
}

// T: float16 or bfloat16.
template <class T>
void backward(const BackwardArguments& all, const Context& context) {
  if (all.call.dim == kWide) {
    backward_statistics<T>(all, false, context);
    const bool roomy = WideBackward<T, 2, Side::keys>::layout().bytes <= context.device.shared_per_block;
    if (roomy) {
      wide_backward<T, 2, Side::keys>(all, context);
      return wide_backward<T, 2, Side::queries>(all, context);
    }
    wide_backward<T, 1, Side::keys>(all, context);
    return wide_backward<T, 1, Side::queries>(all, context);
  }
  backward_dim_switch(all.call.dim, [&](auto dim) {
    backward_statistics<T>(all, dim % 16 == 8, context);
    if constexpr (dim <= 160) {
      backward_keys<T, dim, Part::both>(all, context);
    } else {
      // Both accumulators would be more than the registers. The second launch adds up chunks.
      backward_keys<T, dim, Part::key>(all, context);
      backward_keys<T, dim, Part::value>(all, context);
    }
    backward_queries<T, dim>(all, context);
  });
}

}  // namespace fastldm::cuda::attention
