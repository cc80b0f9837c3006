// What the drivers of both directions take: numbers in arrays, as group_norm.py's callers lay them out.
#pragma once

#include <cmath>
#include <vector>

#include "cuda/group_norm_plan.h"
#include "driver.h"

namespace fastldm::cuda {

// dtype, batch, channels, num_groups, pixels, channels_last, aligned
inline GroupNormProblem problem_of(const std::int64_t* from) {
  const auto number = [&](int i) { return static_cast<int>(from[i]); };
  return {static_cast<DType>(from[0]), number(1), number(2), number(3), number(4), from[5] != 0, from[6] != 0};
}

// cluster, groups, wide, chunks, tile, range
inline GroupNormChoice choice_of(const std::int64_t* from) {
  const auto number = [&](int i) { return static_cast<int>(from[i]); };
  return {number(0), number(1), from[2] != 0, number(3), number(4), number(5)};
}

inline void write_choice(const GroupNormChoice& choice, std::int64_t* to) {
  const int numbers[] = {choice.cluster, choice.groups, choice.wide, choice.chunks, choice.tile, choice.range};
  for (int i = 0; i < 6; ++i) to[i] = numbers[i];
}

// Five times address, dtype and stride.
inline GroupNormArguments arguments_of(const std::int64_t* from) {
  const auto one = [&](int i) {
    const std::int64_t* at = from + 3 * i;
    return GroupNormArgument{reinterpret_cast<void*>(at[0]), static_cast<DType>(at[1]), at[2]};
  };
  return {one(0), one(1), one(2), one(3), one(4)};
}

// Calls body(T{}); drivers that are made of changed sources know float32 alone, to be made quickly.
template <class Body>
void of_type(DType dtype, const Body& body) {
#ifdef FASTLDM_ONLY_FLOAT
  require(dtype == DType::float32, "this driver knows float32 alone");
  body(float{});
#else
  dtype_switch(static_cast<int>(dtype), body);
#endif
}

// Working memory that begins as NaN.
class Memory {
 public:
  float* operator()(std::int64_t count) {
    floats_.assign(count, std::nanf(""));
    return floats_.data();
  }

 private:
  std::vector<float> floats_;
};

}  // namespace fastldm::cuda
