// Who touched which bytes of shared memory last, and whether a barrier orders that before what a thread does now.
//
// Each thread counts the barriers that its warp has passed together (`in_warp`: warp_sync and all wider ones) and
// those that join warps (`across`). An access carries both counts. Within a warp it is ordered before a later one if
// its thread has passed an in-warp barrier since; between warps, if the later one's warp has learnt, through barriers,
// of a count of the former's warp that is beyond the access's (vector clocks, one entry per warp, as barriers take
// whole warps).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastldm::shim {

// Thread + 1 in 16 bits, `in_warp` in 22, `across` in 22, two flags; 0: nobody.
using Stamp = std::uint64_t;
inline constexpr Stamp kAtomic = Stamp{1} << 60;
inline constexpr Stamp kPending = Stamp{1} << 61;
inline constexpr std::uint32_t kCountMask = (1u << 22) - 1;

inline int stamp_thread(Stamp stamp) { return static_cast<int>(stamp & 0xffff) - 1; }

struct Agent {
  int index, warp;
  std::uint32_t in_warp, across;

  Stamp stamp() const {
    return static_cast<Stamp>(index + 1) | static_cast<Stamp>(in_warp & kCountMask) << 16 |
           static_cast<Stamp>(across & kCountMask) << 38;
  }
};

class Shadow {
 public:
  struct Reads {
    Stamp latest, before;
    const Stamp* begin() const { return &latest; }
    const Stamp* end() const { return &before + 1; }
  };

  std::vector<Stamp> writes;
  std::vector<Reads> reads;  // the latest, and the latest of another thread

  void resize(std::size_t granules) {
    writes.resize(granules);
    reads.resize(granules);
  }

  void forget(std::size_t first, std::size_t count) {
    for (std::size_t i = first; i < first + count; ++i) {
      writes[i] = 0;
      reads[i] = {0, 0};
    }
  }

  void begin(int warps) {
    warps_ = warps;
    known_.assign(static_cast<std::size_t>(warps) * warps, 0);
  }

  bool unordered(Stamp stamp, const Agent& now) const {
    const int thread = stamp_thread(stamp);
    if (thread < 0 || thread == now.index) return false;
    if (thread / 32 == now.warp) return unordered_in_warp(stamp, now);
    const auto across = static_cast<std::uint32_t>(stamp >> 38) & kCountMask;
    return across >= known_[static_cast<std::size_t>(now.warp) * warps_ + thread / 32];
  }

  bool unordered_in_warp(Stamp stamp, const Agent& now) const {
    const int thread = stamp_thread(stamp);
    if (thread < 0 || thread / 32 != now.warp) return false;
    return (static_cast<std::uint32_t>(stamp >> 16) & kCountMask) == (now.in_warp & kCountMask);
  }

  void note_read(std::size_t granule, const Agent& agent) {
    Reads& read = reads[granule];
    if (stamp_thread(read.latest) != agent.index) read.before = read.latest;
    read.latest = agent.stamp();
  }

  void note_write(std::size_t granule, const Agent& agent, Stamp flags) {
    writes[granule] = agent.stamp() | flags;
    reads[granule] = {0, 0};
  }

  void set_pending(std::size_t first, int count) {
    for (int i = 0; i < count; ++i) writes[first + i] |= kPending;
  }

  void sync_warp(Agent& agent) { ++agent.in_warp; }

  // A thread comes to a barrier: `known` learns of its warp and of what its warp knows.
  void release(Agent& agent, std::vector<std::uint32_t>& known) {
    const std::uint32_t* mine = &known_[static_cast<std::size_t>(agent.warp) * warps_];
    if (agent.index % 32 == 0) {
      for (int warp = 0; warp < warps_; ++warp) known[warp] = known[warp] < mine[warp] ? mine[warp] : known[warp];
    }
    const std::uint32_t next = ++agent.across;
    if (known[agent.warp] < next) known[agent.warp] = next;
  }

  // A thread that has waited goes on.
  void acquire(Agent& agent, const std::vector<std::uint32_t>& known) {
    ++agent.in_warp;
    if (agent.index % 32 != 0) return;
    std::uint32_t* mine = &known_[static_cast<std::size_t>(agent.warp) * warps_];
    for (int warp = 0; warp < warps_; ++warp) mine[warp] = mine[warp] < known[warp] ? known[warp] : mine[warp];
  }

 private:
  int warps_ = 0;
  std::vector<std::uint32_t> known_;  // of warp w about warp v, at w * warps_ + v
};

}  // namespace fastldm::shim
