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

// Rows of one sequence (row = query index * group + query head within the group) for some of its KV heads.
struct Panel {
  int64_t sequence, first_row, rows, first_head, heads;
};

// What the rows of one head carry from tile to tile.
struct Head {
  float* queries;  // [head_dim][lanes], scaled
  float* output;   // [rows][head_dim]
  alignas(64) float maxima[PANEL];
  alignas(64) float totals[PANEL];
};

struct Scratch {
  std::unique_ptr<float[]> memory;
  std::vector<Head> heads;
  float *keys, *values;
  Scratch(int64_t kv_heads, int64_t head_dim)
      : memory(new float[(kv_heads * 2 * PANEL + 2 * TILE) * head_dim]), heads(kv_heads) {
    float* next = memory.get();
    for (Head& head : heads) {
      head.queries = next;
      head.output = next + PANEL * head_dim;
      next += 2 * PANEL * head_dim;
    }
    keys = next;
    values = next + TILE * head_dim;
  }
};

// scores[key][query] for `count` keys; the tail is computed for repeated keys and ignored. On the way it asks for the
// keys and values of the next tile, a few cache lines at a time: they are short runs in scattered blocks, which the
// processor does not foresee, and asking for all at once would stall like reading them.
template <int VECTORS, typename Kv>
void score_tile(const float* queries, const float* const* keys, int count, int64_t head_dim, const Kv* const* ahead,
                int64_t head_offset, int64_t value_offset, float* scores) {
  // With one vector a query takes four dimensions at a time: eight pointers do not fit the registers beside the sums,
  // so each is fetched once per four multiply-adds.
  constexpr int KEYS = VECTORS == 1 ? 8 : MAX_ACCUMULATORS / VECTORS;
  constexpr int DIMS = VECTORS == 1 ? 4 : 2;
  constexpr int WIDTH = VECTORS * LANES;
  constexpr int64_t CACHE_LINE = 64 / sizeof(Kv);
  for (int key = 0; key < count; key += KEYS) {
    Vec sums[KEYS][VECTORS] = {};
    const float* rows[KEYS];
    for (int i = 0; i < KEYS; ++i) rows[i] = keys[std::min(key + i, count - 1)];
    for (int64_t d = 0; d < head_dim; d += DIMS) {
      if (d % CACHE_LINE == 0)
        for (int i = 0; i < KEYS; ++i) __builtin_prefetch(ahead[key + i] + head_offset + d);
      if (d % CACHE_LINE == CACHE_LINE / 2)
        for (int i = 0; i < KEYS; ++i) __builtin_prefetch(ahead[key + i] + head_offset + value_offset + d);
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

// Where the keys of the panel's first head at positions from `start` on are; past the last one it is repeated.
template <typename Kv>
void find_keys(const Attention& a, const Kv* pool, const Panel& panel, int64_t start, int64_t count, const Kv** keys) {
  const int64_t* block = a.tables + panel.sequence * a.table_stride + start / a.block_size;
  int64_t slot = start % a.block_size;
  for (int64_t i = 0; i < TILE_PADDED; ++i) {
    keys[i] = pool + *block * a.block_stride + (slot * a.kv_heads + panel.first_head) * a.head_dim;
    if (i + 1 < count && ++slot == a.block_size) {
      slot = 0;
      ++block;
    }
  }
}

// float32 keys and values are read where they are; bfloat16 ones are widened into the scratch first.
template <typename Kv>
void widen_tile(const Attention& a, const Kv* const* found, int count, int64_t offset, Scratch& scratch,
                const float** keys, const float** values) {
  for (int i = 0; i < count; ++i) {
    const Kv* key = found[i] + offset;
    if constexpr (std::is_same_v<Kv, float>) {
      keys[i] = key;
      values[i] = key + a.value_offset;
    } else {
      float* wide_key = scratch.keys + i * a.head_dim;
      float* wide_value = scratch.values + i * a.head_dim;
      for (int64_t d = 0; d < a.head_dim; d += LANES) {
        store(wide_key + d, load(key + d));
        store(wide_value + d, load(key + a.value_offset + d));
      }
      keys[i] = wide_key;
      values[i] = wide_value;
    }
  }
}

// Where the row's query (or output) of KV head `head` stands: the offset in its matrix.
int64_t find_row(const Attention& a, const Panel& panel, int64_t row, int64_t head, int64_t stride) {
  return (a.query_starts[panel.sequence] + row / a.group) * stride + (head * a.group + row % a.group) * a.head_dim;
}

template <int WIDTH>
void begin_head(const Attention& a, const Panel& panel, int64_t index, Head& head) {
  for (int64_t i = 0; i < WIDTH; ++i) {
    const int64_t row = panel.first_row + std::min<int64_t>(i, panel.rows - 1);  // spare lanes repeat the last row
    const float* query = a.queries + find_row(a, panel, row, panel.first_head + index, a.query_stride);
    for (int64_t d = 0; d < a.head_dim; ++d) head.queries[d * WIDTH + i] = query[d] * a.scaling;
    head.maxima[i] = MINUS_INFINITY;
    head.totals[i] = 0.0f;
  }
  std::fill(head.output, head.output + panel.rows * a.head_dim, 0.0f);
}

void finish_head(const Attention& a, const Panel& panel, int64_t index, const Head& head) {
  for (int64_t i = 0; i < panel.rows; ++i) {
    float* out = a.out + find_row(a, panel, panel.first_row + i, panel.first_head + index, a.out_stride);
    const float inverse = 1.0f / head.totals[i];
    for (int64_t d = 0; d < a.head_dim; ++d) out[d] = head.output[i * a.head_dim + d] * inverse;
  }
}

template <int VECTORS, typename Kv>
void attend_panel(const Attention& a, const Kv* pool, const Panel& panel, Scratch& scratch) {
  constexpr int WIDTH = VECTORS * LANES;
  constexpr int ROWS = MAX_ACCUMULATORS / PANEL_VECTORS;
  alignas(64) float scores[TILE_PADDED * WIDTH];
  alignas(64) float decay[WIDTH];
  alignas(64) int32_t limits[WIDTH];  // the last position each row may look at
  const float *keys[TILE], *values[TILE];
  const Kv *found[TILE_PADDED], *ahead[TILE_PADDED];
  const int64_t num_new = a.query_starts[panel.sequence + 1] - a.query_starts[panel.sequence];
  for (int64_t i = 0; i < WIDTH; ++i) {
    const int64_t row = panel.first_row + std::min<int64_t>(i, panel.rows - 1);
    limits[i] = static_cast<int32_t>(a.contexts[panel.sequence] - num_new + row / a.group);
  }
  for (int64_t h = 0; h < panel.heads; ++h) begin_head<WIDTH>(a, panel, h, scratch.heads[h]);

  const int64_t stop = limits[panel.rows - 1] + 1;  // keys from here on are nobody's: they may not even be written
  find_keys(a, pool, panel, 0, std::min<int64_t>(TILE, stop), ahead);
  for (int64_t start = 0; start < stop; start += TILE) {
    const int count = static_cast<int>(std::min<int64_t>(TILE, stop - start));
    const bool masked = start + count - 1 > limits[0];
    std::copy(ahead, ahead + TILE_PADDED, found);
    if (start + TILE < stop) find_keys(a, pool, panel, start + TILE, std::min<int64_t>(TILE, stop - start - TILE), ahead);
    for (int64_t h = 0; h < panel.heads; ++h) {
      Head& head = scratch.heads[h];
      widen_tile(a, found, count, h * a.head_dim, scratch, keys, values);
      score_tile<VECTORS>(head.queries, keys, count, a.head_dim, ahead, h * a.head_dim, a.value_offset, scores);
      soften_tile<VECTORS>(scores, start, count, limits, masked, head.maxima, head.totals, decay);
      for (int64_t row = 0; row < panel.rows; row += ROWS)
        add_values_to<ROWS>(std::min<int64_t>(ROWS, panel.rows - row), scores + row, WIDTH, values, count, decay + row,
                            head.output + row * a.head_dim, a.head_dim);
    }
  }
  for (int64_t h = 0; h < panel.heads; ++h) finish_head(a, panel, h, scratch.heads[h]);
}

// A decoding sequence's heads stay together, so that its blocks are read from memory in one go; unless that leaves
// threads without work. In a prefill the keys come from a cache, and one head's fit a nearer one.
std::vector<Panel> cut_into_panels(const Attention& a, int threads) {
  std::vector<Panel> panels;
  for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
    const int64_t rows = (a.query_starts[sequence + 1] - a.query_starts[sequence]) * a.group;
    const int64_t heads = rows <= PANEL && a.sequences >= 2 * threads ? a.kv_heads : 1;
    // The last rows have the most keys: they go first, so that no thread is left with a long one at the end.
    for (int64_t row = (rows - 1) / PANEL * PANEL; row >= 0; row -= PANEL)
      for (int64_t head = 0; head < a.kv_heads; head += heads)
        panels.push_back({sequence, row, std::min<int64_t>(PANEL, rows - row), head, heads});
  }
  return panels;
}

template <typename Kv>
void attend(const Attention& a, const Kv* pool, int threads) {
  const std::vector<Panel> panels = cut_into_panels(a, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(a.kv_heads, a.head_dim);
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
