// Attention backward: scores are computed again, block by block. Included by attention.cpp only.
//
// Per block of keys and tile of queries, lanes being queries in the first three lines and head dims in the others:
//
//   S^T = K Q^T          dP^T = V dO^T         P = exp2(S - reference) * factor,  dS = P (dP - delta)
//   dQ^T += K^T dS^T
//   dV += P^T dO         dK += dS^T Q
//
// A thread owns what it adds to: a head; or, where there are fewer heads than threads, a range of keys and then,
// with the scores computed once more, a range of queries. Each sum runs over blocks in ascending order either way.
#pragma once

#include "attention_problem.h"

namespace fastldm::FASTLDM_ISA {

// exp(score - lse) is off by half a last place of lse. Beyond this, where that is more than 5e-7, or 4e-6 beside
// rounding to 16 bits, the maximum and the sum are found anew.
template <class T>
constexpr float kLargeLse = sizeof(T) == 4 ? 16.0f : 64.0f;

// A half-open range.
struct Range {
  int64_t begin, end;
};

template <class T>
class Backward : Geometry<T> {
  using Sizes = Geometry<T>;
  using E = typename Sizes::E;
  using Sizes::c, Sizes::depth, Sizes::head_dim, Sizes::key_stride, Sizes::output_rows, Sizes::unit;

  // Tiles are wide, for they are the depth of the products that give dK and dV.
  static constexpr int64_t kWidth = 2 * Operand<E>::query_vectors * Vec::lanes;
  static constexpr int64_t kWidthStep = greater(Vec::lanes, Operand<E>::depth_step * unit);
  // Statistics of so many queries are one unit of work.
  static constexpr int64_t kStatisticsPart = 4 * kWidth;
  // Panels of q and dout are made for this many bytes of keys and what belongs to them.
  static constexpr int64_t kKeyBudget = 1 << 20;
  // Gradients of the queries of one head that a thread may hold.
  static constexpr int64_t kQueryBudget = 8 << 20;

  const AttentionBackward& call;
  int64_t wide_dim;     // columns of dK and dV
  int64_t held_keys;    // keys that are packed together
  int64_t column_stride;  // of the packed columns of k
  int64_t padded_queries;

  struct Memory {
    E *keys, *values, *key_columns, *panel, *grad_panel, *row_panel, *grad_row_panel;
    E *weight_rows, *grad_rows, *grad_score_panel;
    float *scores, *grads, *grad_keys, *grad_values, *grad_queries, *bias, *row_work;
  };

  Memory lay_out(Arena& arena, int64_t queries) const {
    const int64_t wide = divide_up(kWidth, unit) * wide_dim * unit;
    Memory memory;
    memory.keys = arena.take<E>(held_keys * key_stride * unit);
    memory.values = arena.take<E>(held_keys * key_stride * unit);
    memory.key_columns = arena.take<E>(output_rows * column_stride * unit);
    memory.panel = arena.take<E>(depth * kWidth * unit);
    memory.grad_panel = arena.take<E>(depth * kWidth * unit);
    memory.row_panel = arena.take<E>(wide);
    memory.grad_row_panel = arena.take<E>(wide);
    memory.scores = arena.take<float>(kKeys * kWidth);
    memory.grads = arena.take<float>(kKeys * kWidth);
    if constexpr (unit == 1) {
      memory.weight_rows = memory.scores;
      memory.grad_rows = memory.grad_score_panel = memory.grads;
    } else {
      memory.weight_rows = arena.take<E>(kKeys * kWidth);
      memory.grad_rows = arena.take<E>(kKeys * kWidth);
      memory.grad_score_panel = arena.take<E>(kKeys * kWidth);
    }
    memory.grad_keys = arena.take<float>(held_keys * wide_dim);
    memory.grad_values = arena.take<float>(held_keys * wide_dim);
    memory.grad_queries = arena.take<float>(round_up(queries, kWidthStep) * output_rows);
    memory.bias = arena.take<float>(call.mask.kind == MaskKind::none ? 0 : kKeys * kWidth);
    memory.row_work = arena.take<float>(3 * kWidth);
    return memory;
  }

