// The launches of the backward of group norm, on a GPU and under the shim alike.
#pragma once

#include "cuda/group_norm_backward.cuh"
#include "cuda/group_norm_plan.h"

namespace fastldm::cuda {

struct GroupNormBackwardCall {
  GroupNormProblem problem;
  const void *grad, *x;
  const float *mean, *rstd;
  GroupNormArguments given;
  bool silu;
  void* dx;                      // this and what is below: null where not wanted
  GroupNormArguments gradients;  // contiguous
};

template <class T>
GroupNormChoice choose_group_norm_backward(const GroupNormProblem& problem, const Context& context) {
  return choose_group_norm<GroupNormBackward, T>(problem, context, 2, 3);
}

template <class T>
void group_norm_in_two_reads(const GroupNormProblem& problem, const GroupNormChoice& choice,
                             GroupNormBackwardParams<T> params, const Context& context) {
  GroupNormChannelGradients& to = params.channels;
  const int slabs = problem.batch * to.sizes.blocks;
  GroupNormChoice no_table = choice;
  no_table.tile = 0;
  const int summing = group_norm_shared_bytes(problem, choice, 256, 0, 3);
  const int not_summing = group_norm_shared_bytes(problem, no_table, 256, 0, 3);
  for (int first = 0; first < slabs; first += choice.range) {
    const int count = slabs - first < choice.range ? slabs - first : choice.range;
    to.first_slab = first;
    Shape shape, merging;
    shape.grid_x = count * choice.chunks;
    merging.grid_x = count;
    merging.shared_bytes = GroupNormCoefficients::layout(to.sizes).bytes;
    group_norm_variant(problem, choice.wide, [&](auto last, auto wide) {
      shape.shared_bytes = summing;
      params.tile = choice.tile;
      launch<GroupNormSums<T, last.value, wide.value>>(shape, params, context);
      launch<GroupNormCoefficients>(merging, to, context);
      if (!params.dx) return;
      shape.shared_bytes = not_summing;
      params.tile = 0;
      launch<GroupNormInputGradient<T, last.value, wide.value>>(shape, params, context);
    });
  }
}

// `memory(count)` gives that many floats, needed until the launches have run.
template <class T, class Memory>
void group_norm_backward(const GroupNormBackwardCall& call, const GroupNormChoice& choice, Memory&& memory,
                         const Context& context) {
  const GroupNormProblem& problem = call.problem;
  check_group_norm_choice(problem, choice);
  const GroupNormSizes sizes = group_norm_sizes(problem, choice);
  const std::int64_t stats = std::int64_t{problem.batch} * problem.num_groups;
  const bool over_samples = call.gradients.weight.data != nullptr || call.gradients.bias.data != nullptr;
  const std::int64_t summed = over_samples ? std::int64_t{2} * problem.batch * problem.channels : 0;
  const std::int64_t partial = std::int64_t{3} * choice.range * choice.chunks * sizes.width();
  const std::int64_t coefficients = std::int64_t{4} * choice.range * choice.groups;
  const bool twice = choice.cluster == 0;
  // The coefficients first: they are read in vectors.
  const std::int64_t needed = summed + (twice ? partial + coefficients : 0);
  float* floats = needed > 0 ? memory(needed) : nullptr;
  GroupNormChannelGradients to{};
  to.sizes = sizes;
  to.mean = {call.mean, stats};
  to.rstd = {call.rstd, stats};
  to.given = group_norm_parameters(call.given, problem);
  const auto gradient = [&](const GroupNormArgument& argument, int rows) {
    return group_norm_view<GroupNormGradient>(argument, rows, problem.channels);
  };
  to.channel_bias = gradient(call.gradients.channel_bias, problem.batch);
  to.scale = gradient(call.gradients.scale, problem.batch);
  to.shift = gradient(call.gradients.shift, problem.batch);
  if (twice) {
    to.coefficients = {floats, coefficients};
    to.partial = {floats + coefficients, partial};
    to.chunks = choice.chunks;
  }
  if (over_samples) to.sums = {floats + (twice ? coefficients + partial : 0), summed};
  GroupNormBackwardParams<T> params{to,
                                    {static_cast<const T*>(call.grad), problem.numel()},
                                    {static_cast<const T*>(call.x), problem.numel()},
                                    {static_cast<T*>(call.dx), problem.numel()},
                                    call.silu,
                                    choice.tile};
  if (twice) {
    group_norm_in_two_reads(problem, choice, params, context);
  } else {
    Shape shape;
    shape.grid_x = problem.batch * sizes.blocks * choice.cluster;
    shape.cluster = choice.cluster;
    shape.shared_bytes = group_norm_shared_bytes(problem, choice, choice.cluster > 1 ? 512 : 256, 2, 3);
    group_norm_variant(problem, choice.wide, [&](auto last, auto wide) {
      if constexpr (wide.value) {
        if (choice.cluster > 1) return launch<GroupNormBackward<T, last.value, true, true>>(shape, params, context);
      }
      launch<GroupNormBackward<T, last.value, wide.value, false>>(shape, params, context);
    });
  }
  if (!over_samples) return;
  Shape shape;
  shape.grid_x = (problem.channels + kWarp - 1) / kWarp;
  launch<GroupNormParameterGradients>(
      shape,
      {to.sums, to.given.scale, gradient(call.gradients.weight, 1), gradient(call.gradients.bias, 1), problem.batch,
       problem.channels},
      context);
}

}  // namespace fastldm::cuda
