// How host code starts kernels: one description of a launch, planned and checked in the same code whether a GPU or
// the shim runs it.
//
// A kernel is a type:
//
//   template <class T>
//   struct Scale {
//     static constexpr int threads = 256;         // of a block
//     static constexpr int min_blocks = 2;        // a multiprocessor shall hold: bounds the registers
//     static constexpr int min_capability = 80;   // 90 where it uses clusters
//     struct Params { Global<const T> x; Global<T> y; int count; };
//     FASTLDM_DEVICE static void run(const Params& params);
//   };
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/platform.h"

namespace fastldm::cuda {

struct Device {
  int index;
  int capability;          // as in sm_90: 90
  int multiprocessors;
  int shared_per_block;    // bytes a block may ask for
  int shared_per_multiprocessor;
};

// Where a launch goes. `stream` is a cudaStream_t.
struct Context {
  Device device;
  void* stream;
};

struct Shape {
  int grid_x = 1;
  int grid_y = 1;
  int grid_z = 1;
  int cluster = 1;       // blocks of a cluster, along x
  int shared_bytes = 0;  // of dynamic shared memory
};

// Throws std::runtime_error where the device cannot run such a launch.
template <class Kernel>
void check_launch(const Shape& shape, const Device& device) {
  static_assert(Kernel::threads % kWarp == 0 && Kernel::threads <= 1024, "blocks are of whole warps");
  require(device.capability >= Kernel::min_capability, "this CUDA kernel needs a device of capability " +
                                                           std::to_string(Kernel::min_capability) + ", not " +
                                                           std::to_string(device.capability));
  require(shape.shared_bytes <= device.shared_per_block, "this CUDA kernel was given a plan of " +
                                                             std::to_string(shape.shared_bytes) +
                                                             " bytes of shared memory; the device has " +
                                                             std::to_string(device.shared_per_block));
  require(shape.grid_x > 0 && shape.grid_y > 0 && shape.grid_y <= 65535 && shape.grid_z > 0 && shape.grid_z <= 65535,
          "a CUDA grid must be of at least one block and at most 65535 along y and z");
  const bool single = shape.cluster == 1;
  require(single || (shape.cluster > 1 && shape.cluster <= 8 && shape.grid_x % shape.cluster == 0),
          "a cluster must be of 1 to 8 blocks and divide the grid along x");
  require(single || Kernel::min_capability >= 90, "clusters need a kernel of min_capability 90");
}

#ifdef FASTLDM_HOST_SHIM

template <class Kernel>
void launch(const Shape& shape, const typename Kernel::Params& params, const Context& context) {
  check_launch<Kernel>(shape, context.device);
  shim::Launch launch{{shape.grid_x, shape.grid_y, shape.grid_z},
                      Kernel::threads,
                      shape.cluster,
                      shape.shared_bytes,
                      context.device.shared_per_block};
  shim::run(
      launch, [](const void* params) { Kernel::run(*static_cast<const typename Kernel::Params*>(params)); }, &params);
}

// Stands for the occupancy calculator by shared memory and threads alone: the shim knows no registers.
template <class Kernel>
int blocks_per_multiprocessor(int shared_bytes, const Context& context) {
  const int by_threads = 2048 / Kernel::threads;
  const int by_shared = context.device.shared_per_multiprocessor / (shared_bytes + 1024);
  return by_threads < by_shared ? by_threads : by_shared;
}

// The multiprocessors of a GPU processing cluster are 16 or a few more; a cluster stays within one.
template <class Kernel>
int resident_clusters(const Shape& shape, const Context& context) {
  const int blocks = blocks_per_multiprocessor<Kernel>(shape.shared_bytes, context);
  return context.device.multiprocessors / 16 * (16 * blocks / shape.cluster);
}

#else

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, Kernel::min_blocks)
    entry(const __grid_constant__ typename Kernel::Params params) {
  if constexpr (kArch >= Kernel::min_capability) {
    Kernel::run(params);
  } else {
    unreachable_on_this_architecture();
  }
}

inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// More than 48 KiB must be asked for. All that the device has is, whatever a launch needs: the kernel keeps one number
// for each device, and another thread's launch of less must not take back what this one is about to use.
template <class Kernel>
void allow_shared_bytes(int bytes, const Device& device) {
  cudaFuncAttributes found;
  check_cuda(cudaFuncGetAttributes(&found, entry<Kernel>));
  if (bytes > found.maxDynamicSharedSizeBytes) {
    const int all = device.shared_per_block - static_cast<int>(found.sharedSizeBytes);
    check_cuda(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, all));
  }
}

struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Configuration(const Shape& shape, int threads, void* stream) {
    config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

// Starts the kernel; does not wait for it.
template <class Kernel>
void launch(const Shape& shape, const typename Kernel::Params& params, const Context& context) {
  check_launch<Kernel>(shape, context.device);
  allow_shared_bytes<Kernel>(shape.shared_bytes, context.device);
  const Configuration configuration(shape, Kernel::threads, context.stream);
  check_cuda(cudaLaunchKernelEx(&configuration.config, entry<Kernel>, params));
}

// Blocks that one multiprocessor holds at once.
template <class Kernel>
int blocks_per_multiprocessor(int shared_bytes, const Context& context) {
  allow_shared_bytes<Kernel>(shared_bytes, context.device);
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry<Kernel>, Kernel::threads, shared_bytes));
  return blocks;
}

// Clusters of this shape that the device holds at once; 0 where it cannot run even one.
template <class Kernel>
int resident_clusters(const Shape& shape, const Context& context) {
  allow_shared_bytes<Kernel>(shape.shared_bytes, context.device);
  const Configuration configuration(shape, Kernel::threads, context.stream);
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, entry<Kernel>, &configuration.config));
  return clusters;
}

#endif

}  // namespace fastldm::cuda