  // Runs use(memory) with the working memory for `queries` gradients; false where there is none.
  template <class Use>
  bool with_memory(int64_t queries, const Use& use) const {
    const Processor<E> processor;
    Arena needed(nullptr);
    lay_out(needed, queries);
    Scratch<char> scratch(needed.used());
    if (scratch.data == nullptr) return false;
    Arena arena(scratch.data);
    use(lay_out(arena, queries));
    return true;
  }

  // parallel_for over units; false where a thread found no memory.
  template <class Use>
  bool for_units(int64_t units, int64_t work, int64_t queries, const Use& use) const {
    bool enough = true;
    parallel_for(units, greater(1, kGrain / greater(1, work)), [&](int64_t begin, int64_t end) {
      const bool done = with_memory(queries, [&](const Memory& memory) {
        for (int64_t i = begin; i < end; ++i) use(memory, i);
      });
      if (!done) __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
    });
    return enough;
  }

  RowStatistics statistics_of(float* statistics, int64_t head) const {
    const int64_t all = Sizes::heads() * padded_queries;
    return RowStatistics{statistics, statistics + all, statistics + 2 * all}.from(head * padded_queries);
  }

  // delta of `rows` queries, a lane each: dout . out, summed in the order in which float operands sum dP. Where one
  // key has all the weight, out is its v, and dP - delta must cancel.
  Vec find_delta(const RowsOf<T>& g, const RowsOf<T>& out) const {
    Vec total = Vec::broadcast(0.0f), sum = total;
    for (int64_t d = 0; d < head_dim; d += Vec::lanes) {
      const int count = static_cast<int>(lesser(Vec::lanes, head_dim - d));
      Vec a[Vec::lanes], b[Vec::lanes];
      for (int i = 0; i < Vec::lanes; ++i) {
        a[i] = read_row_units(out, i, d, count, 0.0f);
        b[i] = read_row_units(g, i, d, count, 0.0f);
      }
      transpose(a);
      transpose(b);
      for (int i = 0; i < count; ++i) {
        if ((d + i) % kMaxDepth == 0) {
          total = total + sum;
          sum = Vec::broadcast(0.0f);
        }
        sum = fma(a[i], b[i], sum);
      }
    }
    return total + sum;
  }

  // Reference, factor and delta of the queries of one part of one head.
  bool find_statistics(float* statistics, int64_t index) const {
    const int64_t parts = divide_up(padded_queries, kStatisticsPart);
    const int64_t head = index / parts, begin = index % parts * kStatisticsPart;
    const int64_t end = lesser(begin + kStatisticsPart, padded_queries);
    const RowStatistics rows = statistics_of(statistics, head);
    const auto g = rows_of<T>(call.grad_out, head / call.heads, head % call.heads, call.queries);
    const auto out = rows_of<T>(call.out, head / call.heads, head % call.heads, call.queries);
    const float* const lse = call.lse + head * call.queries;
    bool large = false;
    for (int64_t i = begin; i < end; i += Vec::lanes) find_delta(g.from(i), out.from(i)).store(rows.delta + i);
    for (int64_t i = begin; i < end; ++i) {
      // Rows without keys have weights of 0, and so have the rows that fill up the last tile.
      const bool alive = i < call.queries && lse[i] != -kInfinity;
      rows.reference[i] = alive ? lse[i] / Sizes::lse_factor : kLargest;
      rows.factor[i] = alive ? 1.0f : 0.0f;
      large |= is_large(i, lse);
    }
    if (!large) return true;
    return with_memory(0, [&](const Memory& memory) {
      for (int64_t i = begin; i < end; i += kWidth) {
        const Tile tile = {i, lesser(kWidth, end - i)};
        bool wanted = false;
        for (int64_t j = i; j < i + tile.width; ++j) wanted |= is_large(j, lse);
        if (wanted) find_large(memory, head, tile, rows, lse);
      }
    });
  }

