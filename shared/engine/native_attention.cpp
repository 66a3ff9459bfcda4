// Causal attention of new queries over the paged KV pool, for prefill and decode alike.
//
// A panel is up to 16 queries that share a KV head: the query heads of its group at one or more positions. It walks
// over its keys in tiles of 64 positions with an online softmax (Dao et al. 2022), reading keys and values where they
// lie in the pool. Queries stand in the lanes of the vectors, so a query's result is the same chain of operations
// whatever it shares the panel, the batch or the chunk with.

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "native_vector.h"

namespace {

constexpr int TILE = 64;  // positions; 64 x 64 floats of keys are 16 KB
constexpr int TILE_PADDED = TILE + MAX_ACCUMULATORS;
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

struct Scratch {
  std::unique_ptr<float[]> memory;
  float *queries, *output, *keys, *values;
  explicit Scratch(int64_t head_dim)
      : memory(new float[(2 * PANEL + 2 * TILE) * head_dim]),
        queries(memory.get()),
        output(queries + PANEL * head_dim),
        keys(output + PANEL * head_dim),
        values(keys + TILE * head_dim) {}
};

struct Panel {
  int64_t sequence, head, first_row, rows;  // row = query index * group + query head within the group
};

// scores[key][query] for `count` keys; the tail is computed for repeated keys and ignored.
template <int VECTORS>
void score_tile(const float* queries, const float* const* keys, int count, int64_t head_dim, float* scores) {
  // With one vector a query takes four dimensions at a time: eight pointers do not fit the registers beside the sums,
  // so each is fetched once per four multiply-adds.
  constexpr int KEYS = VECTORS == 1 ? 8 : MAX_ACCUMULATORS / VECTORS;
  constexpr int DIMS = VECTORS == 1 ? 4 : 1;
  constexpr int WIDTH = VECTORS * LANES;
  for (int key = 0; key < count; key += KEYS) {
    Vec sums[KEYS][VECTORS] = {};
    const float* rows[KEYS];
    for (int i = 0; i < KEYS; ++i) rows[i] = keys[std::min(key + i, count - 1)];
    for (int64_t d = 0; d < head_dim; d += DIMS) {
      Vec query[DIMS][VECTORS];
      for (int e = 0; e < DIMS; ++e)
        for (int j = 0; j < VECTORS; ++j) query[e][j] = load(queries + (d + e) * WIDTH + j * LANES);
      for (int i = 0; i < KEYS; ++i)
        for (int e = 0; e < DIMS; ++e) {
          const Vec value = broadcast(rows[i][d + e]);
          for (int j = 0; j < VECTORS; ++j) sums[i][j] += value * query[e][j];
        }
    }
    for (int i = 0; i < KEYS; ++i)
      for (int j = 0; j < VECTORS; ++j) store(scores + (key + i) * WIDTH + j * LANES, sums[i][j]);
  }
}

// output[query][dim] = output * decay[query] + sum over keys of weights[key][query] * values[key][dim]
template <int ROWS, int VECTORS>
void add_values(const float* weights, int width, const float* const* values, int count, const float* decay,
                float* output, int64_t head_dim, int64_t dim) {
  Vec sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = load(output + i * head_dim + dim + j * LANES) * decay[i];
  for (int key = 0; key < count; ++key) {
    Vec value[VECTORS];
    for (int j = 0; j < VECTORS; ++j) value[j] = load(values[key] + dim + j * LANES);
    for (int i = 0; i < ROWS; ++i) {
      Vec weight = broadcast(weights[key * width + i]);
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += weight * value[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) store(output + i * head_dim + dim + j * LANES, sums[i][j]);
}

template <int ROWS>
void add_values_to(int64_t rows, const float* weights, int width, const float* const* values, int count,
                   const float* decay, float* output, int64_t head_dim) {
  if (rows == ROWS) {
    constexpr int WIDE = 2 * ROWS * PANEL_VECTORS <= MAX_ACCUMULATORS ? 2 * PANEL_VECTORS : PANEL_VECTORS;
    int64_t dim = 0;
    for (; dim + WIDE * LANES <= head_dim; dim += WIDE * LANES)
      add_values<ROWS, WIDE>(weights, width, values, count, decay, output, head_dim, dim);
    for (; dim < head_dim; dim += PANEL)
      add_values<ROWS, PANEL_VECTORS>(weights, width, values, count, decay, output, head_dim, dim);
  } else if constexpr (ROWS > 1) {
    add_values_to<ROWS - 1>(rows, weights, width, values, count, decay, output, head_dim);
  }
}

// Turn scores into weights in place, and carry the running maximum and sum of every query.
template <int VECTORS>
void soften_tile(float* scores, int64_t tile_start, int count, const int32_t* limits, bool masked, float* maxima,
                 float* totals, float* decay) {
  constexpr int WIDTH = VECTORS * LANES;
  for (int j = 0; j < WIDTH; j += LANES) {
    VecInt limit;
    std::memcpy(&limit, limits + j, sizeof limit);
    Vec before = load(maxima + j), peak = before;
    for (int key = 0; key < count; ++key) {
      Vec score = load(scores + key * WIDTH + j);
      if (masked) {
        const VecInt position = static_cast<int32_t>(tile_start + key) - VecInt{};
        score = position <= limit ? score : broadcast(MINUS_INFINITY);
        store(scores + key * WIDTH + j, score);
      }
      peak = maximum(score, peak);
    }
    Vec total = {};
    for (int key = 0; key < count; ++key) {
      Vec score = load(scores + key * WIDTH + j);
      Vec weight = exp_nonpositive(score - peak);
      weight = score == MINUS_INFINITY ? Vec{} : weight;
      store(scores + key * WIDTH + j, weight);
      total += weight;
    }
    Vec shrink = exp_nonpositive(before - peak);
    shrink = before == MINUS_INFINITY ? Vec{} : shrink;
    store(decay + j, shrink);
    store(totals + j, load(totals + j) * shrink + total);
    store(maxima + j, peak);
  }
}

template <typename Kv>
const Kv* find_key(const Attention& a, const Kv* pool, const Panel& panel, int64_t position) {
  const int64_t block = a.tables[panel.sequence * a.table_stride + position / a.block_size];
  return pool + block * a.block_stride + (position % a.block_size * a.kv_heads + panel.head) * a.head_dim;
}

// One head's keys are short runs in scattered blocks: the processor does not guess them. Without this a decode step
// waits for memory most of the time.
template <typename Kv>
void prefetch_tile(const Attention& a, const Kv* pool, const Panel& panel, int64_t tile_start, int count) {
  constexpr int64_t CACHE_LINE = 64 / sizeof(Kv);
  for (int i = 0; i < count; ++i) {
    const Kv* key = find_key(a, pool, panel, tile_start + i);
    for (int64_t d = 0; d < a.head_dim; d += CACHE_LINE) {
      __builtin_prefetch(key + d);
      __builtin_prefetch(key + a.value_offset + d);
    }
  }
}

// Where the keys and values of the tile's positions are. bfloat16 ones are widened into the scratch first.
template <typename Kv>
void locate_tile(const Attention& a, const Kv* pool, const Panel& panel, int64_t tile_start, int count,
                 Scratch& scratch, const float** keys, const float** values) {
  for (int i = 0; i < count; ++i) {
    const Kv* key = find_key(a, pool, panel, tile_start + i);
    const Kv* value = key + a.value_offset;
    if constexpr (std::is_same_v<Kv, float>) {
      keys[i] = key;
      values[i] = value;
    } else {
      float* wide_key = scratch.keys + i * a.head_dim;
      float* wide_value = scratch.values + i * a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d += LANES) {
        store(wide_key + d, load(key + d));
        store(wide_value + d, load(value + d));
      }
      keys[i] = wide_key;
      values[i] = wide_value;
    }
  }
}

template <int VECTORS, typename Kv>
void attend_panel(const Attention& a, const Kv* pool, const Panel& panel, Scratch& scratch) {
  constexpr int WIDTH = VECTORS * LANES;
  alignas(64) float scores[TILE_PADDED * WIDTH];
  alignas(64) float maxima[WIDTH], totals[WIDTH], decay[WIDTH];
  alignas(64) int32_t limits[WIDTH];
  const float *keys[TILE], *values[TILE], *query_rows[WIDTH];
  const int64_t token_start = a.query_starts[panel.sequence];
  const int64_t first_position =
      a.contexts[panel.sequence] - (a.query_starts[panel.sequence + 1] - token_start);
  for (int i = 0; i < WIDTH; ++i) {
    const int64_t row = panel.first_row + std::min<int64_t>(i, panel.rows - 1);  // spare lanes repeat the last row
    const int64_t query = row / a.group;
    limits[i] = static_cast<int32_t>(first_position + query);
    query_rows[i] = a.queries + (token_start + query) * a.query_stride +
                    (panel.head * a.group + row % a.group) * a.head_dim;
    maxima[i] = MINUS_INFINITY;
    totals[i] = 0.0f;
  }
  for (int64_t d = 0; d < a.head_dim; ++d)
    for (int i = 0; i < WIDTH; ++i) scratch.queries[d * WIDTH + i] = query_rows[i][d] * a.scaling;
  std::fill(scratch.output, scratch.output + panel.rows * a.head_dim, 0.0f);

  const int64_t stop = limits[panel.rows - 1] + 1;  // keys from here on are nobody's: they may not even be written
  for (int64_t tile_start = 0; tile_start < stop; tile_start += TILE) {
    const int count = static_cast<int>(std::min<int64_t>(TILE, stop - tile_start));
    locate_tile(a, pool, panel, tile_start, count, scratch, keys, values);
    const int64_t next = tile_start + TILE;
    prefetch_tile(a, pool, panel, next, static_cast<int>(std::clamp<int64_t>(stop - next, 0, TILE)));
    score_tile<VECTORS>(scratch.queries, keys, count, a.head_dim, scores);
    soften_tile<VECTORS>(scores, tile_start, count, limits, tile_start + count - 1 > limits[0], maxima, totals, decay);
    constexpr int ROWS = MAX_ACCUMULATORS / PANEL_VECTORS;
    for (int64_t row = 0; row < panel.rows; row += ROWS)
      add_values_to<ROWS>(std::min<int64_t>(ROWS, panel.rows - row), scores + row, WIDTH, values, count, decay + row,
                          scratch.output + row * a.head_dim, a.head_dim);
  }
  for (int64_t i = 0; i < panel.rows; ++i) {
    const int64_t row = panel.first_row + i;
    float* out = a.out + (token_start + row / a.group) * a.out_stride +
                 (panel.head * a.group + row % a.group) * a.head_dim;
    const float inverse = 1.0f / totals[i];
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] = scratch.output[i * a.head_dim + d] * inverse;
  }
}

std::vector<Panel> cut_into_panels(const Attention& a) {
  std::vector<Panel> panels;
  for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
    const int64_t rows = (a.query_starts[sequence + 1] - a.query_starts[sequence]) * a.group;
    // The last rows have the most keys: they go first, so that no thread is left with a long one at the end.
    for (int64_t row = (rows - 1) / PANEL * PANEL; row >= 0; row -= PANEL)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        panels.push_back({sequence, head, row, std::min<int64_t>(PANEL, rows - row)});
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
    for (size_t index = 0; index < panels.size(); ++index) {
      if (panels[index].rows <= LANES)
        attend_panel<1>(a, pool, panels[index], scratch);
      else
        attend_panel<PANEL_VECTORS>(a, pool, panels[index], scratch);
    }
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
