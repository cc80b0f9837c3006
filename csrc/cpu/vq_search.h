// vq_nearest: scan the rows in float32, rank the open ones in float64. Included by vq.cpp only.
#pragma once

#include "vq_scan.h"

namespace fastldm::FASTLDM_ISA {

// What is known about a row of z after some chunks of the codebook; the index is in VQNearest::indices.
struct Row {
  // While scanning: the least score, and one that no other code is below. Once all codes are scanned: the limit that
  // the candidates for the nearest keep to, and whether there can be several: -infinity for open, else infinity.
  float best, second;
  double distance;  // float64, of the best candidate
};

template <class Kernel>
class Search {
 public:
  explicit Search(const VQNearest& call)
      : call_(call),
        codes_(call, Kernel::panel_vectors * Vec::lanes, Kernel::block),
        slack_(call.dim, 0.0),
        rows_at_once_(Kernel::rows_at_once(call.dim)) {}

  bool run() {
    if (!codes_.has_memory()) return false;
    codes_.prepare();
    if (codes_.largest() == 0.0) {
      // All codes are equal.
      std::memset(call_.indices, 0, static_cast<std::size_t>(call_.rows) * sizeof(int64_t));
      return true;
    }
    slack_ = Slack(call_.dim, codes_.largest());
    if (codes_.chunks == 1) {
      over_rows(0, call_.rows, [this](Worker& worker, int64_t first, int64_t last) {
        scan(worker, first, last, worker.rows);
        rank(worker, first, last, worker.rows);
      });
    } else {
      Scratch<Row> rows(smaller(call_.rows, rows_of_state));
      if (rows.data == nullptr) return false;
      for (int64_t first = 0; first < call_.rows; first += rows_of_state) {
        chunk_by_chunk(first, smaller(first + rows_of_state, call_.rows), rows);
      }
    }
    return !out_of_memory_;
  }

 private:
  static constexpr int tile = Kernel::rows_together, group = Kernel::rows_ranked;
  static constexpr int64_t rows_of_state = 4096;
  static constexpr float infinity = __builtin_inff();
  static constexpr double not_finite = -1.0;

  // Working memory of a thread.
  struct Worker {
    Scratch<float> z, row, code;
    Scratch<Lanes> lanes;
    Scratch<double> slack;
    Scratch<Row> rows;

    Worker(int64_t rows_at_once, int64_t dim)
        : z(rows_at_once * Kernel::row_floats(dim)),
          row(dim),
          code(dim),
          lanes(rows_at_once),
          slack(rows_at_once),
          rows(rows_at_once) {}

    bool has_memory() const { return z.data && row.data && code.data && lanes.data && slack.data && rows.data; }
  };

