// The launches of group_norm_forward_plan.h for ctypes.
#include "cuda/group_norm_forward_plan.h"

#include "group_norm.h"

using namespace fastldm;
using namespace fastldm::cuda;

extern "C" void choose_forward(const std::int64_t* problem, std::int64_t* choice, int capability) {
  shim::guarded([&] {
    const GroupNormProblem of = problem_of(problem);
    of_type(of.dtype, [&](auto zero) {
      write_choice(choose_group_norm_forward<decltype(zero)>(of, gpu(capability)), choice);
    });
  });
}

// How many elements of a group each of `parts` parts of a slab has, and how many all have when they are merged.
extern "C" void count(const std::int64_t* problem, const std::int64_t* choice, int parts, std::int64_t* counts,
                      std::int64_t* merged) {
  shim::guarded([&] {
    const GroupNormProblem of = problem_of(problem);
    const GroupNormChoice way = choice_of(choice);
    check_group_norm_choice(of, way);
    const GroupNormSizes sizes = group_norm_sizes(of, way);
    group_norm_variant(of, way.wide, [&](auto last, auto wide) {
      const GroupNormTile<float, last.value, wide.value, 256> tile(sizes, 0);
      GroupNormMoments all{0.0f, 0.0f, 0.0f, 0};
      for (int part = 0; part < parts; ++part) {
        const auto elements = tile.elements(group_norm_part(tile.units(), part, parts));
        counts[part] = elements;
        all = GroupNormMerge()(all, {0.0f, 0.0f, 0.0f, elements});
      }
      *merged = all.count;
    });
  });
}

// The choice with another answer to how many clusters the device holds.
extern "C" void choose_with(const std::int64_t* problem, std::int64_t* choice, int capability, int most_blocks) {
  shim::guarded([&] {
    const auto clusters = [&](const GroupNormChoice& of, int) { return of.cluster <= most_blocks ? 16 : 0; };
    write_choice(choose_group_norm(problem_of(problem), gpu(capability).device, 1, 2, clusters), choice);
  });
}

extern "C" void forward(const void* x, void* y, float* mean, float* rstd, const std::int64_t* given,
                        const std::int64_t* problem, const std::int64_t* choice, double eps, bool silu,
                        int capability) {
  shim::guarded([&] {
    const GroupNormForwardCall call{problem_of(problem), x,    y, mean, rstd, arguments_of(given),
                                    static_cast<float>(eps), silu};
    of_type(call.problem.dtype, [&](auto zero) {
      group_norm_forward<decltype(zero)>(call, choice_of(choice), Memory(), gpu(capability));
    });
  });
}
