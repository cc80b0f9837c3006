// The self-test kernels as PyTorch operations fastldm_cuda::selftest_*: on a machine with a GPU they answer whether
// the primitives mean there what they mean under the shim.

#include "cuda/common/torch.h"
#include "cuda/selftest_plan.h"

namespace fastldm::cuda {
namespace {

int to_int(std::int64_t value) { return static_cast<int>(value); }

template <class T>
void matmul(const Tensor& a, const Tensor& b, const Tensor& c, bool transposed, ScalarType type) {
  const int m = to_int(c.size(0)), n = to_int(c.size(1)), k = to_int(a.size(1));
  const T* left = contiguous<T>(a, std::int64_t{m} * k, type);
  const T* right = contiguous<T>(b, std::int64_t{n} * k, type);
  float* product = contiguous<float>(c, c.numel(), ScalarType::Float);
  const Launching launching(a);
  if constexpr (sizeof(T) == 4) {
    STD_TORCH_CHECK(!transposed, "only 16-bit matrices are transposed on the way");
    selftest_matmul<T, false>(left, right, product, m, n, k, launching);
  } else if (transposed) {
    selftest_matmul<T, true>(left, right, product, m, n, k, launching);
  } else {
    selftest_matmul<T, false>(left, right, product, m, n, k, launching);
  }
}

void matmul_of_any_type(Tensor a, Tensor b, bool transposed, Tensor c) {
  switch (dtype_of(a)) {
    case DType::float32:
      return matmul<float>(a, b, c, transposed, ScalarType::Float);
    case DType::bfloat16:
      return matmul<bfloat16>(a, b, c, transposed, ScalarType::BFloat16);
    case DType::float16:
      return matmul<float16>(a, b, c, transposed, ScalarType::Half);
  }
}

void cluster_sum(Tensor x, std::int64_t cluster, Tensor sums) {
  selftest_cluster_sum(contiguous<float>(x, x.numel(), ScalarType::Float),
                       contiguous<float>(sums, x.size(0), ScalarType::Float), to_int(x.size(0)), to_int(x.size(1)),
                       to_int(cluster), Launching(x));
}

void histogram(Tensor values, Tensor counts, Tensor least, Tensor first) {
  const std::int64_t blocks = (values.numel() + SelftestHistogram::threads - 1) / SelftestHistogram::threads;
  selftest_histogram(contiguous<std::int32_t>(values, values.numel(), ScalarType::Int),
                     contiguous<std::int32_t>(counts, 16, ScalarType::Int),
                     contiguous<std::int32_t>(least, blocks, ScalarType::Int),
                     contiguous<std::int64_t>(first, 1, ScalarType::Long), to_int(values.numel()), Launching(values));
}

void warp(Tensor x, Tensor out) {
  selftest_warp(contiguous<float>(x, kWarp, ScalarType::Float), contiguous<float>(out, 10 * kWarp, ScalarType::Float),
                Launching(x));
}

void copy(Tensor x, Tensor y) {
  STD_TORCH_CHECK(x.numel() % 128 == 0, "selftest_copy takes a multiple of 128 elements");
  selftest_copy(contiguous<float>(x, x.numel(), ScalarType::Float), contiguous<float>(y, x.numel(), ScalarType::Float),
                to_int(x.numel()), Launching(x));
}

void math(Tensor x, Tensor out) {
  selftest_math(contiguous<float>(x, x.numel(), ScalarType::Float),
                contiguous<float>(out, 9 * x.numel(), ScalarType::Float), to_int(x.numel()), Launching(x));
}

}  // namespace
}  // namespace fastldm::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastldm_cuda, library) {
  library.def("selftest_matmul(Tensor a, Tensor b, bool transposed, Tensor(a!) c) -> ()");
  library.def("selftest_cluster_sum(Tensor x, int cluster, Tensor(a!) sums) -> ()");
  library.def("selftest_histogram(Tensor values, Tensor(a!) counts, Tensor(b!) least, Tensor(c!) first) -> ()");
  library.def("selftest_warp(Tensor x, Tensor(a!) out) -> ()");
  library.def("selftest_copy(Tensor x, Tensor(a!) y) -> ()");
  library.def("selftest_math(Tensor x, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastldm_cuda, CompositeExplicitAutograd, library) {
  library.impl("selftest_matmul", TORCH_BOX(&fastldm::cuda::matmul_of_any_type));
  library.impl("selftest_cluster_sum", TORCH_BOX(&fastldm::cuda::cluster_sum));
  library.impl("selftest_histogram", TORCH_BOX(&fastldm::cuda::histogram));
  library.impl("selftest_warp", TORCH_BOX(&fastldm::cuda::warp));
  library.impl("selftest_copy", TORCH_BOX(&fastldm::cuda::copy));
  library.impl("selftest_math", TORCH_BOX(&fastldm::cuda::math));
}
