// Causal attention of new queries over the paged KV pool, for prefill and decode alike.
//
// A panel is up to 192 rows (queries that share a KV head: the query heads of its group, at one or more positions). It
// walks over its keys in tiles of 64 positions with an online softmax (Dao et al. 2022), reading keys and values where
// they lie in the pool. Tiles start at fixed positions, and a row never mixes with another, so its result is the same
// chain of operations whatever panel, batch or chunk it is in.

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "native_vector.h"

namespace {

constexpr int TILE = 64;  // positions; 64 x 64 floats of keys are 16 KB
constexpr int PANEL_ROWS = 192;  // share each tile while it is in a near cache
constexpr int STRIP_ROWS = 24;   // of a panel: its scores, 24 x 64 floats, stay in the L1 cache
constexpr int KEYS = 4;  // keys whose scores are summed up together
constexpr int NEAR = 8;  // keys
constexpr int SCORE_ROWS = MAX_ACCUMULATORS / KEYS;
constexpr int VALUE_ROWS = MAX_ACCUMULATORS / PANEL_VECTORS;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

struct Attention {
  const float* queries;  // [tokens, query heads, head_dim], row stride query_stride
  int64_t query_stride;
  float* out;
  int64_t out_stride;
  int64_t block_stride;  // elements between blocks of the pool
  int64_t value_offset;  // from the keys to the values of one layer
  const int64_t* tables;
  int64_t table_stride;
  const int64_t* query_starts;
  const int64_t* contexts;
  int64_t sequences;
  int64_t group;  // query heads a KV head
  int64_t kv_heads;
  int64_t head_dim;
  int64_t block_size;
  float scaling;
};

// Rows of one sequence and KV head: row = query index * group + query head within the group.
struct Panel {
  int64_t sequence, head, first_row, rows;
};

// The rows of a panel, and what they carry from tile to tile; and a tile's keys and values, widened.
struct Scratch {
  std::unique_ptr<float[]> memory;
  float* queries;  // [rows][head_dim], scaled
  float* output;   // [rows][head_dim]
  float* keys;     // [positions][head_dim]
  float* values;
  int32_t limits[PANEL_ROWS];  // the last position each row may look at
  float maxima[PANEL_ROWS];
  float totals[PANEL_ROWS];
  explicit Scratch(int64_t head_dim)
      : memory(new float[(2 * PANEL_ROWS + 2 * TILE) * head_dim]),
        queries(memory.get()),
        output(queries + PANEL_ROWS * head_dim),
        keys(output + PANEL_ROWS * head_dim),
        values(keys + TILE * head_dim) {}
};

// While a tile is worked on, score_rows and add_columns ask for the keys and values of the next one (`ahead`): they are
// short runs in scattered blocks, which the processor does not foresee. It drops requests while too many are open, so
// what is needed soon is asked for again.

// scores[row][key] for ROWS rows; `count` is rounded up to whole groups of keys by repeating the last one.
template <int ROWS, typename Key, typename Kv>
NOINLINE void score_rows(const float* queries, const Key* const* keys, int count, int64_t head_dim,
                         const Kv* const* ahead, float* scores) {
  constexpr int64_t CACHE_LINE = 64 / sizeof(Kv);
  for (int key = 0; key < count; key += KEYS) {
    Vec sums[ROWS][KEYS] = {};
    const Key* key_rows[KEYS];
    for (int i = 0; i < KEYS; ++i) key_rows[i] = keys[std::min(key + i, count - 1)];
    for (int64_t d = 0; d < head_dim; d += LANES) {
      if (ahead && d % CACHE_LINE == 0)
        for (int i = 0; i < KEYS; ++i) {
          __builtin_prefetch(ahead[key + i] + d);
          __builtin_prefetch(keys[std::min(key + NEAR + i, count - 1)] + d);
        }
      Vec query[ROWS];
      for (int i = 0; i < ROWS; ++i) query[i] = load(queries + i * head_dim + d);
      for (int j = 0; j < KEYS; ++j) {
        const Vec value = load(key_rows[j] + d);
        for (int i = 0; i < ROWS; ++i) sums[i][j] += query[i] * value;
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      const Four four = sum_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
      std::memcpy(scores + i * TILE + key, &four, sizeof four);
    }
  }
}

template <int ROWS, typename Key, typename Kv>
void score_some_rows(int64_t rows, const float* queries, const Key* const* keys, int count, int64_t head_dim,
                     const Kv* const* ahead, float* scores) {
  if (rows == ROWS)
    score_rows<ROWS>(queries, keys, count, head_dim, ahead, scores);
  else if constexpr (ROWS > 1)
    score_some_rows<ROWS - 1>(rows, queries, keys, count, head_dim, ahead, scores);
}

// Turn one row's scores into weights in place, and carry its running maximum and sum. Keys past `limit` get weight 0.
float soften_row(float* scores, int64_t tile_start, int count, int32_t limit, float* maximum_so_far, float* total) {
  const bool masked = tile_start + (count + LANES - 1) / LANES * LANES - 1 > limit;
  VecInt positions;
  for (int i = 0; i < LANES; ++i) positions[i] = static_cast<int32_t>(tile_start) + i;
  Vec peaks = broadcast(MINUS_INFINITY);
  for (int key = 0; key < count; key += LANES) {
    Vec score = load(scores + key);
    if (masked) {
      score = positions + key <= limit ? score : broadcast(MINUS_INFINITY);
      store(scores + key, score);
    }
    peaks = maximum(score, peaks);
  }
  const float peak = std::max(largest_lane(peaks), *maximum_so_far);
  Vec sums = {};
  for (int key = 0; key < count; key += LANES) {
    const Vec score = load(scores + key);
    Vec weight = exp_nonpositive(score - peak);
    if (masked) weight = score == MINUS_INFINITY ? Vec{} : weight;
    store(scores + key, weight);
    sums += weight;
  }
  const float decay = *maximum_so_far == MINUS_INFINITY ? 0.0f : exp_nonpositive(broadcast(*maximum_so_far - peak))[0];
  *total = *total * decay + sum_lanes(sums);
  *maximum_so_far = peak;
  return decay;
}

// output[row][dim] = output * decay[row] + sum over keys of weights[row][key] * values[key][dim]
template <int ROWS, int VECTORS, typename Value, typename Kv>
NOINLINE void add_columns(const float* weights, const Value* const* values, int count, const Kv* const* ahead,
                          const float* decay, float* output, int64_t head_dim, int64_t dim) {
  Vec sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = load(output + i * head_dim + dim + j * LANES) * decay[i];
  for (int key = 0; key < count; ++key) {
    if (ahead)
      for (int j = 0; j < VECTORS * LANES * static_cast<int>(sizeof(Kv)); j += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead[key] + dim) + j);
        __builtin_prefetch(reinterpret_cast<const char*>(values[std::min(key + NEAR, count - 1)] + dim) + j);
      }
    Vec value[VECTORS];
    for (int j = 0; j < VECTORS; ++j) value[j] = load(values[key] + dim + j * LANES);
    for (int i = 0; i < ROWS; ++i) {
      const Vec weight = broadcast(weights[i * TILE + key]);
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += weight * value[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) store(output + i * head_dim + dim + j * LANES, sums[i][j]);
}

template <int ROWS, typename Value, typename Kv>
void add_values(int64_t rows, const float* weights, const Value* const* values, int count, const Kv* const* ahead,
                const float* decay, float* output, int64_t head_dim) {
  if (rows == ROWS) {
    constexpr int WIDE = 2 * ROWS * PANEL_VECTORS <= MAX_ACCUMULATORS ? 2 * PANEL_VECTORS : PANEL_VECTORS;
    int64_t dim = 0;
    for (; dim + WIDE * LANES <= head_dim; dim += WIDE * LANES)
      add_columns<ROWS, WIDE>(weights, values, count, ahead, decay, output, head_dim, dim);
    for (; dim < head_dim; dim += PANEL)
      add_columns<ROWS, PANEL_VECTORS>(weights, values, count, ahead, decay, output, head_dim, dim);
  } else if constexpr (ROWS > 1) {
    add_values<ROWS - 1>(rows, weights, values, count, ahead, decay, output, head_dim);
  }
}

// Where the panel's keys at positions from `start` on are; past the last one it is repeated.
template <typename Kv>
void find_keys(const Attention& a, const Kv* pool, const Panel& panel, int64_t start, int64_t count, const Kv** keys) {
  const int64_t* block = a.tables + panel.sequence * a.table_stride + start / a.block_size;
  int64_t slot = start % a.block_size;
  for (int64_t i = 0; i < TILE; ++i) {
    keys[i] = pool + *block * a.block_stride + (slot * a.kv_heads + panel.head) * a.head_dim;
    if (i + 1 < count && ++slot == a.block_size) {
      slot = 0;
      ++block;
    }
  }
}

// One tile for the rows [first, first + rows) of the panel. `ahead` is where the next tile's keys are, or null.
template <typename Key, typename Kv>
void attend_strip(const Attention& a, int64_t first, int64_t rows, int64_t start, int count, const Key* const* keys,
                  const Key* const* values, const Kv* const* ahead, Scratch& scratch) {
  alignas(64) float scores[STRIP_ROWS * TILE];
  float decay[STRIP_ROWS];
  const Kv* ahead_values[TILE];
  for (int i = 0; ahead && i < TILE; ++i) ahead_values[i] = ahead[i] + a.value_offset;
  for (int64_t row = 0; row < rows; row += SCORE_ROWS)
    score_some_rows<SCORE_ROWS>(std::min<int64_t>(SCORE_ROWS, rows - row),
                                scratch.queries + (first + row) * a.head_dim, keys, count, a.head_dim,
                                row == 0 ? ahead : nullptr, scores + row * TILE);
  for (int64_t row = 0; row < rows; ++row)
    decay[row] = soften_row(scores + row * TILE, start, count, scratch.limits[first + row],
                            &scratch.maxima[first + row], &scratch.totals[first + row]);
  for (int64_t row = 0; row < rows; row += VALUE_ROWS)
    add_values<VALUE_ROWS>(std::min<int64_t>(VALUE_ROWS, rows - row), scores + row * TILE, values, count,
                           row == 0 && ahead ? ahead_values : nullptr, decay + row,
                           scratch.output + (first + row) * a.head_dim, a.head_dim);
}

// One tile for all rows of the panel that may look at it.
template <typename Key, typename Kv>
void attend_tile(const Attention& a, int64_t rows, int64_t start, int count, const Key* const* keys,
                 const Key* const* values, const Kv* const* ahead, Scratch& scratch) {
  int64_t first = 0;
  while (scratch.limits[first] < start) ++first;
  for (int64_t row = first; row < rows; row += STRIP_ROWS)
    attend_strip(a, row, std::min<int64_t>(STRIP_ROWS, rows - row), start, count, keys, values,
                 row == first ? ahead : nullptr, scratch);
}

// bfloat16 keys and values, when several groups of rows will read them.
void widen_tile(const Attention& a, const Bf16* const* found, int count, Scratch& scratch, const float** keys,
                const float** values) {
  for (int i = 0; i < count; ++i) {
    keys[i] = scratch.keys + i * a.head_dim;
    values[i] = scratch.values + i * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; d += LANES) {
      store(scratch.keys + i * a.head_dim + d, load(found[i] + d));
      store(scratch.values + i * a.head_dim + d, load(found[i] + a.value_offset + d));
    }
  }
}

// Where the row's query (or output) stands: the offset in its matrix.
int64_t find_row(const Attention& a, const Panel& panel, int64_t row, int64_t stride) {
  return (a.query_starts[panel.sequence] + row / a.group) * stride +
         (panel.head * a.group + row % a.group) * a.head_dim;
}

template <typename Kv>
void attend_panel(const Attention& a, const Kv* pool, const Panel& panel, Scratch& scratch) {
  const int64_t num_new = a.query_starts[panel.sequence + 1] - a.query_starts[panel.sequence];
  for (int64_t i = 0; i < panel.rows; ++i) {
    const float* query = a.queries + find_row(a, panel, panel.first_row + i, a.query_stride);
    for (int64_t d = 0; d < a.head_dim; ++d) scratch.queries[i * a.head_dim + d] = query[d] * a.scaling;
    scratch.limits[i] = static_cast<int32_t>(a.contexts[panel.sequence] - num_new + (panel.first_row + i) / a.group);
    scratch.maxima[i] = MINUS_INFINITY;
    scratch.totals[i] = 0.0f;
  }
  std::fill(scratch.output, scratch.output + panel.rows * a.head_dim, 0.0f);

  const int64_t stop = scratch.limits[panel.rows - 1] + 1;  // keys from here on may not even be written
  const Kv *found[TILE], *values[TILE], *ahead[TILE];
  find_keys(a, pool, panel, 0, std::min<int64_t>(TILE, stop), ahead);
  for (int64_t start = 0; start < stop; start += TILE) {
    const int count = static_cast<int>(std::min<int64_t>(TILE, stop - start));
    const bool last = start + TILE >= stop;
    std::copy(ahead, ahead + TILE, found);
    if (!last) find_keys(a, pool, panel, start + TILE, std::min<int64_t>(TILE, stop - start - TILE), ahead);
    const Kv* const* next = last ? nullptr : ahead;
    if constexpr (std::is_same_v<Kv, Bf16>) {
      if (panel.rows > SCORE_ROWS) {
        const float *wide_keys[TILE], *wide_values[TILE];
        widen_tile(a, found, count, scratch, wide_keys, wide_values);
        attend_tile(a, panel.rows, start, count, wide_keys, wide_values, next, scratch);
        continue;
      }
    }
    for (int i = 0; i < count; ++i) values[i] = found[i] + a.value_offset;
    attend_tile(a, panel.rows, start, count, found, values, next, scratch);
  }
  for (int64_t i = 0; i < panel.rows; ++i) {
    float* out = a.out + find_row(a, panel, panel.first_row + i, a.out_stride);
    const float inverse = 1.0f / scratch.totals[i];
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] = scratch.output[i * a.head_dim + d] * inverse;
  }
}