  // Whether the statistics of a query are to be found anew. With half precision also where all keys are one block:
  // there `out`, rounded, makes a delta that shows beside gradients summed over few keys, and the way is short.
  bool is_large(int64_t query, const float* lse) const {
    if (query >= call.queries || lse[query] == -kInfinity) return false;
    return __builtin_fabsf(lse[query]) > kLargeLse<T> || (sizeof(T) == 2 && call.keys <= kKeys);
  }

  // The rows of a tile whose log-sum-exp is large, from their scores.
  void find_large(const Memory& memory, int64_t head, const Tile& tile, const RowStatistics& rows,
                  const float* lse) const {
    const HeadMask mask(call, head / call.heads, head % call.heads);
    float *const maximum = memory.row_work, *const sum = maximum + kWidth, *const totals = sum + kWidth;
    for (int64_t i = 0; i < kWidth; ++i) {
      maximum[i] = -kInfinity;
      sum[i] = totals[i] = 0.0f;
    }
    pack_query_panels(memory, head, tile);
    const int64_t end = mask.open_keys();
    for (int64_t key = 0; key < end; key += kKeys) {
      const int64_t keys = lesser(kKeys, end - key);
      pack_key_rows(memory, head, {key, key + keys});
      score(memory, mask, key, keys, 0, tile);
      gather_statistics(memory.scores, memory.grads, tile.width, keys, tile.width, c, maximum, sum, totals);
    }
    for (int64_t i = 0; i < tile.width; i += Vec::lanes) {
      const Vec inverse = inverse_sum(Vec::load(sum + i));
      inverse.store(sum + i);
      (Vec::load(totals + i) * inverse).store(totals + i);
    }
    for (int64_t i = 0; i < tile.width; ++i) {
      if (!is_large(tile.start + i, lse)) continue;
      rows.reference[tile.start + i] = maximum[i];
      rows.factor[tile.start + i] = sum[i];
      rows.delta[tile.start + i] = totals[i];
    }
  }

  void pack_query_panels(const Memory& memory, int64_t head, const Tile& tile) const {
    const auto q = rows_of<T>(call.q, head / call.heads, head % call.heads, call.queries).from(tile.start);
    const auto g = rows_of<T>(call.grad_out, head / call.heads, head % call.heads, call.queries).from(tile.start);
    pack_panel(memory.panel, tile.width, q, tile.width, head_dim, Sizes::panel_factor);
    pack_panel(memory.grad_panel, tile.width, g, tile.width, head_dim, 1.0f);
  }

  void pack_key_rows(const Memory& memory, int64_t head, const Range& keys) const {
    const auto k = rows_of<T>(call.k, head / call.heads, head % call.heads, keys.end).from(keys.begin);
    const auto v = rows_of<T>(call.v, head / call.heads, head % call.heads, keys.end).from(keys.begin);
    const int64_t rows = Operand<E>::rows(keys.end - keys.begin);
    pack_rows(memory.keys, key_stride, k, rows, head_dim);
    pack_rows(memory.values, key_stride, v, rows, head_dim);
  }

  // Masked scores and dP of a tile with the keys from `key` on, packed from row `at` on.
  void score(const Memory& memory, const HeadMask& mask, int64_t key, int64_t keys, int64_t at,
             const Tile& tile) const {
    const int64_t rows = Operand<E>::rows(keys), from = at * key_stride * unit, width = tile.width;
    multiply(memory.scores, width, memory.keys + from, key_stride, memory.panel, width, rows, width, depth, false);
    multiply(memory.grads, width, memory.values + from, key_stride, memory.grad_panel, width, rows, width, depth,
             false);
    if (mask.kind() == Bias::per_key) mask.per_key(memory.bias, key, keys);
    Sizes::mask(memory.scores, mask, memory.bias, key, keys, tile.start, width);
  }

