#include "cuda/shim/machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/shim/fiber.h"
#include "cuda/shim/stamp.h"

namespace fastldm::shim {

Here* current_here = nullptr;

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
// Of a block's shared memory; every block of a cluster has its own at a fixed distance.
constexpr std::ptrdiff_t kArenaBytes = 256 << 10;
constexpr int kMaxCluster = 8;
constexpr int kGranule = 2;

struct Copy {
  char* to;
  const char* from;
  int bytes, valid, group;
};

struct Thread {
  Here here;
  Fiber fiber;
  Agent agent;
  int block, lane;
  int cluster_syncs;
  bool done;
  const char* waiting;
  std::vector<Copy> copies;
  int committed;
};

struct Warp {
  const char* what = nullptr;
  int arrived = 0;
  void* arguments[kWarp];
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
  std::vector<int> lanes;            // that have come, of each warp
  std::vector<std::uint32_t> known;  // what those that have come have seen of each warp
};

struct Block {
  std::vector<std::pair<const void*, int>> statics;
  int used = 0, done = 0;
};

char* map_memory(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("the shim has run out of memory");
  return static_cast<char*>(memory);
}

// Stacks with an unreadable page below each, which a kernel that needs more runs into.
char* stack_of(std::size_t index) {
  static std::vector<char*> stacks;
  while (stacks.size() <= index) {
    char* memory = map_memory(kStackBytes);
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(memory);
  }
  return stacks[index];
}

class Machine {
 public:
  Launch launch;
  void (*kernel)(const void*);
  const void* params;
  Thread* current = nullptr;

  void run_all() {
    const int along = launch.grid[0] / launch.cluster;
    std::vector<std::int64_t> order(static_cast<std::int64_t>(along) * launch.grid[1] * launch.grid[2]);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
    for (const std::int64_t cluster : order) {
      run_cluster(static_cast<int>(cluster % along), static_cast<int>(cluster / along % launch.grid[1]),
                  static_cast<int>(cluster / along / launch.grid[1]));
    }
  }

  [[noreturn]] void fail(std::string message) {
    if (current == nullptr) throw std::runtime_error(message);
    if (std::getenv("FASTLDM_SHIM_TRAP") != nullptr) std::raise(SIGTRAP);
    error_ = std::move(message) + " (thread " + name(current->agent.index) + ")";
    switch_fiber(current->fiber, main_);
    std::abort();
  }

  std::string name(int index) const {
    const Here& here = threads_[index].here;
    return std::to_string(here.thread) + " of block " + std::to_string(here.block[0]) + "," +
           std::to_string(here.block[1]) + "," + std::to_string(here.block[2]);
  }

  // The running thread waits until `wake`.
  void wait(const char* what) {
    current->waiting = what;
    next();
  }

  void wake(Thread* thread) {
    thread->waiting = nullptr;
    runnable_.push_back(thread);
  }

  Thread& lane(const Thread& thread, int lane) { return threads_[thread.agent.index - thread.lane + lane]; }
  Warp& warp(const Thread& thread) { return warps_[thread.agent.warp]; }
  Block& block(int index) { return blocks_[index]; }
  Barrier& barrier(int index) { return barriers_[index]; }
  int threads() const { return static_cast<int>(threads_.size()); }
  Shadow& shadow() { return shadow_; }

  void arrive(Barrier& barrier, int threads, bool waits, const char* what) {
    if (threads <= 0 || threads % kWarp != 0) fail("a barrier for " + std::to_string(threads) + " threads");
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads) {
      fail("threads come to one barrier with different numbers, " + std::to_string(barrier.expected) + " and " +
           std::to_string(threads));
    }
    Agent& agent = current->agent;
    ++barrier.lanes[agent.warp];
    shadow_.release(agent, barrier.known);
    if (waits) barrier.waiting.push_back(current);
    if (++barrier.arrived < barrier.expected) {
      if (waits) wait(what);
      return;
    }
    for (int& lanes : barrier.lanes) {
      if (lanes % kWarp != 0) fail("a barrier is complete, but not of whole warps");
      lanes = 0;
    }
    for (Thread* thread : barrier.waiting) {
      shadow_.acquire(thread->agent, barrier.known);
      if (thread != current) wake(thread);
    }
    barrier.arrived = 0;
    barrier.waiting.clear();
    std::fill(barrier.known.begin(), barrier.known.end(), 0);
  }

