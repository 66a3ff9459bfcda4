// out = x W^T (+ bias) (+ out) in float32, with float32 or bfloat16 weights.
//
// The weights are packed into panels of 16 outputs, [panels][inputs][16], so that the inner loop reads them in order:
// with few rows the product costs one pass over the weights at memory speed, with many the multiply-adds themselves.
// Every output is one chain of multiply-adds over the inputs in their order, whatever the number of rows or threads:
// a token's result does not depend on what it is batched with. (Goto & van de Geijn 2008 is the blocking.)

#include <algorithm>
#include <type_traits>

#include "native_vector.h"

namespace {

constexpr int MAX_ROWS = MAX_ACCUMULATORS / PANEL_VECTORS;  // rows of x in one register tile
constexpr int64_t INPUT_BLOCK = 256;                        // 256 x 16 weights: 16 KB, half of an L1 cache
constexpr int64_t ROW_BLOCK = 96;                           // 96 x 256 inputs: 96 KB, within an L2 cache
constexpr int64_t WIDEN_TILES = 3;                          // above this, bfloat16 is widened once for all tiles
constexpr int64_t WIDE_PANELS = 4;                          // panels side by side when there are few rows

struct Product {
  const float* x;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
  const float* bias;  // padded to whole panels, or null
  bool accumulate;
  int64_t inputs;
  int64_t outputs;  // a multiple of PANEL
};

// ROWS x (PANELS * 16) outputs over the inputs [first, last): the accumulators stay in registers. On the way it asks
// for the memory from `ahead` on, `ahead_step` bytes an input.
template <int ROWS, int PANELS, typename Weight>
NOINLINE void multiply_tile(const Product& product, const Weight* weights, int64_t panel_stride, int64_t row,
                            int64_t output, int64_t first, int64_t last, const char* ahead, int64_t ahead_step) {
  Vec sums[ROWS][PANELS * PANEL_VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS * PANEL_VECTORS; ++j) {
      const int64_t column = output + j * LANES;
      const bool started = first > 0 || product.accumulate;
      sums[i][j] = started ? load(product.out + (row + i) * product.out_stride + column) : Vec{};
      if (first == 0 && product.bias) sums[i][j] += load(product.bias + column);
    }
  const float* x = product.x + row * product.x_stride;
  for (int64_t k = first; k < last; ++k) {
    if (PANELS == 1) __builtin_prefetch(ahead + (k - first) * ahead_step, 0, 2);
    Vec weight[PANELS * PANEL_VECTORS];
    for (int p = 0; p < PANELS; ++p)
      for (int j = 0; j < PANEL_VECTORS; ++j)
        weight[p * PANEL_VECTORS + j] = load(weights + p * panel_stride + (k - first) * PANEL + j * LANES);
    for (int i = 0; i < ROWS; ++i) {
      Vec value = broadcast(x[i * product.x_stride + k]);
      for (int j = 0; j < PANELS * PANEL_VECTORS; ++j) sums[i][j] += value * weight[j];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS * PANEL_VECTORS; ++j)
      store(product.out + (row + i) * product.out_stride + output + j * LANES, sums[i][j]);
}

template <int ROWS, typename Weight>
void multiply_rows(int64_t rows, const Product& product, const Weight* weights, int64_t row, int64_t output,
                   int64_t first, int64_t last, const char* ahead, int64_t ahead_step) {
  if (rows == ROWS)
    multiply_tile<ROWS, 1>(product, weights, 0, row, output, first, last, ahead, ahead_step);
  else if constexpr (ROWS > 1)
    multiply_rows<ROWS - 1>(rows, product, weights, row, output, first, last, ahead, ahead_step);
}

// One panel for some rows: a block of its weights stays in the L1 cache while the rows go past it.
template <typename Weight>
void multiply_panel(const Product& product, const Weight* weights, int64_t panel, int64_t row_start, int64_t row_stop) {
  // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 and then 2 that cannot keep the units busy.
  const int64_t tiles = (row_stop - row_start + MAX_ROWS - 1) / MAX_ROWS;
  const bool widen_first = !std::is_same_v<Weight, float> && tiles > WIDEN_TILES;
  for (int64_t first = 0; first < product.inputs; first += INPUT_BLOCK) {
    const int64_t last = std::min(first + INPUT_BLOCK, product.inputs);
    const Weight* block = weights + (panel * product.inputs + first) * PANEL;
    alignas(64) float widened[INPUT_BLOCK * PANEL];
    if (widen_first)
      for (int64_t i = 0; i < (last - first) * PANEL; i += LANES) store(widened + i, load(block + i));
    // While the tiles use this block, each fetches its share of the next one into the L2 cache, evenly: the processor
    // drops prefetches that come faster than memory answers.
    const int64_t block_bytes = INPUT_BLOCK * PANEL * sizeof(Weight);
    const int64_t ahead_step = block_bytes / INPUT_BLOCK / tiles;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const char* ahead = reinterpret_cast<const char*>(block) + block_bytes + block_bytes * tile / tiles;
      const int64_t row = row_start + (row_stop - row_start) * tile / tiles;
      const int64_t rows = row_start + (row_stop - row_start) * (tile + 1) / tiles - row;
      if (widen_first)
        multiply_rows<MAX_ROWS>(rows, product, widened, row, panel * PANEL, first, last, ahead, ahead_step);
      else
        multiply_rows<MAX_ROWS>(rows, product, block, row, panel * PANEL, first, last, ahead, ahead_step);
    }
  }
}

// One or two rows: several panels side by side, each read once from memory; more streams hide more latency.
template <int ROWS, typename Weight>
void multiply_few(const Product& product, const Weight* weights, int64_t panel, int64_t stop) {
  constexpr int WIDE = ROWS == 1 ? WIDE_PANELS : 2;
  const int64_t panel_stride = product.inputs * PANEL;
  for (; panel + WIDE <= stop; panel += WIDE)
    multiply_tile<ROWS, WIDE>(product, weights + panel * panel_stride, panel_stride, 0, panel * PANEL, 0,
                              product.inputs, nullptr, 0);
  for (; panel < stop; ++panel)
    multiply_tile<ROWS, 1>(product, weights + panel * panel_stride, 0, 0, panel * PANEL, 0, product.inputs, nullptr, 0);
}

template <typename Weight>
void multiply_group(const Product& product, const Weight* weights, int64_t rows, int64_t panel, int64_t stop) {
  if (rows == 1) return multiply_few<1>(product, weights, panel, stop);
  if (rows == 2) return multiply_few<2>(product, weights, panel, stop);
  for (int64_t row = 0; row < rows; row += ROW_BLOCK)
    for (int64_t next = panel; next < stop; ++next)
      multiply_panel(product, weights, next, row, std::min(row + ROW_BLOCK, rows));
}

template <typename Weight>
void multiply(const Product& product, const Weight* weights, int64_t rows, int threads) {
  const int64_t panels = product.outputs / PANEL;
  const int64_t group = std::clamp<int64_t>(panels / (threads * 4), WIDE_PANELS, 32);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < panels; start += group)
    multiply_group(product, weights, rows, start, std::min(start + group, panels));
}

