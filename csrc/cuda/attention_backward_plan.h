// The kernels of the backward of attention, in their order and shape.
#pragma once

#include "cuda/attention_backward.cuh"
#include "cuda/attention_problem.h"
#include "cuda/attention_statistics.cuh"

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

// Parts of the queries: while blocks of keys are fewer than two a multiprocessor, of 128 queries or more.
inline int backward_chunks(const Arguments& call, const Device& device) {
  int chunks = 1;
  backward_dim_switch(call.dim, [&](auto dim) {
    const int keys = BackwardKeys<bfloat16, dim, Part::both>::keys;
    const std::int64_t blocks = (call.keys + keys - 1) / keys * call.batch * call.heads;
    const std::int64_t wanted = 2 * device.multiprocessors / blocks, most = call.queries / 128;
    const std::int64_t found = wanted < most ? wanted : most;
    chunks = found < 1 ? 1 : static_cast<int>(found);
  });
  return chunks;
}

// Floats of working memory.
inline std::int64_t backward_workspace(const Arguments& call, const Device& device) {
  const std::int64_t heads = call.batch * call.heads, chunks = backward_chunks(call, device);
  // The sums are read by vectors of 4.
  const std::int64_t statistics = (3 * heads * call.queries + 3) / 4 * 4;
  return statistics + (chunks > 1 ? 2 * chunks * heads * call.keys * call.dim : 0);
}

template <class Kernel, class T>
typename Kernel::Params backward_params(const BackwardArguments& all) {
  const Arguments& call = all.call;
  typename Kernel::Params params = {};
  params.problem = problem_of(call);
  params.scale = static_cast<float>(call.scale);
  params.q = heads_of<const T>(call, all.q, call.queries);
  params.k = heads_of<const T>(call, all.k, call.keys);
  params.v = heads_of<const T>(call, all.v, call.keys);
  params.grad = heads_of<const T>(call, all.grad, call.queries);
  params.statistics.all = call.batch * call.heads * call.queries;
  params.statistics.values = {all.workspace, 3 * params.statistics.all};
  return params;
}

template <class T, int Dim, Part Wanted>
void backward_keys(const BackwardArguments& all, const Context& context) {
  using Kernel = BackwardKeys<T, Dim, Wanted>;
  const Arguments& call = all.call;
  auto params = backward_params<Kernel, T>(all);
  params.dk = heads_of<T>(call, all.dk, call.keys);
  params.dv = heads_of<T>(call, all.dv, call.keys);
  params.tiles = ceil_div(params.problem.keys, Kernel::keys);
  params.chunks = backward_chunks(call, context.device);
  if (params.chunks > 1) {
    const std::int64_t statistics = (3 * params.statistics.all + 3) / 4 * 4;
    params.partial = {all.workspace + statistics, 2 * params.chunks * call.batch * call.heads * call.keys * call.dim};
  }
  Shape shape;
  shape.grid_x = grid_of(call, std::int64_t{params.tiles} * params.chunks);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
  if (params.chunks > 1 && Wanted != Part::key) {
    const std::int64_t size = call.batch * call.heads * call.keys * call.dim;
    using Reduce = BackwardReduce<T>;
    shape = {};
    shape.grid_x = static_cast<int>((size / 8 + Reduce::threads - 1) / Reduce::threads);
    shape.grid_y = 2;
    launch<Reduce>(shape, {params.problem, params.partial, params.dk, params.dv, size, params.chunks}, context);
  }
}

template <class T, int Dim>
void backward_queries(const BackwardArguments& all, const Context& context) {
  using Kernel = BackwardQueries<T, Dim>;
  auto params = backward_params<Kernel, T>(all);
  params.dq = heads_of<T>(all.call, all.dq, all.call.queries);
  params.tiles = ceil_div(params.problem.queries, Kernel::rows);
  Shape shape;
  shape.grid_x = grid_of(all.call, params.tiles);
  shape.shared_bytes = Kernel::layout().bytes;
  launch<Kernel>(shape, params, context);
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