  // Which block's shared memory an address is in.
  int owner(const char* at) const { return static_cast<int>((at - arena_) / kArenaBytes); }
  char* arena(int block) { return arena_ + block * kArenaBytes; }
  std::size_t granule(const char* at) const { return (at - arena_) / kGranule; }

  // Makes `bytes` more of a block's shared memory NaN that nobody has touched; their offset.
  int grow(int index, int bytes) {
    Block& block = blocks_[index];
    const int offset = (block.used + 15) / 16 * 16;
    if (offset + bytes > launch.shared_limit) {
      fail("more shared memory than a block may have, " + std::to_string(launch.shared_limit) + " bytes");
    }
    block.used = offset + bytes;
    std::memset(arena(index) + offset, 0xff, bytes);
    shadow_.forget(granule(arena(index) + offset), (bytes + kGranule - 1) / kGranule);
    return offset;
  }

  void seed(std::uint64_t value) { random_ = value * 2 + 1; }

 private:
  std::size_t draw(std::size_t below) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return (random_ >> 11) % below;
  }

  void next() {
    if (runnable_.empty()) {
      if (alive_ > 0) fail(stuck());
      switch_fiber(current->fiber, main_);
      std::abort();
    }
    const std::size_t chosen = draw(runnable_.size());
    Thread* to = runnable_[chosen];
    runnable_[chosen] = runnable_.back();
    runnable_.pop_back();
    Thread* from = current;
    current = to;
    current_here = &to->here;
    switch_fiber(from->fiber, to->fiber);
  }

  std::string stuck() const {
    std::map<std::string, int> counts;
    for (const Thread& thread : threads_) ++counts[thread.done ? "have ended" : thread.waiting];
    std::string text = "threads wait for ever:";
    for (const auto& [what, count] : counts) {
      text += " " + std::to_string(count) + (what == "have ended" ? " " : " at ") + what + ";";
    }
    text.pop_back();
    return text;
  }

  static void live();

  void run_cluster(int x, int y, int z) {
    if (arena_ == nullptr) {
      arena_ = map_memory(kMaxCluster * kArenaBytes);
      shadow_.resize(kMaxCluster * kArenaBytes / kGranule);
    }
    const int count = launch.threads * launch.cluster;
    const int warps = count / kWarp;
    threads_.assign(count, Thread{});
    warps_.assign(warps, Warp{});
    blocks_.assign(launch.cluster, Block{});
    barriers_.assign(16 * launch.cluster + 1, Barrier{});
    for (Barrier& barrier : barriers_) {
      barrier.lanes.assign(warps, 0);
      barrier.known.assign(warps, 0);
    }
    shadow_.begin(warps);
    for (int block = 0; block < launch.cluster; ++block) grow(block, launch.shared_bytes);
    runnable_.clear();
    for (int i = 0; i < count; ++i) {
      Thread& thread = threads_[i];
      const int rank = i / launch.threads;
      thread.here = {i % launch.threads,
                     launch.threads,
                     {x * launch.cluster + rank, y, z},
                     {launch.grid[0], launch.grid[1], launch.grid[2]},
                     rank,
                     launch.cluster};
      thread.agent = {i, i / kWarp, 0, 0};
      thread.block = rank;
      thread.lane = i % kWarp;
      start_fiber(thread.fiber, stack_of(i), kStackBytes, &Machine::live);
      runnable_.push_back(&thread);
    }
    alive_ = count;
    error_.clear();
    current = runnable_.back();
    runnable_.pop_back();
    current_here = &current->here;
    switch_fiber(main_, current->fiber);
    current = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  Fiber main_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  std::vector<Barrier> barriers_;
  std::vector<Thread*> runnable_;
  Shadow shadow_;
  char* arena_ = nullptr;
  int alive_ = 0;
  std::string error_;
  std::uint64_t random_ = 1;
};

