// Products of weights with rows of activations.
//
// A kernel takes one panel and a few rows. For every output it sums over the inputs from first to last, whatever
// the number of rows, so a row's result does not depend on the rows beside it. Several rows share each loaded
// weight; the sums stay in registers.
#include <cmath>
#include <cstring>

#include "matrix.h"
#include "vectors.h"

namespace puna {
namespace {

constexpr std::size_t ahead = 4096;  // bytes of weights that are fetched before they are needed

// Starts of rows; every third is kept and the two after it are reached through the stride, which spares registers.
template <int rows>
struct Rows {
  const std::uint8_t* third[(rows + 2) / 3];
  std::size_t stride;

  PUNA_INLINE Rows(const std::uint8_t* first, std::size_t stride) : stride(stride) {
    for (int i = 0; i < (rows + 2) / 3; i++) third[i] = first + 3 * i * stride;
  }
  PUNA_INLINE const std::uint8_t* operator[](int row) const { return third[row / 3] + row % 3 * stride; }
  PUNA_INLINE void advance(std::size_t bytes) {
    for (int i = 0; i < (rows + 2) / 3; i++) third[i] += bytes;
  }
};

template <std::size_t bytes>
PUNA_INLINE void fetch(const std::uint8_t* weights) {
#pragma GCC unroll 32
  for (std::size_t line = 0; line < bytes; line += 64) __builtin_prefetch(weights + ahead + line);
}

template <int rows>
PUNA_INLINE void store_tile(float* tile, const Floats (&total)[rows][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) {
    store(tile + r * panel_outputs, total[r][0]);
    store(tile + r * panel_outputs + lanes, total[r][1]);
  }
}

template <int rows>
void multiply_float32(const std::uint8_t* panel, int groups, const std::uint8_t* first, std::size_t stride,
                      float* tile) {
  Floats total[rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = broadcast(0.0f);
  Rows<rows> row(first, stride);
  for (int k = 0; k < groups * group_inputs; k++, panel += 128, row.advance(4)) {
    fetch<128>(panel);
    const Floats a = load(panel), b = load(panel + 64);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      float number;
      std::memcpy(&number, row[r], 4);
      const Floats x = broadcast(number);
      total[r][0] = fused(a, x, total[r][0]);
      total[r][1] = fused(b, x, total[r][1]);
    }
  }
  store_tile<rows>(tile, total);
}

template <int rows>
void multiply_bfloat16(const std::uint8_t* panel, int groups, const std::uint8_t* first, std::size_t stride,
                       float* tile) {
  Floats total[rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = broadcast(0.0f);
  Rows<rows> row(first, stride);
  for (int k = 0; k < groups * group_inputs / 2; k++, panel += 128, row.advance(4)) {
    fetch<128>(panel);
    const Ints a = load_ints(panel), b = load_ints(panel + 64);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      const Ints x = broadcast_word(row[r]);
      total[r][0] = dot_bfloat16(total[r][0], a, x);
      total[r][1] = dot_bfloat16(total[r][1], b, x);
    }
  }
  store_tile<rows>(tile, total);
}

// The integer dot products of one group are exact; then scale * dot + minimum * (sum of the activations).
template <int rows, bool four_bits>
void multiply_integers(const std::uint8_t* panel, int groups, const std::uint8_t* first, std::size_t stride,
                       float* tile) {
  constexpr Format format = four_bits ? Format::int4 : Format::int8;
  Floats total[rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = broadcast(0.0f);
  Rows<rows> row(first, stride);
  Rows<rows> scale(first + groups * group_inputs, stride);
  const std::size_t to_sum = 4 * static_cast<std::size_t>(groups);
  for (int group = 0; group < groups; group++, panel += group_bytes(format), scale.advance(4)) {
    fetch<group_bytes(format)>(panel);
    Ints dot[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) dot[r][0] = dot[r][1] = broadcast(0);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++, row.advance(8)) {
      Ints weights[2][2];  // [four][vector]
      for (int v = 0; v < 2; v++) {
        if (four_bits) {
          const Ints both = load_ints(panel + pair * 128 + v * 64);
          weights[0][v] = low_nibbles(both);
          weights[1][v] = high_nibbles(both);
        } else {
          weights[0][v] = load_ints(panel + pair * 256 + v * 64);
          weights[1][v] = load_ints(panel + pair * 256 + 128 + v * 64);
        }
      }
#pragma GCC unroll 2
      for (int four = 0; four < 2; four++)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
          const Ints x = broadcast_word(row[r] + 4 * four);
          dot[r][0] = dot_bytes(dot[r][0], weights[four][0], x);
          dot[r][1] = dot_bytes(dot[r][1], weights[four][1], x);
        }
    }
    const std::uint16_t* halves = reinterpret_cast<const std::uint16_t*>(panel + weights_of_group(format));
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const Floats scales = load_half(halves + v * lanes), minimums = load_half(halves + panel_outputs + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        float own, sum;
        std::memcpy(&own, scale[r], 4);
        std::memcpy(&sum, scale[r] + to_sum, 4);
        total[r][v] = fused(to_floats(dot[r][v]), scales * broadcast(own), total[r][v]);
        total[r][v] = fused(minimums, broadcast(sum), total[r][v]);
      }
    }
  }
  store_tile<rows>(tile, total);
}

