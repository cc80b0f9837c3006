// The launches of the forward of group norm, on a GPU and under the shim alike.
#pragma once

#include "cuda/group_norm_forward.cuh"
#include "cuda/group_norm_plan.h"

namespace fastldm::cuda {

struct GroupNormForwardCall {
  GroupNormProblem problem;
  const void* x;
  void* y;
  float *mean, *rstd;
  GroupNormArguments given;
  float eps;
  bool silu;
};

template <class T>
GroupNormChoice choose_group_norm_forward(const GroupNormProblem& problem, const Context& context) {
  return choose_group_norm<GroupNormForward, T>(problem, context, 1, 2);
}

// `memory(count)` gives that many floats, needed until the launches have run.
template <class T, class Memory>
void group_norm_forward(const GroupNormForwardCall& call, const GroupNormChoice& choice, Memory&& memory,
                        const Context& context) {
  const GroupNormProblem& problem = call.problem;
  check_group_norm_choice(problem, choice);
  const GroupNormSizes sizes = group_norm_sizes(problem, choice);
  const std::int64_t stats = std::int64_t{problem.batch} * problem.num_groups;
  const int slabs = problem.batch * sizes.blocks;
  GroupNormForwardParams<T> params{sizes,
                                   {static_cast<const T*>(call.x), problem.numel()},
                                   {static_cast<T*>(call.y), problem.numel()},
                                   {call.mean, stats},
                                   {call.rstd, stats},
                                   {},
                                   group_norm_parameters(call.given, problem),
                                   call.eps,
                                   call.silu,
                                   0,
                                   choice.chunks,
                                   choice.tile};
  Shape shape;
  if (choice.cluster > 0) {
    shape.grid_x = slabs * choice.cluster;
    shape.cluster = choice.cluster;
    shape.shared_bytes = group_norm_shared_bytes(problem, choice, choice.cluster > 1 ? 512 : 256, 1, 2);
    group_norm_variant(problem, choice.wide, [&](auto last, auto wide) {
      if constexpr (wide.value) {
        if (choice.cluster > 1) return launch<GroupNormForward<T, last.value, true, true>>(shape, params, context);
      }
      launch<GroupNormForward<T, last.value, wide.value, false>>(shape, params, context);
    });
    return;
  }
  const std::int64_t floats = std::int64_t{4} * choice.range * choice.chunks * choice.groups;
  params.partial = {memory(floats), floats};
  GroupNormChoice nothing_kept = choice;
  nothing_kept.tile = 0;
  const int keeping = group_norm_shared_bytes(problem, choice, 256, 1, 2);
  const int not_keeping = group_norm_shared_bytes(problem, nothing_kept, 256, 1, 2);
  for (int first = 0; first < slabs; first += choice.range) {
    const int count = slabs - first < choice.range ? slabs - first : choice.range;
    params.first_slab = first;
    shape.grid_x = count * choice.chunks;
    group_norm_variant(problem, choice.wide, [&](auto last, auto wide) {
      shape.shared_bytes = keeping;
      params.tile = choice.tile;
      launch<GroupNormStatistics<T, last.value, wide.value>>(shape, params, context);
      shape.shared_bytes = not_keeping;
      params.tile = 0;
      launch<GroupNormNormalize<T, last.value, wide.value>>(shape, params, context);
    });
  }
}

}  // namespace fastldm::cuda
