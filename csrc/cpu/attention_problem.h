// One call of attention as its forward and backward see it: sizes, masks, tiles of queries, working memory and the
// state of the processor. Included by attention.cpp only.
#pragma once

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "attention.h"
#include "attention_softmax.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace fastldm::FASTLDM_ISA {

// Keys of one block of scores: with the queries of a tile they and the panel of q fit the first-level cache
// (float32 at head dim 40: 24 + 8 KB), and the output tile is read and written once per 128 multiply-adds.
constexpr int64_t kKeys = 128;

// Multiply-adds below which another thread does not pay.
constexpr int64_t kGrain = 1 << 19;

// Subnormal results become 0 to the end of the scope: weights of far-off keys, whose every multiplication would
// cost as much as a hundred.
class FlushSubnormals {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();

 public:
  FlushSubnormals() { _mm_setcsr(saved | 0x8000u); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#else
 public:
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// What a thread needs in force while it works with operands of type E.
template <class E>
struct Processor {
  FlushSubnormals flush;
};

#if defined(__AMX_BF16__)
template <>
struct Processor<bfloat16> {
  FlushSubnormals flush;
  Tiles tiles;
};
#endif

// Hands out parts of one allocation. With no memory it counts what is needed.
class Arena {
  std::uintptr_t next;

 public:
  explicit Arena(void* memory) : next(reinterpret_cast<std::uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* const result = reinterpret_cast<T*>(next);
    next += static_cast<std::uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return result;
  }
  std::size_t used() const { return next; }
};

// The queries start .. start + width - 1 of a range; the last tile may reach beyond it.
struct Tile {
  int64_t start, width;
};

template <class T>
static RowsOf<T> rows_of(const Heads<const void*>& x, int64_t batch, int64_t head, int64_t count) {
  return {static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride, x.row_stride, count};
}

template <class T>
static T* row_of(const Heads<void*>& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

static inline float mask_value(bool attend) { return attend ? 0.0f : -kInfinity; }
template <class M>
static inline float mask_value(M added) {
  return to_float(added);
}

// The mask of one head.
class HeadMask {
  const AttentionProblem& call;
  int64_t offset;

  template <class Use>
  auto visit(const Use& use) const {
    const void* const data = call.mask.data;
    if (call.mask.kind == MaskKind::boolean) return use(static_cast<const bool*>(data) + offset);
    if (call.mask.kind == MaskKind::float32 || call.dtype == DType::float32) {
      return use(static_cast<const float*>(data) + offset);
    }
    if (call.dtype == DType::bfloat16) return use(static_cast<const bfloat16*>(data) + offset);
    return use(static_cast<const float16*>(data) + offset);
  }

 public:
  HeadMask(const AttentionProblem& problem, int64_t batch, int64_t head)
      : call(problem), offset(batch * problem.mask.batch_stride + head * problem.mask.head_stride) {}

  Bias::Kind kind() const {
    if (call.mask.kind == MaskKind::none) return Bias::none;
    return call.mask.query_stride == 0 ? Bias::per_key : Bias::full;
  }

  // Every query of the head is closed to the keys from here on.
  int64_t open_keys() const {
    const int64_t seen = call.causal ? lesser(call.keys, call.queries) : call.keys;
    if (kind() != Bias::per_key) return seen;
    return visit([&](const auto* mask) {
      int64_t count = seen;
      while (count > 0 && mask_value(mask[(count - 1) * call.mask.key_stride]) == -kInfinity) --count;
      return count;
    });
  }

  void per_key(float* values, int64_t key, int64_t keys) const {
    visit([&](const auto* mask) {
      for (int64_t k = 0; k < keys; ++k) values[k] = mask_value(mask[(key + k) * call.mask.key_stride]);
    });
  }

  // values[key][query], 0 for queries beyond the last.
  void full(float* values, int64_t key, int64_t keys, int64_t query, int64_t width) const {
    visit([&](const auto* mask) {
      transpose_into(values, width, width, keys, [&](int64_t row, int64_t column, int count) {
        if (query + row >= call.queries) return Vec::broadcast(0.0f);
        const auto* const line = mask + (query + row) * call.mask.query_stride;
        alignas(64) float numbers[Vec::lanes] = {};
        for (int i = 0; i < count; ++i) numbers[i] = mask_value(line[(key + column + i) * call.mask.key_stride]);
        return Vec::load(numbers);
      });
    });
  }
};

// Sizes and units of a call whose tensors hold T.
template <class T>
struct Geometry {
  using E = typename OperandType<T>::type;
  static constexpr int unit = Operand<E>::unit;

  const AttentionProblem& call;
  int64_t head_dim, depth, key_stride, value_stride, output_rows;
  float panel_factor;  // of q in its panel
  float c;             // weights are exp2((score - reference) * c)
  float bias_factor;   // of scores, where a bias is added
  float lse_factor;    // of references, in the log-sum-exp

  explicit Geometry(const AttentionProblem& problem)
      : call(problem),
        head_dim(problem.head_dim),
        depth(Operand<E>::depth(problem.head_dim)),
        key_stride(Operand<E>::stride(depth)),
        value_stride(Operand<E>::stride(kKeys / unit)),
        output_rows(Operand<E>::rows(problem.head_dim)) {
    panel_factor = call.scale;
    // A factor of 0 would make NaN of closed scores, one below this infinity of references.
    const float size = call.scale < 0.0f ? -call.scale : call.scale;
    const float raw = unit == 1 ? 1.0f : size < 1e-30f ? 1e-30f : size;
    const bool added = call.mask.kind != MaskKind::none && call.mask.kind != MaskKind::boolean;
    bias_factor = added ? raw : 1.0f;
    lse_factor = added ? 1.0f : raw;
    c = lse_factor * kLog2e;
  }

  int64_t heads() const { return call.batch * call.heads; }

  // Masks a block of scores of `width` queries from `query` on; `values` as HeadMask has filled it for kind
  // per_key, and room for kind full.
  void mask(float* scores, const HeadMask& head, float* values, int64_t key, int64_t keys, int64_t query,
            int64_t width) const {
    const Bias::Kind kind = head.kind();
    if (kind == Bias::full) head.full(values, key, keys, query, width);
    if (kind != Bias::none) {
      apply_bias(scores, width, keys, width, {kind, values, kind == Bias::full ? width : 1, bias_factor});
    }
    if (call.causal && key + keys - 1 > query) apply_causal(scores, width, key, keys, query, width);
  }
};

// How many of `count` rows one of the parts has into which every head is cut: few parts, but such that the threads
// finish together; multiples of `step`, at most `most`.
static inline int64_t part_size(int64_t count, int64_t heads, int64_t most, int64_t step) {
  const int64_t threads = num_threads();
  int64_t parts = divide_up(count, most);
  for (; divide_up(count, parts) > step; ++parts) {
    const int64_t rounds = divide_up(heads * parts, threads);
    if (9 * rounds * threads <= 10 * heads * parts) break;
  }
  return round_up(divide_up(count, parts), step);
}

}  // namespace fastldm::FASTLDM_ISA