Machine machine;

void Machine::live() {
  machine.kernel(machine.params);
  machine.current->done = true;
  ++machine.blocks_[machine.current->block].done;
  --machine.alive_;
  machine.next();
  std::abort();
}

std::string place(const char* at) {
  const int owner = machine.owner(at);
  return "byte " + std::to_string(at - machine.arena(owner)) + " of the shared memory of block " +
         std::to_string(owner) + " of the cluster";
}

void check_peer(const char* at) {
  const int owner = machine.owner(at);
  const Thread& thread = *machine.current;
  if (owner == thread.block) return;
  if (thread.cluster_syncs == 0) machine.fail("a peer is accessed before the first cluster_sync: it may not have begun");
  if (machine.block(owner).done > 0) machine.fail("a peer is accessed that may have ended: a cluster_sync is missing");
}

void refuse(const char* what, const char* at, Stamp other) {
  machine.fail(std::string(what) + " " + place(at) + ", which thread " + machine.name(stamp_thread(other)) +
               " touched with no barrier in between");
}

void refuse_pending(const char* at) {
  machine.fail("touches " + place(at) + " while an asynchronous copy writes there: a wait_group is missing");
}

}  // namespace

void run(const Launch& launch, void (*kernel)(const void* params), const void* params) {
  machine.launch = launch;
  machine.kernel = kernel;
  machine.params = params;
  machine.run_all();
}

void set_seed(std::uint64_t seed) { machine.seed(seed); }

std::string& last_error() {
  static std::string message;
  return message;
}

void fail_bounds(const char* space, const char* at, int bytes, int align, const char* begin, const char* end) {
  const std::string access = std::string(space) + " memory: " + std::to_string(bytes) + " bytes at " +
                             std::to_string(at - begin) + " of a view of " + std::to_string(end - begin);
  const bool outside = at < begin || at + bytes > end;
  machine.fail(access + (outside ? ", outside it" : ", not aligned to " + std::to_string(align)));
}

void shared_read(const char* at, int bytes) {
  check_peer(at);
  Shadow& shadow = machine.shadow();
  const Agent& agent = machine.current->agent;
  const std::size_t first = machine.granule(at);
  for (int i = 0; i < bytes / kGranule; ++i) {
    const Stamp written = shadow.writes[first + i];
    if (written & kPending) refuse_pending(at + i * kGranule);
    if (shadow.unordered(written, agent)) refuse("reads", at + i * kGranule, written);
    shadow.note_read(first + i, agent);
  }
}

void shared_write(const char* at, int bytes, bool atomic) {
  check_peer(at);
  Shadow& shadow = machine.shadow();
  const Agent& agent = machine.current->agent;
  const std::size_t first = machine.granule(at);
  for (int i = 0; i < bytes / kGranule; ++i) {
    const std::size_t granule = first + i;
    const Stamp written = shadow.writes[granule];
    if (written & kPending) refuse_pending(at + i * kGranule);
    if (!(atomic && (written & kAtomic)) && shadow.unordered(written, agent)) {
      refuse("writes", at + i * kGranule, written);
    }
    for (const Stamp read : shadow.reads[granule]) {
      if (shadow.unordered(read, agent)) refuse("writes", at + i * kGranule, read);
    }
    shadow.note_write(granule, agent, atomic ? kAtomic : 0);
  }
}