using Kernel = void (*)(const std::uint8_t*, int, const std::uint8_t*, std::size_t, float*);

struct Choice {
  int rows;
  Kernel kernel;
};

// One for each number of rows: what is left over of a batch takes one pass over the panel, not two or three.
constexpr int most_rows = 12;
constexpr Choice float32_kernels[] = {
    {12, multiply_float32<12>}, {11, multiply_float32<11>}, {10, multiply_float32<10>}, {9, multiply_float32<9>},
    {8, multiply_float32<8>}, {7, multiply_float32<7>}, {6, multiply_float32<6>}, {5, multiply_float32<5>},
    {4, multiply_float32<4>}, {3, multiply_float32<3>}, {2, multiply_float32<2>}, {1, multiply_float32<1>}};
constexpr Choice bfloat16_kernels[] = {
    {12, multiply_bfloat16<12>}, {11, multiply_bfloat16<11>}, {10, multiply_bfloat16<10>}, {9, multiply_bfloat16<9>},
    {8, multiply_bfloat16<8>}, {7, multiply_bfloat16<7>}, {6, multiply_bfloat16<6>}, {5, multiply_bfloat16<5>},
    {4, multiply_bfloat16<4>}, {3, multiply_bfloat16<3>}, {2, multiply_bfloat16<2>}, {1, multiply_bfloat16<1>}};
template <bool four_bits>
constexpr Choice integer_kernels[] = {
    {6, multiply_integers<6, four_bits>}, {5, multiply_integers<5, four_bits>}, {4, multiply_integers<4, four_bits>},
    {3, multiply_integers<3, four_bits>}, {2, multiply_integers<2, four_bits>}, {1, multiply_integers<1, four_bits>}};

const Choice* kernels_of(Format format) {
  switch (format) {
    case Format::float32:
      return float32_kernels;
    case Format::bfloat16:
      return bfloat16_kernels;
    case Format::int8:
      return integer_kernels<false>;
    default:
      return integer_kernels<true>;
  }
}

PUNA_INLINE Floats silu(Floats a) {
  constexpr float minus_log2_e = -1.44269504f;
  return a / (broadcast(1.0f) + exp2(a * broadcast(minus_log2_e)));
}

// What the ups of a panel are multiplied with: silu(gate), or the sum of silu(scale * gate + shift) over the terms.
PUNA_INLINE Floats activated(const Matrix& matrix, int panel, Floats gate) {
  if (matrix.terms == 0) return silu(gate);
  const int channels = matrix.padded_outputs() / 2;
  Floats total = broadcast(0.0f);
  for (int term = 0; term < matrix.terms; term++) {
    const float* scales = matrix.series + term * 2 * channels + panel * lanes;
    const Floats one = silu(gate * load(scales) + load(scales + channels));
    total = term ? total + one : one;
  }
  return total;
}

void finish(const Product& product, int panel, int row, const float* tile) {
  const float* bias = product.matrix->bias ? product.matrix->bias + panel * panel_outputs : nullptr;
  Floats a = load(tile), b = load(tile + lanes);
  if (bias) {
    a = a + load(bias);
    b = b + load(bias + lanes);
  }
  float* target = product.target + row * product.target_stride;
  if (product.finish == Finish::gate) {
    store(target + panel * lanes, activated(*product.matrix, panel, a) * b);
    // Half a group may be left over in the row that a product will read.
    const int panels = product.matrix->panels();
    if (panel + 1 == panels && panels % 2) store(target + (panel + 1) * lanes, broadcast(0.0f));
    return;
  }
  target += panel * panel_outputs;
  if (product.finish == Finish::add) {
    a = load(target) + a;
    b = load(target + lanes) + b;
  }
  const int room = product.target_outputs - panel * panel_outputs;
  if (room >= panel_outputs) {
    store(target, a);
    store(target + lanes, b);
  } else {
    float both[panel_outputs];
    store(both, a);
    store(both + lanes, b);
    std::memcpy(target, both, sizeof(float) * room);
  }
}

}  // namespace

void multiply(const Product& product, int first, int last) {
  const Matrix& matrix = *product.matrix;
  const Choice* const choices = kernels_of(matrix.format);
  alignas(64) float tile[most_rows * panel_outputs];
  for (int panel = first; panel < last; panel++) {
    const std::uint8_t* weights = matrix.data + panel * matrix.panel_bytes();
    const Choice* choice = choices;
    for (int row = 0; row < product.count; row += choice->rows) {
      while (choice->rows > product.count - row) choice++;
      const std::uint8_t* rows = product.rows + row * product.row_stride;
      choice->kernel(weights, matrix.groups(), rows, product.row_stride, tile);
      for (int r = 0; r < choice->rows; r++) finish(product, panel, row + r, tile + r * panel_outputs);
    }
  }
}

}  // namespace puna
