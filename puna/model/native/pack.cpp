// Between rows of float32 and the layouts of matrix.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "matrix.h"
#include "pool.h"
#include "vectors.h"

namespace puna {
namespace {

// The weights of one output and one group: 32-bit words, 128 bytes apart, that hold one, two, four or eight weights.
constexpr int most_words = group_inputs;
constexpr std::size_t word_stride = panel_outputs * 4;
constexpr int words_of(Format format) { return static_cast<int>(weights_of_group(format) / word_stride); }

struct Place {
  std::uint8_t* words;
  std::uint16_t* scale;  // the minimum is panel_outputs further
};

Place place_of(const Matrix& matrix, int output, int group) {
  const int lane = output % panel_outputs;
  std::uint8_t* panel = matrix.data + output / panel_outputs * matrix.panel_bytes();
  std::uint8_t* start = panel + group * group_bytes(matrix.format);
  return {start + 4 * lane, reinterpret_cast<std::uint16_t*>(start + weights_of_group(matrix.format)) + lane};
}

// Half precision, rounded to nearest even. The product moves the exponent to where its bits are those of a half.
std::uint16_t to_half(float number) {
  constexpr float two_to_minus_112 = 1.92592994438723585305597794258492732e-34f;
  const float size = std::min(std::fabs(number), 65504.0f) * two_to_minus_112;
  std::uint32_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) >> 13;
  return static_cast<std::uint16_t>(bits | (std::signbit(number) ? 0x8000 : 0));
}

float from_half(std::uint16_t half) {
  constexpr float two_to_112 = 5192296858534827628530496329220096.0f;
  const std::uint32_t bits = static_cast<std::uint32_t>(half & 0x7fff) << 13;
  float size;
  std::memcpy(&size, &bits, sizeof size);
  size *= two_to_112;
  return half & 0x8000 ? -size : size;
}

// What the weights of a group are multiples above: given, or made of the smallest and largest weight. Weights on
// their own grid come out unchanged if it is given, or if they reach both its ends.
struct Grid {
  float scale, minimum;
};

Grid grid_of(Format format, const float* weights, int count) {
  const int steps = format == Format::int8 ? 255 : 15;
  const float low = *std::min_element(weights, weights + count);
  const float high = *std::max_element(weights, weights + count);
  return {(high - low) / steps, low};
}

void quantise(Format format, Place place, Grid grid, const float* weights, int count, std::uint32_t* words) {
  const int steps = format == Format::int8 ? 255 : 15;
  place.scale[0] = to_half(grid.scale);
  place.scale[panel_outputs] = to_half(grid.minimum);
  const float scale = from_half(place.scale[0]), minimum = from_half(place.scale[panel_outputs]);
  for (int i = 0; i < count; i++) {
    const float exact = scale > 0 ? (weights[i] - minimum) / scale : 0.0f;
    const auto level = static_cast<std::uint32_t>(std::nearbyint(std::clamp(exact, 0.0f, static_cast<float>(steps))));
    if (format == Format::int8)
      words[i / 4] |= level << (i % 4 * 8);
    else
      words[i / 8] |= level << (i % 4 * 8 + i % 8 / 4 * 4);
  }
}

void pack_group(const Matrix& matrix, int output, int group, const float* weights, int count, const Grid* given) {
  const Place place = place_of(matrix, output, group);
  std::uint32_t words[most_words] = {};
  if (matrix.format == Format::float32)
    std::memcpy(words, weights, sizeof(float) * count);
  else if (matrix.format == Format::bfloat16)
    for (int i = 0; i < count; i++) words[i / 2] |= static_cast<std::uint32_t>(to_bfloat16(weights[i])) << (i % 2 * 16);
  else
    quantise(matrix.format, place, given ? *given : grid_of(matrix.format, weights, count), weights, count, words);
  for (int i = 0; i < words_of(matrix.format); i++) std::memcpy(place.words + i * word_stride, words + i, 4);
}

void unpack_group(const Matrix& matrix, int output, int group, float* weights) {
  const Place place = place_of(matrix, output, group);
  std::uint32_t words[most_words];
  for (int i = 0; i < words_of(matrix.format); i++) std::memcpy(words + i, place.words + i * word_stride, 4);
  if (matrix.format == Format::float32) {
    std::memcpy(weights, words, sizeof(float) * group_inputs);
  } else if (matrix.format == Format::bfloat16) {
    for (int i = 0; i < group_inputs; i++)
      weights[i] = from_bfloat16(static_cast<std::uint16_t>(words[i / 2] >> (i % 2 * 16)));
  } else {
    const float scale = from_half(place.scale[0]), minimum = from_half(place.scale[panel_outputs]);
    for (int i = 0; i < group_inputs; i++) {
      const bool whole = matrix.format == Format::int8;
      const std::uint32_t level = whole ? words[i / 4] >> (i % 4 * 8) & 255 : words[i / 8] >> (i % 4 * 8 + i % 8 / 4 * 4) & 15;
      weights[i] = static_cast<float>(level) * scale + minimum;
    }
  }
}

struct Packing {
  const Matrix* matrix;
  int first, count, threads;
  const float* rows;
  const float* scales;    // [count, groups], or null
  const float* minimums;  // the same
};

void pack_share(void* argument, int thread) {
  const Packing& packing = *static_cast<Packing*>(argument);
  const Matrix& matrix = *packing.matrix;
  const long count = packing.count;
  for (long row = count * thread / packing.threads; row < count * (thread + 1) / packing.threads; row++)
    for (int group = 0; group < matrix.groups(); group++) {
      const int start = group * group_inputs;
      const float* weights = packing.rows + row * matrix.inputs + start;
      const int numbers = std::min(group_inputs, matrix.inputs - start);
      const long at = row * matrix.groups() + group;
      Grid given{};
      if (packing.scales) given = {packing.scales[at], packing.minimums[at]};
      pack_group(matrix, packing.first + static_cast<int>(row), group, weights, numbers, packing.scales ? &given : nullptr);
    }
}

void prepare_integers(int groups, const float* row, std::uint8_t* target) {
  std::int8_t* integers = reinterpret_cast<std::int8_t*>(target);
  float* scales = reinterpret_cast<float*>(target + groups * group_inputs);
  float* sums = scales + groups;
  for (int group = 0; group < groups; group++) {
    const Floats a = load(row + group * group_inputs), b = load(row + group * group_inputs + lanes);
    const float most = maximum(largest(magnitude(a), magnitude(b)));
    const float scale = most / 127.0f;
    const Floats inverse = broadcast(most > 0 ? 127.0f / most : 0.0f);
    const Ints left = nearest(a * inverse), right = nearest(b * inverse);
    store_bytes(integers + group * group_inputs, left);
    store_bytes(integers + group * group_inputs + lanes, right);
    scales[group] = scale;
    sums[group] = scale * sum(to_floats(left) + to_floats(right));
  }
}

}  // namespace