char* dynamic_shared(int offset, int bytes) {
  if (offset < 0 || offset + bytes > machine.launch.shared_bytes) {
    machine.fail("dynamic shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                 ", but the launch asked for " + std::to_string(machine.launch.shared_bytes));
  }
  return machine.arena(machine.current->block) + offset;
}

char* static_shared(const void* key, int bytes) {
  const int index = machine.current->block;
  auto& statics = machine.block(index).statics;
  for (const auto& [known, offset] : statics) {
    if (known == key) return machine.arena(index) + offset;
  }
  statics.emplace_back(key, machine.grow(index, bytes));
  return machine.arena(index) + statics.back().second;
}

namespace {

// The last lane to come runs `finish` on what all have brought.
template <class Finish>
void meet(const char* what, void* argument, const Finish& finish) {
  Thread& thread = *machine.current;
  Warp& warp = machine.warp(thread);
  if (warp.arrived == 0) warp.what = what;
  if (warp.what != what) {
    machine.fail(std::string("lanes of a warp meet in different operations, ") + warp.what + " and " + what);
  }
  warp.arguments[thread.lane] = argument;
  if (++warp.arrived < kWarp) {
    machine.wait(what);
    return;
  }
  warp.arrived = 0;
  finish(warp.arguments);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lane != thread.lane) machine.wake(&machine.lane(thread, lane));
  }
}

}  // namespace

void warp_sync() {
  meet("warp_sync", nullptr, [](void* const*) {
    for (int lane = 0; lane < kWarp; ++lane) machine.shadow().sync_warp(machine.lane(*machine.current, lane).agent);
  });
}

std::uint32_t shuffle(std::uint32_t word, int source) {
  struct Argument {
    std::uint32_t word, result;
    int source;
  } mine{word, 0, source};
  if (source < 0 || source >= kWarp) machine.fail("a shuffle from lane " + std::to_string(source));
  meet("shuffle", &mine, [](void* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      auto& argument = *static_cast<Argument*>(lanes[lane]);
      argument.result = static_cast<Argument*>(lanes[argument.source])->word;
    }
  });
  return mine.result;
}

std::uint32_t ballot(bool yes) {
  std::uint32_t mine = yes;
  meet("ballot", &mine, [](void* const* lanes) {
    std::uint32_t all = 0;
    for (int lane = 0; lane < kWarp; ++lane) all |= *static_cast<std::uint32_t*>(lanes[lane]) << lane;
    for (int lane = 0; lane < kWarp; ++lane) *static_cast<std::uint32_t*>(lanes[lane]) = all;
  });
  return mine;
}

void barrier(int id, int threads, bool wait) {
  Thread& thread = *machine.current;
  machine.arrive(machine.barrier(16 * thread.block + id), threads, wait, id == 0 ? "block_sync" : "named_sync");
}

void cluster_barrier() {
  machine.arrive(machine.barrier(16 * machine.launch.cluster), machine.threads(), true, "cluster_sync");
  ++machine.current->cluster_syncs;
}

std::ptrdiff_t peer_distance(int rank) {
  if (rank < 0 || rank >= machine.launch.cluster) {
    machine.fail("a peer of rank " + std::to_string(rank) + " in a cluster of " +
                 std::to_string(machine.launch.cluster));
  }
  return (rank - machine.current->block) * kArenaBytes;
}

namespace {

void check_own(const char* at, const char* what) {
  if (machine.owner(at) != machine.current->block) machine.fail(std::string(what) + " in a peer's shared memory");
}

}  // namespace

void copy_async(char* to, const char* from, int bytes, int valid) {
  if (valid < 0 || valid > bytes) machine.fail("copy_async of " + std::to_string(valid) + " bytes");
  check_own(to, "copy_async");
  shared_write(to, bytes, false);
  std::memset(to, 0xff, bytes);
  Thread& thread = *machine.current;
  machine.shadow().set_pending(machine.granule(to), bytes / kGranule);
  thread.copies.push_back({to, from, bytes, valid, thread.committed});
}

void commit_group() { ++machine.current->committed; }

