// A machine of fibers that gives the device primitives (cuda/common) their meaning on the CPU. Test only.
//
// Every thread of a block, or of all blocks of a cluster, is a fiber. One runs until it has to wait; which runs next
// is drawn by a seed. Lanes of a warp keep no step with each other but where they meet. Clusters run one after the
// other, in an order drawn by the seed.
//
// Stated as errors, with the thread and the place: what lies outside a view or is not aligned as promised; accesses
// to shared memory that no barrier orders, in whatever order they happened to run; bytes that an asynchronous copy has
// not brought yet; a peer that may not have started or has ended; threads that wait for ever, lanes that meet in
// different operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

#include "cuda/shim/numbers.h"

namespace fastldm::shim {

inline constexpr int kWarp = 32;

struct Here {
  int thread, threads;
  int block[3], grid[3];
  int cluster_rank, cluster_blocks;
};

// Of the fiber that runs.
extern Here* current_here;
inline const Here& here() { return *current_here; }

struct Launch {
  int grid[3];
  int threads, cluster;
  int shared_bytes, shared_limit;
};

// Runs a kernel to its end; throws std::runtime_error on what the list above names.
void run(const Launch& launch, void (*kernel)(const void* params), const void* params);

// The order of everything from here on.
void set_seed(std::uint64_t seed);

[[noreturn]] void fail_bounds(const char* space, const char* at, int bytes, int align, const char* begin,
                              const char* end);

inline void check_bounds(const char* space, const char* at, int bytes, int align, const char* begin,
                         const char* end) {
  if (at < begin || at + bytes > end || reinterpret_cast<std::uintptr_t>(at) % align != 0) {
    fail_bounds(space, at, bytes, align, begin, end);
  }
}

void shared_read(const char* at, int bytes);
void shared_write(const char* at, int bytes, bool atomic);
char* dynamic_shared(int offset, int bytes);
char* static_shared(const void* key, int bytes);

void warp_sync();
std::uint32_t shuffle(std::uint32_t word, int source);
std::uint32_t ballot(bool yes);

// Barrier 0 .. 15 of the block, for `threads` threads; without `wait` the thread only arrives.
void barrier(int id, int threads, bool wait);
void cluster_barrier();
// From an address of this block's shared memory to the same of block `rank` of the cluster.
std::ptrdiff_t peer_distance(int rank);

void copy_async(char* to, const char* from, int bytes, int valid);
void commit_group();
void wait_group(int pending);

enum class Mma { half_16, bfloat_16, half_8, bfloat_8, tf32_8 };

// Fragments as in cuda/common/mma.h; `row` is null in lanes whose row is not looked at.
void load_matrices(std::uint32_t* registers, int count, bool transposed, const char* row);
void mma(Mma kind, float* d, const std::uint32_t* a, const std::uint32_t* b);

// What the last call under `guarded` threw; empty where nothing.
std::string& last_error();

// For entry points of drivers, which C calls.
template <class Body>
void guarded(const Body& body) {
  last_error().clear();
  try {
    body();
  } catch (const std::exception& error) {
    last_error() = error.what();
  }
}

}  // namespace fastldm::shim