  // body(worker, first, last) on all rows from begin to end, at most rows_at_once_ in a call, on several threads.
  template <class Body>
  void over_rows(int64_t begin, int64_t end, const Body& body) {
    // A thread is worth its while from about 20 microseconds on.
    const int64_t grain = larger(tile, (int64_t{1} << 20) / (call_.codes * call_.dim));
    parallel_for(end - begin, grain, [&](int64_t first, int64_t last) {
      Worker worker(rows_at_once_, call_.dim);
      if (!worker.has_memory()) {
        __atomic_store_n(&out_of_memory_, true, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t i = first; i < last; i += rows_at_once_) {
        body(worker, begin + i, begin + smaller(i + rows_at_once_, last));
      }
    });
  }

  void chunk_by_chunk(int64_t begin, int64_t end, Row* rows) {
    for (int64_t chunk = 0; chunk < codes_.chunks; ++chunk) {
      codes_.load(chunk);
      over_rows(begin, end, [&](Worker& worker, int64_t first, int64_t last) {
        scan(worker, first, last, rows + (first - begin));
      });
    }
    int64_t open = 0;
    for (int64_t i = 0; i < end - begin; ++i) open += rows[i].second == -infinity;
    for (int64_t chunk = 0; chunk < codes_.chunks && open > 0; ++chunk) {
      codes_.load(chunk);
      over_rows(begin, end, [&](Worker& worker, int64_t first, int64_t last) {
        rank(worker, first, last, rows + (first - begin));
      });
    }
  }

  // Packs a row of z as the scores need it; its slack, infinity if the row is too large to be scored, or not_finite.
  double pack(Worker& worker, int64_t row, float* target, int tile_rows) {
    const int64_t dim = call_.dim;
    const float* z = as_floats(call_.z_dtype, call_.z, row * dim, dim, worker.row);
    const float sum = Kernel::pack_row(z, codes_.centre(), codes_.scale(), dim, tile_rows, target);
    if (sum < 0x1p120f) return slack_(sum);
    Kernel::clear_row(target, dim, tile_rows);
    for (int64_t d = 0; d < dim; ++d) {
      if (!(__builtin_fabsf(z[d]) < infinity)) return not_finite;
    }
    return infinity;
  }

  // Scores the rows first .. last - 1 with all codes of the chunk.
  void scan(Worker& worker, int64_t first, int64_t last, Row* rows) {
    const int64_t dim = call_.dim, count = last - first, padded = ceil_div(count, tile) * tile;
    for (int64_t r = 0; r < padded; ++r) {
      float* const target = Kernel::row_of(worker.z, r, tile, dim);
      if (r < count) {
        worker.slack[r] = pack(worker, first + r, target, tile);
      } else {
        Kernel::clear_row(target, dim, tile);
      }
      clear(worker.lanes[r]);
    }
    Kernel::scan(worker.z, padded, codes_, dim, worker.lanes);
    for (int64_t r = 0; r < count; ++r) {
      take(worker, r, rows[r], call_.indices[first + r]);
      if (codes_.chunk() == codes_.chunks - 1) close(worker.slack[r], rows[r], call_.indices[first + r]);
    }
  }

  // Adds what the scan of this chunk found for a row.
  void take(Worker& worker, int64_t r, Row& row, int64_t& index) {
    Least least = merge(worker.lanes[r]);
    const bool better = codes_.chunk() == 0 || least.best < row.best;
    if (!better) {
      row.second = row.second < least.best ? row.second : least.best;
      return;
    }
    int64_t code = least.place * Vec::lanes + least.lane;
    if (Kernel::block > 1) {
      const float limit = limit_above(least.best, worker.slack[r]);
      int candidates = 0;
      Kernel::find(Kernel::row_of(worker.z, r, tile, call_.dim), &limit, codes_.packed(), least.place * Kernel::block,
                   Kernel::block, call_.dim, [&](int, int64_t vector, std::uint32_t bits) {
                     candidates += __builtin_popcount(bits);
                     code = vector * Vec::lanes + __builtin_ctz(bits);
                   });
      if (candidates != 1) least.second = least.best;
    }
    index = codes_.first_code() + code;
    row.second = codes_.chunk() > 0 && row.best < least.second ? row.best : least.second;
    row.best = least.best;
  }

  // All codes are scanned: is the best one certain to be the nearest?
  void close(double slack, Row& row, int64_t& index) {
    if (slack == not_finite) {
      index = 0;
      row.second = infinity;
      return;
    }
    const float limit = limit_above(row.best, slack);
    if (row.second > limit) {
      row.second = infinity;
    } else {
      row = {limit, -infinity, __builtin_inf()};
      index = call_.codes;
    }
  }

  // Compares the candidates of this chunk for the open rows among first .. last - 1.
  void rank(Worker& worker, int64_t first, int64_t last, Row* rows) {
    int64_t open[group];
    int count = 0;
    for (int64_t i = 0; i < last - first; ++i) {
      if (rows[i].second == -infinity) open[count++] = i;
      if (count == group || (count > 0 && i == last - first - 1)) {
        rank_group(worker, first, open, count, rows);
        count = 0;
      }
    }
  }

  void rank_group(Worker& worker, int64_t first, const int64_t* open, int count, Row* rows) {
    const int64_t dim = call_.dim;
    float limits[group];
    for (int i = 0; i < group; ++i) {
      float* const target = Kernel::row_of(worker.z, i, group, dim);
      if (i < count) {
        pack(worker, first + open[i], target, group);
        limits[i] = rows[open[i]].best;
      } else {
        Kernel::clear_row(target, dim, group);
        limits[i] = -infinity;
      }
    }
    const auto compare = [&](int i, int64_t vector, std::uint32_t bits) {
      for (; bits != 0; bits &= bits - 1) {
        const int64_t code = codes_.first_code() + vector * Vec::lanes + __builtin_ctz(bits);
        if (code >= call_.codes) continue;
        Row& row = rows[open[i]];
        int64_t& index = call_.indices[first + open[i]];
        const double distance = squared_distance(worker, first + open[i], code);
        if (distance < row.distance || (distance == row.distance && code < index)) {
          row.distance = distance;
          index = code;
        }
      }
    };
    Kernel::find(worker.z, limits, codes_.packed(), 0, codes_.panels() * Kernel::panel_vectors, dim, compare);
  }

  // The very number that fastldm/reference/vq.py compares.
  double squared_distance(Worker& worker, int64_t row, int64_t code) {
    const int64_t dim = call_.dim;
    const float* z = as_floats(call_.z_dtype, call_.z, row * dim, dim, worker.row);
    const float* e = as_floats(call_.codebook_dtype, call_.codebook, code * dim, dim, worker.code);
    double total = 0.0;
    for (int64_t d = 0; d < dim; ++d) {
      const double difference = static_cast<double>(z[d]) - static_cast<double>(e[d]);
      // Volatile, so that no compiler fuses the product into the addition.
      const volatile double square = difference * difference;
      total += square;
    }
    return total;
  }

  const VQNearest& call_;
  Codes codes_;
  Slack slack_;
  const int64_t rows_at_once_;
  bool out_of_memory_ = false;
};

}  // namespace fastldm::FASTLDM_ISA