void wait_group(int pending) {
  Thread& thread = *machine.current;
  const int finished = thread.committed - pending;
  auto late = thread.copies.begin();
  for (; late != thread.copies.end() && late->group < finished; ++late) {
    std::memcpy(late->to, late->from, late->valid);
    std::memset(late->to + late->valid, 0, late->bytes - late->valid);
    const std::size_t first = machine.granule(late->to);
    for (int i = 0; i < late->bytes / kGranule; ++i) machine.shadow().note_write(first + i, thread.agent, 0);
  }
  thread.copies.erase(thread.copies.begin(), late);
}

void load_matrices(std::uint32_t* registers, int count, bool transposed, const char* row) {
  struct Argument {
    std::uint32_t* registers;
    const char* row;
    int count;
    bool transposed;
  } mine{registers, row, count, transposed};
  if (row != nullptr) {
    check_own(row, "load_matrices");
    shared_read(row, 16);
    // Other lanes get what this one addresses: that it wrote there itself is not enough.
    const std::size_t first = machine.granule(row);
    for (int i = 0; i < 16 / kGranule; ++i) {
      const Stamp written = machine.shadow().writes[first + i];
      if (machine.shadow().unordered_in_warp(written, machine.current->agent)) refuse("loads", row, written);
    }
  }
  meet("load_matrices", &mine, [](void* const* lanes) {
    const auto& any = *static_cast<Argument*>(lanes[0]);
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto& argument = *static_cast<Argument*>(lanes[lane]);
      if (argument.count != any.count || argument.transposed != any.transposed) {
        machine.fail("lanes of a warp load different numbers of matrices");
      }
      for (int matrix = 0; matrix < argument.count; ++matrix) {
        std::uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int across = 2 * (lane % 4) + i, down = lane / 4;
          const int source = 8 * matrix + (argument.transposed ? across : down);
          const int column = argument.transposed ? down : across;
          std::memcpy(&pair[i], static_cast<Argument*>(lanes[source])->row + 2 * column, 2);
        }
        argument.registers[matrix] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
      }
    }
  });
}

namespace {

struct MmaArgument {
  Mma kind;
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

float element(Mma kind, const std::uint32_t* registers, int i) {
  if (kind == Mma::tf32_8) {
    const std::uint32_t bits = registers[i] & ~0x1fffu;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  const auto bits = static_cast<std::uint16_t>(registers[i / 2] >> (16 * (i % 2)));
  if (kind == Mma::half_16 || kind == Mma::half_8) return half_to_float(bits);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// The layouts of cuda/common/mma.h.
void multiply(void* const* lanes) {
  const Mma kind = static_cast<MmaArgument*>(lanes[0])->kind;
  const bool tf32 = kind == Mma::tf32_8;
  const int depth = kind == Mma::half_16 || kind == Mma::bfloat_16 ? 16 : 8;
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& argument = *static_cast<MmaArgument*>(lanes[lane]);
    if (argument.kind != kind) machine.fail("lanes of a warp multiply in different types or sizes");
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < depth / 2; ++i) {
      const int row = g + 8 * (tf32 ? i % 2 : i / 2 % 2);
      const int column = tf32 ? t + 4 * (i / 2) : 2 * t + i % 2 + 8 * (i / 4);
      a[row][column] = element(kind, argument.a, i);
    }
    for (int i = 0; i < depth / 4; ++i) {
      const int row = tf32 ? t + 4 * i : 2 * t + i % 2 + 8 * (i / 2);
      b[row][g] = element(kind, argument.b, i);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = argument.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& argument = *static_cast<MmaArgument*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) argument.d[i] = d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

}  // namespace

void mma(Mma kind, float* d, const std::uint32_t* a, const std::uint32_t* b) {
  MmaArgument mine{kind, d, a, b};
  meet("mma", &mine, multiply);
}

}  // namespace fastldm::shim

extern "C" {
const char* shim_last_error() { return fastldm::shim::last_error().c_str(); }
void shim_set_seed(std::uint64_t seed) { fastldm::shim::set_seed(seed); }
}