void pack(const Matrix& matrix, int first, int count, const float* rows, const float* scales, const float* minimums,
          int threads) {
  Packing packing{&matrix, first, count, threads, rows, scales, minimums};
  Pool::shared().run(threads, pack_share, &packing);
}

void unpack(const Matrix& matrix, int output, float* row) {
  for (int group = 0; group < matrix.groups(); group++)
    unpack_group(matrix, output, group, row + group * group_inputs);
}

std::size_t activation_bytes(Format format, int groups) {
  const std::size_t count = static_cast<std::size_t>(groups) * group_inputs;
  const std::size_t bytes = format == Format::float32 ? 4 * count
                            : format == Format::bfloat16 ? 2 * count
                                                         : count + 8 * static_cast<std::size_t>(groups);
  return (bytes + 63) / 64 * 64;
}

void prepare(Format format, int groups, const float* row, std::uint8_t* target) {
  const int count = groups * group_inputs;
  if (format == Format::float32) {
    std::memcpy(target, row, sizeof(float) * count);
  } else if (format == Format::bfloat16) {
    std::uint16_t* halves = reinterpret_cast<std::uint16_t*>(target);
    for (int i = 0; i < count; i += lanes) store_bfloat16(halves + i, load(row + i));
  } else {
    prepare_integers(groups, row, target);
  }
}

}  // namespace puna