  // What the given keys and queries of a head give to dQ of these queries or to dK and dV of these keys.
  void accumulate(const Memory& memory, float* statistics, int64_t head, Range keys, Range queries, bool want_queries,
                  bool want_keys) const {
    const HeadMask mask(call, head / call.heads, head % call.heads);
    const int64_t open = lesser(keys.end, mask.open_keys());
    if (want_keys) clear_rows({greater(keys.begin, open), keys.end}, head);
    zero(memory.grad_queries, want_queries ? round_up(queries.end - queries.begin, kWidthStep) * output_rows : 0);
    for (int64_t first = keys.begin; first < open; first += held_keys) {
      const Range held = {first, lesser(first + held_keys, open)};
      const int64_t count = held.end - held.begin;
      pack_key_rows(memory, head, held);
      if (want_queries) {
        const auto k = rows_of<T>(call.k, head / call.heads, head % call.heads, held.end).from(held.begin);
        pack_columns(memory.key_columns, column_stride, k, count, head_dim);
      }
      if (want_keys) {
        zero(memory.grad_keys, held_keys * wide_dim);
        zero(memory.grad_values, held_keys * wide_dim);
      }
      for (int64_t query = queries.begin; query < queries.end; query += kWidth) {
        const Tile tile = {query, lesser(kWidth, round_up(queries.end - query, kWidthStep))};
        if (call.causal && held.begin >= query + tile.width) continue;
        pack_query_panels(memory, head, tile);
        if (want_keys) pack_query_rows(memory, head, tile);
        float* const grad_queries = memory.grad_queries + (query - queries.begin) * output_rows;
        const RowStatistics rows = statistics_of(statistics, head).from(query);
        for (int64_t key = held.begin; key < held.end; key += kKeys) {
          if (call.causal && key >= query + tile.width) break;
          const int64_t size = lesser(kKeys, held.end - key), at = key - held.begin;
          score(memory, mask, key, size, at, tile);
          differentiate_softmax(memory, size, tile.width, rows);
          if (want_keys) add_to_keys(memory, size, at, tile.width);
          if (want_queries) {
            multiply(grad_queries, tile.width, memory.key_columns + at, column_stride, memory.grad_score_panel,
                     tile.width, output_rows, tile.width, Operand<E>::depth(size), true);
          }
        }
      }
      if (want_keys) {
        const int64_t b = head / call.heads, h = head % call.heads;
        write_rows(row_of<T>(call.grad_k, b, h, held.begin), call.grad_k.row_stride, memory.grad_keys, wide_dim,
                   call.scale, count, head_dim);
        write_rows(row_of<T>(call.grad_v, b, h, held.begin), call.grad_v.row_stride, memory.grad_values, wide_dim,
                   1.0f, count, head_dim);
      }
    }
    if (want_queries) write_queries(memory, head, queries);
  }

  void differentiate_softmax(const Memory& memory, int64_t keys, int64_t width, const RowStatistics& rows) const {
    if constexpr (unit == 1) {
      softmax_gradient(memory.scores, memory.grads, width, keys, width, c, rows);
    } else {
      softmax_gradient(memory.scores, memory.grads, memory.weight_rows, memory.grad_rows, memory.grad_score_panel,
                       width, keys, width, c, rows);
    }
  }

  void pack_query_rows(const Memory& memory, int64_t head, const Tile& tile) const {
    const auto q = rows_of<T>(call.q, head / call.heads, head % call.heads, call.queries).from(tile.start);
    const auto g = rows_of<T>(call.grad_out, head / call.heads, head % call.heads, call.queries).from(tile.start);
    pack_row_panel(memory.row_panel, wide_dim, q, tile.width, head_dim);
    pack_row_panel(memory.grad_row_panel, wide_dim, g, tile.width, head_dim);
  }

  void add_to_keys(const Memory& memory, int64_t keys, int64_t at, int64_t width) const {
    const int64_t rows = Operand<E>::rows(keys), queries = Operand<E>::depth(width);
    multiply(memory.grad_values + at * wide_dim, wide_dim, memory.weight_rows, width / unit, memory.grad_row_panel,
             wide_dim, rows, wide_dim, queries, true);
    multiply(memory.grad_keys + at * wide_dim, wide_dim, memory.grad_rows, width / unit, memory.row_panel, wide_dim,
             rows, wide_dim, queries, true);
  }