std::vector<Panel> cut_into_panels(const Attention& a) {
  std::vector<Panel> panels;
  for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
    const int64_t rows = (a.query_starts[sequence + 1] - a.query_starts[sequence]) * a.group;
    // The last rows have the most keys: they go first, so that no thread is left with a long one at the end.
    for (int64_t row = (rows - 1) / PANEL_ROWS * PANEL_ROWS; row >= 0; row -= PANEL_ROWS)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        panels.push_back({sequence, head, row, std::min<int64_t>(PANEL_ROWS, rows - row)});
  }
  return panels;
}

template <typename Kv>
void attend(const Attention& a, const Kv* pool, int threads) {
  const std::vector<Panel> panels = cut_into_panels(a);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(a.head_dim);
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < panels.size(); ++index) attend_panel(a, pool, panels[index], scratch);
  }
}

}  // namespace

extern "C" {

// `pool` points to the keys of block 0 in the layer; `queries` and `out` are float32 and may not overlap.
void ampd_attention(const float* queries, int64_t query_stride, float* out, int64_t out_stride, const void* pool,
                    int is_bf16, int64_t block_stride, int64_t value_offset, const int64_t* tables,
                    int64_t table_stride, const int64_t* query_starts, const int64_t* contexts, int64_t sequences,
                    int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t block_size, float scaling,
                    int threads) {
  const Attention a{queries,      query_stride, out,      out_stride, block_stride, value_offset,
                    tables,       table_stride, query_starts, contexts, sequences,  query_heads / kv_heads,
                    kv_heads,     head_dim,     block_size,   scaling};
  if (is_bf16)
    attend(a, static_cast<const Bf16*>(pool), threads);
  else
    attend(a, static_cast<const float*>(pool), threads);
}
}