template <typename Weight>
void pack(const Weight* weights, int64_t outputs, int64_t inputs, Weight* packed, int threads) {
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t k = 0; k < inputs; ++k)
      for (int64_t j = 0; j < PANEL; ++j) {
        const int64_t output = panel * PANEL + j;
        packed[(panel * inputs + k) * PANEL + j] = output < outputs ? weights[output * inputs + k] : Weight{};
      }
}

}  // namespace

extern "C" {

// weights [outputs, inputs] -> packed [ceil(outputs / 16), inputs, 16], padded with zeros.
void ampd_pack(const void* weights, int64_t outputs, int64_t inputs, void* packed, int is_bf16, int threads) {
  if (is_bf16)
    pack(static_cast<const Bf16*>(weights), outputs, inputs, static_cast<Bf16*>(packed), threads);
  else
    pack(static_cast<const float*>(weights), outputs, inputs, static_cast<float*>(packed), threads);
}

// out [rows, outputs] (row stride out_stride) from x [rows, inputs]; outputs is padded to a multiple of 16.
void ampd_linear(const float* x, int64_t x_stride, int64_t rows, const void* packed, int is_bf16, const float* bias,
                 int64_t inputs, int64_t outputs, float* out, int64_t out_stride, int accumulate, int threads) {
  const Product product{x, x_stride, out, out_stride, bias, accumulate != 0, inputs, outputs};
  if (is_bf16)
    multiply(product, static_cast<const Bf16*>(packed), rows, threads);
  else
    multiply(product, static_cast<const float*>(packed), rows, threads);
}
}
