// What the 32 lanes of a warp do together. All lanes must come: there are no masks, and where lanes have parted,
// none of these may be called. None but warp_sync orders memory.
#pragma once

#include <cstring>

#include "cuda/common/index.h"

namespace fastldm::cuda {

// Waits for the warp; what a lane wrote before is seen by the others after.
FASTLDM_DEVICE void warp_sync() {
#ifdef FASTLDM_HOST_SHIM
  shim::warp_sync();
#else
  __syncwarp();
#endif
}

namespace detail {

enum class Shuffle { exchange, down, from };

template <Shuffle Kind>
FASTLDM_DEVICE std::uint32_t shuffle_word(std::uint32_t word, int argument) {
#ifdef FASTLDM_HOST_SHIM
  const int lane = lane_id();
  const int source = Kind == Shuffle::exchange ? lane ^ argument : Kind == Shuffle::down ? lane + argument : argument;
  return shim::shuffle(word, source < kWarp ? source : lane);
#else
  if constexpr (Kind == Shuffle::exchange) {
    return __shfl_xor_sync(0xffffffffu, word, argument);
  } else if constexpr (Kind == Shuffle::down) {
    return __shfl_down_sync(0xffffffffu, word, argument);
  } else {
    return __shfl_sync(0xffffffffu, word, argument);
  }
#endif
}

template <Shuffle Kind, class T>
FASTLDM_DEVICE T shuffle(const T& value, int argument) {
  static_assert(sizeof(T) % 4 == 0, "lanes exchange words of 4 bytes");
  std::uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) words[i] = shuffle_word<Kind>(words[i], argument);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

}  // namespace detail

// The value of lane `lane_id() ^ mask`. T is any plain type of whole words, a struct too.
template <class T>
FASTLDM_DEVICE T shuffle_xor(const T& value, int mask) {
  return detail::shuffle<detail::Shuffle::exchange>(value, mask);
}

// The value of lane `lane_id() + delta`; its own where there is none.
template <class T>
FASTLDM_DEVICE T shuffle_down(const T& value, int delta) {
  return detail::shuffle<detail::Shuffle::down>(value, delta);
}

// The value of lane `source`, 0 .. 31.
template <class T>
FASTLDM_DEVICE T shuffle_from(const T& value, int source) {
  return detail::shuffle<detail::Shuffle::from>(value, source);
}

// Bit i is what lane i says.
FASTLDM_DEVICE std::uint32_t ballot(bool yes) {
#ifdef FASTLDM_HOST_SHIM
  return shim::ballot(yes);
#else
  return __ballot_sync(0xffffffffu, yes);
#endif
}

FASTLDM_DEVICE bool any_lane(bool yes) { return ballot(yes) != 0; }
FASTLDM_DEVICE bool all_lanes(bool yes) { return ballot(yes) == 0xffffffffu; }

// `combine` over `Lanes` neighbours (the whole warp, or each 16, 8, 4 or 2 of it), in the order of a binary tree
// over the distance of lanes, from far to near: fixed, and for a commutative `combine` the same bits in every lane.
template <int Lanes = kWarp, class T, class Combine>
FASTLDM_DEVICE T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  return value;
}

struct Sum {
  template <class T>
  FASTLDM_DEVICE T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  FASTLDM_DEVICE T operator()(const T& a, const T& b) const {
    return a > b ? a : b;
  }
};

}  // namespace fastldm::cuda
