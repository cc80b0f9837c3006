// vq_nearest up to 16 dimensions: the scores of all codes, on the float32 pipes.
//
// A thread has rows in registers and goes over the codes, which come through shared memory and which all threads of a
// block read at once. For each row it keeps the least score of a place (32 neighbouring codes), which place, and the
// least score of all other places: a pair of a row and a code costs D multiply-adds and one minimum, all else comes
// once in 32 pairs. vq_nearest_finish.cuh takes it from there.
//
// The floor is instructions. A multiprocessor issues 128 lanes a cycle: with 8 rows a thread a pair takes D + 1, 5 / 32
// for the place and (D + 1) / 32 for the loads (one of 16 bytes serves 4 codes and 8 rows). D = 3: 4.3; 65536 rows and
// 8192 codes on an H200 (132 multiprocessors, 1.98 GHz): 69 us, where a copy of z and the indices takes 0.3 us. Minima
// go at half the rate, 2 (1 + 4 / 32) of 4.3 slots. Loads: shared memory hands out 128 bytes a cycle, 4 cycles for each
// of them, and has 4 (D + 1) schedulers' loads to do in the 34 (D + 1) cycles that these issue for: 47 %. With 4 rows
// it would be 94 %, hence 8; with 2, which more blocks of fewer rows can have, loads are the floor.
#pragma once

#include "cuda/vq_rows.cuh"

namespace fastldm::cuda {

template <int Dim, int Rows>
struct VqSearchFew {
  static constexpr int threads = 128;
  // Registers: the rows take Rows (Dim + 8), with their scores of 4 codes; at most 128, 168 or 255 of them.
  static constexpr int min_blocks = Rows == 2 || Dim <= 4 ? 4 : Dim <= 8 ? 3 : 2;
  static constexpr int min_capability = 80;
  static constexpr int rows = threads * Rows;  // of a block
  static constexpr int place = 32;
  static constexpr int slots = Dim + 1;
  static constexpr int place_floats = place * slots;
  static constexpr int chunk = 2048 / place_floats > 1 ? 2048 / place_floats : 1;  // places copied at a time: 8 KiB
  static constexpr int shared_bytes = 2 * chunk * place_floats * static_cast<int>(sizeof(float));

  struct Params {
    VqRows rows;
    Global<const float> packed, centre;  // of VqPackFew
    VqFound found;
    int places, places_per_split;
  };

  FASTLDM_DEVICE static void fetch(const Params& params, const Shared<float>& to, int first, int end) {
    const int left = end - first;
    const int vectors = (left < chunk ? left : chunk) * (place_floats / 4);
    const Global<const float> from = params.packed + static_cast<std::int64_t>(first) * place_floats;
    for (int i = thread_id(); i < vectors; i += threads) copy_async<16>(to + 4 * i, from + 4 * i);
    commit_group();
  }

  // The scores of a place: the least of each row.
  FASTLDM_DEVICE static void score(float (&least)[Rows], const float (&z)[Rows][Dim], const Shared<float>& codes) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) least[r] = vq_infinity();
#pragma unroll(Dim <= 4 ? 2 : 1)
    for (int group = 0; group < place / 4; ++group) {
      const Shared<float> four = codes + group * 4 * slots;
      const Vec<float, 4> norm = four.template load_vector<4>(0);
      float scores[Rows][4];
#pragma unroll
      for (int d = 0; d < Dim; ++d) {
        const Vec<float, 4> code = four.template load_vector<4>(4 * (d + 1));
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            scores[r][j] = fused_multiply_add(z[r][d], code[j], d == 0 ? norm[j] : scores[r][j]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) least[r] = min_number(least[r], scores[r][j]);
      }
    }
  }

  FASTLDM_DEVICE static void run(const Params& params) {
    const auto codes = dynamic_shared<float>(0, 2 * chunk * place_floats);
    const int begin = block_y() * params.places_per_split;
    const int past = begin + params.places_per_split;
    const int end = past < params.places ? past : params.places;
    fetch(params, codes, begin, end);

    const std::int64_t row0 = static_cast<std::int64_t>(block_x()) * rows + thread_id();
    float z[Rows][Dim];  // -2 z'
    float best[Rows], others[Rows];
    int place_of_best[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const std::int64_t row = row0 + r * threads;
      const bool inside = row < params.rows.count;
      const std::int64_t start = params.rows.start(inside ? row : 0);
      float squares = 0.0f;
      bool finite = true;
#pragma unroll
      for (int d = 0; d < Dim; ++d) {
        z[r][d] = 0.0f;
        if (d < params.rows.dim) {
          const float given = params.rows.numbers.load(start + d * params.rows.stride_dim);
          const float value = given - params.centre.load(d);
          finite = finite && vq_is_finite(given);
          squares = fused_multiply_add(value, value, squares);
          z[r][d] = -2.0f * value;
        }
      }
      if (inside && block_y() == 0) params.found.squares.store(row, finite ? squares : vq_nan());
      best[r] = others[r] = vq_infinity();
      place_of_best[r] = begin;
    }

    int stage = 0;
    for (int first = begin; first < end; first += chunk, stage ^= 1) {
      wait_group<0>();
      block_sync();
      // The other half was read before the barrier.
      if (first + chunk < end) fetch(params, codes + (stage ^ 1) * chunk * place_floats, first + chunk, end);
      const int count = end - first < chunk ? end - first : chunk;
      for (int i = 0; i < count; ++i) {
        float least[Rows];
        score(least, z, codes + (stage * chunk + i) * place_floats);
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          others[r] = min_number(others[r], max_number(best[r], least[r]));
          if (least[r] < best[r]) place_of_best[r] = first + i;
          best[r] = min_number(best[r], least[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const std::int64_t row = row0 + r * threads;
      if (row < params.rows.count) {
        const std::int64_t at = block_y() * params.rows.count + row;
        params.found.least.store(at, best[r]);
        params.found.others.store(at, others[r]);
        params.found.place.store(at, place_of_best[r] * place);
      }
    }
  }
};

}  // namespace fastldm::cuda
