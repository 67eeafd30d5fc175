// Weights as the kernels read them: panels of 32 outputs, inputs one after another in groups of 32.
//
// A panel holds, input by input (float32), pair by pair (bfloat16) or four by four (int8, int4), the
// weights of its 32 outputs side by side, so that a kernel reads it from one end to the other. With
// integers, each group of 32 inputs ends with the 32 scales and the 32 minimums of its outputs, in half
// precision: weight = scale * integer + minimum. An int4 byte holds the inputs of two fours, the later
// one in the high half. Inputs and outputs are filled up with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace puna {

enum class Format : std::int32_t { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };

constexpr int panel_outputs = 32;
constexpr int group_inputs = 32;

constexpr int divided_up(int amount, int size) { return (amount + size - 1) / size; }
constexpr int rounded_up(int amount, int size) { return divided_up(amount, size) * size; }

// Bytes of one group of a panel without its scales and minimums.
constexpr std::size_t weights_of_group(Format format) {
  constexpr std::size_t count = panel_outputs * group_inputs;
  return format == Format::float32 ? 4 * count
         : format == Format::bfloat16 ? 2 * count
         : format == Format::int8 ? count
                                  : count / 2;
}
constexpr bool has_scales(Format format) { return format == Format::int8 || format == Format::int4; }
constexpr std::size_t group_bytes(Format format) {
  return weights_of_group(format) + (has_scales(format) ? 2 * 2 * panel_outputs : 0);
}

struct Matrix {
  Format format = Format::float32;
  int outputs = 0;
  int inputs = 0;
  std::uint8_t* data = nullptr;
  float* bias = nullptr;  // one number an output, filled up with zeros; or null
  int terms = 0;          // of gates and ups: SiLUs in the series on the gate; 0: one, plain
  float* series = nullptr;  // [terms, 2, channels]: scales, then shifts, channels filled up to panels of 16 with zeros

  int panels() const { return divided_up(outputs, panel_outputs); }
  int groups() const { return divided_up(inputs, group_inputs); }
  int padded_outputs() const { return panels() * panel_outputs; }
  int padded_inputs() const { return groups() * group_inputs; }
  int series_numbers() const { return terms * padded_outputs(); }
  std::size_t panel_bytes() const { return groups() * group_bytes(format); }
  std::size_t bytes() const { return panels() * panel_bytes(); }
};

// Writes rows [count, inputs] as the outputs from `first` on. With integers, scales and minimums [count, groups] say
// what grid they lie on; null: the finest that holds each group.
void pack(const Matrix& matrix, int first, int count, const float* rows, const float* scales, const float* minimums,
          int threads);

// The weights of one output as float32, padded_inputs of them: an embedding out of a tied head.
void unpack(const Matrix& matrix, int output, float* row);

// Activations of one row as a kernel of `format` reads them. With integers: the numbers as int8, then for
// each group of 32 its scale, then for each group scale times the sum of its integers, which meets the minimums.
std::size_t activation_bytes(Format format, int groups);
void prepare(Format format, int groups, const float* row, std::uint8_t* target);

// What becomes of a tile of products.
enum class Finish {
  store,  // target = products + bias
  add,    // target = target + (products + bias)
  gate,   // target = silu(gate) * up, or the series in place of the silu; a panel holds 16 gates and their 16 ups
};

struct Product {
  const Matrix* matrix;
  const std::uint8_t* rows;  // prepared activations
  std::size_t row_stride;    // bytes
  int count;                 // rows
  Finish finish;
  float* target;
  std::size_t target_stride;  // numbers
  int target_outputs;         // numbers a row of the target has room for
};

// The outputs of panels first to last - 1, for all rows.
void multiply(const Product& product, int first, int last);

}  // namespace puna