  void write_queries(const Memory& memory, int64_t head, const Range& queries) const {
    for (int64_t i = 0; i < kWidth; ++i) memory.row_work[i] = call.scale;
    for (int64_t query = queries.begin; query < queries.end; query += kWidth) {
      const int64_t width = lesser(kWidth, round_up(queries.end - query, kWidthStep));
      write_columns(row_of<T>(call.grad_q, head / call.heads, head % call.heads, query), call.grad_q.row_stride,
                    memory.grad_queries + (query - queries.begin) * output_rows, width, memory.row_work,
                    lesser(width, queries.end - query), head_dim);
    }
  }

  // Keys that no query sees.
  void clear_rows(const Range& keys, int64_t head) const {
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      T* const grad_k = row_of<T>(call.grad_k, head / call.heads, head % call.heads, key);
      T* const grad_v = row_of<T>(call.grad_v, head / call.heads, head % call.heads, key);
      std::memset(static_cast<void*>(grad_k), 0, sizeof(T) * static_cast<std::size_t>(head_dim));
      std::memset(static_cast<void*>(grad_v), 0, sizeof(T) * static_cast<std::size_t>(head_dim));
    }
  }

  bool run_heads(float* statistics) const {
    const int64_t work = 5 * call.queries * call.keys * head_dim;
    return for_units(Sizes::heads(), work, call.queries, [&](const Memory& memory, int64_t head) {
      accumulate(memory, statistics, head, {0, call.keys}, {0, call.queries}, true, true);
    });
  }

  bool run_parts(float* statistics) const {
    const int64_t keys = part_size(call.keys, Sizes::heads(), call.keys, kKeys), key_parts = divide_up(call.keys, keys);
    const int64_t most = greater(kWidth, kQueryBudget / (4 * output_rows) / kWidth * kWidth);
    const int64_t queries = part_size(call.queries, Sizes::heads(), most, kWidth);
    const int64_t query_parts = divide_up(call.queries, queries);
    return for_units(Sizes::heads() * key_parts, 4 * call.queries * keys * head_dim, 0,
                     [&](const Memory& memory, int64_t i) {
                       const int64_t begin = i % key_parts * keys;
                       accumulate(memory, statistics, i / key_parts, {begin, lesser(begin + keys, call.keys)},
                                  {0, call.queries}, false, true);
                     }) &&
           for_units(Sizes::heads() * query_parts, 3 * queries * call.keys * head_dim, queries,
                     [&](const Memory& memory, int64_t i) {
                       const int64_t begin = i % query_parts * queries;
                       accumulate(memory, statistics, i / query_parts, {0, call.keys},
                                  {begin, lesser(begin + queries, call.queries)}, true, false);
                     });
  }

 public:
  explicit Backward(const AttentionBackward& backward) : Sizes(backward), call(backward) {
    wide_dim = round_up(head_dim, Vec::lanes);
    const int64_t bytes = 4 * (2 * key_stride + 2 * wide_dim) + 4 * output_rows / unit;
    held_keys = greater(1, lesser(4, kKeyBudget / (bytes * kKeys))) * kKeys;
    held_keys = lesser(held_keys, round_up(call.keys, kKeys));
    column_stride = Operand<E>::stride(held_keys / unit);
    padded_queries = round_up(call.queries, kWidthStep);
  }

  bool run() const {
    const int64_t heads = Sizes::heads(), threads = num_threads();
    Scratch<float> statistics(static_cast<std::size_t>(3 * heads * padded_queries));
    if (statistics.data == nullptr) return false;
    bool enough = true;
    const int64_t parts = heads * divide_up(padded_queries, kStatisticsPart);
    parallel_for(parts, greater(1, kGrain / (kStatisticsPart * head_dim)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!find_statistics(statistics.data, i)) __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
      }
    });
    if (!enough) return false;
    // Whole heads take five products, but the last of them may leave threads idle; parts take seven.
    const bool fits = 4 * padded_queries * output_rows <= kQueryBudget;
    const bool balanced = 5 * divide_up(heads, threads) * threads <= 7 * heads;
    return fits && balanced ? run_heads(statistics.data) : run_parts(statistics.data);
  }
};

}  // namespace fastldm::FASTLDM_ISA
