// Products of small matrices on tensor cores, and the loads that fill their fragments (PTX ISA: mma.sync, ldmatrix;
// sm_80). A warp's lane l holds, with g = l / 4 and t = l % 4:
//
//   A 16 x 16, 16-bit, 4 registers of 2:  element i = 0..7 is row g + 8 * ((i / 2) % 2), column 2 t + i % 2 + 8 (i / 4)
//   A 16 x 8,  16-bit, 2 registers of 2:  element i = 0..3 is row g + 8 * (i / 2),       column 2 t + i % 2
//   A 16 x 8,  tf32,   4 registers:       element i = 0..3 is row g + 8 * (i % 2),       column t + 4 (i / 2)
//   B 16 x 8,  16-bit, 2 registers of 2:  element i = 0..3 is row 2 t + i % 2 + 8 (i / 2), column g
//   B 8 x 8,   16-bit, 1 register of 2:   element i = 0..1 is row 2 t + i,               column g
//   B 8 x 8,   tf32,   2 registers:       element i = 0..1 is row t + 4 i,               column g
//   C, D 16 x 8, float32, 4 registers:    element i = 0..3 is row g + 8 (i / 2),         column 2 t + i % 2
//
// Two C tiles side by side (16 x 16) hold, packed pair by pair, exactly an A of 16 x 16.
#pragma once

#include "cuda/common/memory.h"

namespace fastldm::cuda {

// Matrix m = 0 .. N - 1 of 8 x 8 16-bit elements: lane 8 m + r gives its row r, 16 bytes, aligned to as many (other
// lanes' `row` is not looked at). registers[m] of lane l gets row l / 4, columns 2 (l % 4) and the next; transposed,
// rows 2 (l % 4) and the next of column l / 4. A row of four 32-bit elements is moved whole: not transposed, lane l
// gets column l % 4 of row l / 4, as tf32 fragments want it.
template <int N, bool Transposed = false, class T>
FASTLDM_DEVICE void load_matrices(std::uint32_t (&registers)[N], const Shared<T>& row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  static_assert(!Transposed || sizeof(T) == 2, "only 16-bit elements can be transposed");
#ifdef FASTLDM_HOST_SHIM
  const int lane = shim::here().thread % kWarp;
  if (lane < 8 * N) Access::check("shared", row, 16, 16);
  shim::load_matrices(registers, N, Transposed, lane < 8 * N ? Access::address(row) : nullptr);
#else
  const unsigned address = Access::shared_address(row);
  if constexpr (N == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// d += a b, in float32. T: float16 or bfloat16.
template <class T>
FASTLDM_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>, "16-bit floats");
#if defined(FASTLDM_HOST_SHIM)
  shim::mma(std::is_same_v<T, float16> ? shim::Mma::half_16 : shim::Mma::bfloat_16, d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  unreachable_on_this_architecture();
#endif
}

// The same over 8 columns of a: for what a depth like 40 or 72 has beyond a multiple of 16.
template <class T>
FASTLDM_DEVICE void mma_16x8x8(float (&d)[4], const std::uint32_t (&a)[2], const std::uint32_t (&b)[1]) {
  static_assert(std::is_same_v<T, float16> || std::is_same_v<T, bfloat16>, "16-bit floats");
#if defined(FASTLDM_HOST_SHIM)
  shim::mma(std::is_same_v<T, float16> ? shim::Mma::half_8 : shim::Mma::bfloat_8, d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
#else
  unreachable_on_this_architecture();
#endif
}

// The same in tf32; a and b hold float32 bits, of which the lowest 13 are not looked at (to_tf32 rounds them away).
FASTLDM_DEVICE void mma_16x8x8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if defined(FASTLDM_HOST_SHIM)
  shim::mma(shim::Mma::tf32_8, d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  unreachable_on_this_architecture();
#endif
}

}  // namespace fastldm::cuda
