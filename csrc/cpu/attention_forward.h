// Attention forward: online softmax over blocks of keys. Included by attention.cpp only.
//
// A unit of work is a range of queries of one head. Its panels of q and its output are made once and stay in the
// second-level cache; a block of keys and values is packed, met by all tiles of queries of the unit, and forgotten.
// What is computed for a query does not depend on the other queries of its tile, so neither tiles nor threads show
// in the result.
#pragma once

#include "attention_problem.h"

namespace fastldm::FASTLDM_ISA {

template <class T>
class Forward : Geometry<T> {
  using Sizes = Geometry<T>;
  using E = typename Sizes::E;
  using Sizes::c, Sizes::depth, Sizes::head_dim, Sizes::key_stride, Sizes::output_rows, Sizes::unit,
      Sizes::value_stride;

  const AttentionForward& call;
  int64_t part, parts;

  struct Memory {
    E *panels, *keys, *values, *weights;
    float *outputs, *scores, *bias, *maximum, *sum, *correction;
    Tile* tiles;
  };

  static constexpr int64_t kWidth = Operand<E>::query_vectors * Vec::lanes;

  Memory lay_out(Arena& arena) const {
    const int64_t queries = round_up(part, Vec::lanes), width = lesser(kWidth, queries);
    Memory memory;
    memory.panels = arena.take<E>(queries * depth * unit);
    memory.outputs = arena.take<float>(queries * output_rows);
    memory.keys = arena.take<E>(kKeys * key_stride * unit);
    memory.values = arena.take<E>(output_rows * value_stride * unit);
    memory.scores = arena.take<float>(kKeys * width);
    memory.weights = unit == 1 ? reinterpret_cast<E*>(memory.scores) : arena.take<E>(kKeys * width);
    memory.bias = arena.take<float>(kKeys * (call.mask.kind == MaskKind::none ? 0 : width));
    memory.maximum = arena.take<float>(queries);
    memory.sum = arena.take<float>(queries);
    memory.correction = arena.take<float>(queries);
    memory.tiles = arena.take<Tile>(queries / Vec::lanes);
    return memory;
  }

  static int64_t make_tiles(Tile* tiles, int64_t queries) {
    int64_t count = 0;
    for (int64_t start = 0; start < queries; ++count) {
      const int64_t remaining = divide_up(queries - start, Vec::lanes);
      const int64_t vectors = kVectors == Operand<E>::query_vectors ? next_vectors(remaining)
                                                                    : lesser(Operand<E>::query_vectors, remaining);
      tiles[count] = {start, vectors * Vec::lanes};
      start += vectors * Vec::lanes;
    }
    return count;
  }

  void run_unit(const Memory& memory, int64_t index) const {
    const int64_t batch = index / parts / call.heads, head = index / parts % call.heads;
    const int64_t first = index % parts * part, count = lesser(part, call.queries - first);
    const auto q = rows_of<T>(call.q, batch, head, call.queries).from(first);
    const auto k = rows_of<T>(call.k, batch, head, call.keys), v = rows_of<T>(call.v, batch, head, call.keys);
    const HeadMask mask(call, batch, head);
    const int64_t open = mask.open_keys(), end = call.causal ? lesser(open, first + count) : open;

    const int64_t tiles = make_tiles(memory.tiles, count);
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile tile = memory.tiles[t];
      E* const panel = memory.panels + tile.start * depth * unit;
      pack_panel(panel, tile.width, q.from(tile.start), tile.width, head_dim, Sizes::panel_factor);
      for (int64_t i = tile.start; i < tile.start + tile.width; ++i) {
        memory.maximum[i] = -kInfinity;
        memory.sum[i] = 0.0f;
      }
      if (end == 0) zero(memory.outputs + tile.start * output_rows, tile.width * output_rows);
    }
    for (int64_t key = 0; key < end; key += kKeys) {
      const int64_t keys = lesser(kKeys, end - key);
      pack_rows(memory.keys, key_stride, k.from(key), Operand<E>::rows(keys), head_dim);
      pack_columns(memory.values, value_stride, v.from(key), keys, head_dim);
      if (mask.kind() == Bias::per_key) mask.per_key(memory.bias, key, keys);
      for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = memory.tiles[t];
        if (!call.causal || key < first + tile.start + tile.width) {
          meet(memory, tile, mask, key, keys, first + tile.start);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile tile = memory.tiles[t];
      write(memory, tile, batch, head, first + tile.start, lesser(tile.width, count - tile.start));
    }
  }

  // One tile of queries and one block of keys.
  void meet(const Memory& memory, const Tile& tile, const HeadMask& mask, int64_t key, int64_t keys,
            int64_t query) const {
    const int64_t width = tile.width;
    const E* const panel = memory.panels + tile.start * depth * unit;
    float* const output = memory.outputs + tile.start * output_rows;
    multiply(memory.scores, width, memory.keys, key_stride, panel, width, Operand<E>::rows(keys), width, depth, false);
    Sizes::mask(memory.scores, mask, memory.bias, key, keys, query, width);
    const Running running = {memory.maximum + tile.start, memory.sum + tile.start, memory.correction + tile.start};
    const bool rescale = softmax_block(memory.scores, memory.weights, width, keys, width, c, running);
    if (rescale && key > 0) multiply_lines(output, width, head_dim, width, running.correction);
    multiply(output, width, memory.values, value_stride, memory.weights, width, output_rows, width,
             Operand<E>::depth(keys), key > 0);
  }

  void write(const Memory& memory, const Tile& tile, int64_t batch, int64_t head, int64_t query, int64_t rows) const {
    float* const factors = memory.correction + tile.start;
    for (int64_t i = 0; i < tile.width; i += Vec::lanes) {
      inverse_sum(Vec::load(memory.sum + tile.start + i)).store(factors + i);
    }
    write_columns(row_of<T>(call.out, batch, head, query), call.out.row_stride,
                  memory.outputs + tile.start * output_rows, tile.width, factors, rows, head_dim);
    if (call.lse == nullptr) return;
    float* const lse = call.lse + (batch * call.heads + head) * call.queries + query;
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = memory.sum[tile.start + i];
      const double reference = static_cast<double>(memory.maximum[tile.start + i]) * Sizes::lse_factor;
      lse[i] = sum == 0.0f ? -kInfinity : static_cast<float>(reference + __builtin_logf(sum));
    }
  }

 public:
  explicit Forward(const AttentionForward& forward) : Sizes(forward), call(forward) {
    // Panels and outputs of a unit take this much; a thread's second-level cache is 1 to 2 MB.
    constexpr int64_t budget = 768 << 10;
    const int64_t most = greater(kWidth, budget / (4 * (depth + output_rows)) / kWidth * kWidth);
    part = lesser(part_size(call.queries, Sizes::heads(), most, kWidth), call.queries);
    parts = divide_up(call.queries, part);
  }

  bool run() const {
    const int64_t work = 2 * part * call.keys * head_dim;
    bool enough = true;
    parallel_for(Sizes::heads() * parts, greater(1, kGrain / greater(1, work)), [&](int64_t begin, int64_t end) {
      const Processor<E> processor;
      Arena needed(nullptr);
      lay_out(needed);
      Scratch<char> scratch(needed.used());
      if (scratch.data == nullptr) {
        __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
        return;
      }
      Arena arena(scratch.data);
      const Memory memory = lay_out(arena);
      for (int64_t i = begin; i < end; ++i) run_unit(memory, i);
    });
    return enough;
  }
};

}  // namespace fastldm::FASTLDM_ISA
