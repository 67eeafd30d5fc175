#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

namespace puna {
namespace {

// Dimension i turns with dimension i + head_dim / 2.
void rotate(const float* head, const Rope& rope, int position, int head_dim, float* target) {
  const int pairs = head_dim / 2;
  const float* cosines = rope.cosines + static_cast<std::size_t>(position) * pairs;
  const float* sines = rope.sines + static_cast<std::size_t>(position) * pairs;
  for (int i = 0; i < pairs; i++) {
    target[i] = head[i] * cosines[i] - head[i + pairs] * sines[i];
    target[i + pairs] = head[i + pairs] * cosines[i] + head[i] * sines[i];
  }
}

void store_words(Stored stored, const float* numbers, int count, std::uint8_t* target) {
  for (int i = 0; i < count; i += lanes) {
    if (stored == Stored::float32)
      store(target + 4 * i, load(numbers + i));
    else
      store_bfloat16(reinterpret_cast<std::uint16_t*>(target) + i, load(numbers + i));
  }
}

// One token's key into its column of the block.
void store_key(Stored stored, const float* key, int padded, int slot, std::uint8_t* block) {
  std::uint32_t words[most_head_dim];
  store_words(stored, key, padded, reinterpret_cast<std::uint8_t*>(words));
  std::uint32_t* target = reinterpret_cast<std::uint32_t*>(block) + slot;
  for (int i = 0; i < padded / numbers_in_word(stored); i++) target[i * block_tokens] = words[i];
}

void store_value(Stored stored, const float* value, int padded, int slot, std::uint8_t* block) {
  if (stored == Stored::float32) {
    store_words(stored, value, padded, block + static_cast<std::size_t>(slot) * padded * 4);
    return;
  }
  std::uint16_t halves[most_head_dim];
  store_words(stored, value, padded, reinterpret_cast<std::uint8_t*>(halves));
  std::uint16_t* target = reinterpret_cast<std::uint16_t*>(block) + static_cast<std::size_t>(slot / 2) * padded * 2;
  for (int i = 0; i < padded; i++) target[2 * i + slot % 2] = halves[i];
}

// 1 - erf(x) for x of at least 0, within 1.5e-7: formula 7.1.26 of Abramowitz and Stegun.
Floats tail(Floats x) {
  const Floats t = broadcast(1.0f) / fused(broadcast(0.3275911f), x, broadcast(1.0f));
  Floats sum = broadcast(1.061405429f);
  for (const float next : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = fused(sum, t, broadcast(next));
  return sum * t * exp2(x * x * broadcast(-1.44269504f));
}

}  // namespace

void normalise(const float* row, const float* weight, int count, int padded, float epsilon, float* target) {
  Floats squares = broadcast(0.0f);
  for (int i = 0; i < padded; i += lanes) squares = fused(load(row + i), load(row + i), squares);
  const Floats inverse = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + epsilon));
  for (int i = 0; i < padded; i += lanes) store(target + i, load(row + i) * inverse * load(weight + i));
}

void gelu(const float* row, int count, float* target) {
  for (int i = 0; i < count; i += lanes) {
    const Floats x = load(row + i), size = magnitude(x) * broadcast(0.70710678f);
    store(target + i, broadcast(0.5f) * (x + magnitude(x) * (broadcast(1.0f) - tail(size))));
  }
}

float cosine(const float* a, const float* b, int padded) {
  Floats product = broadcast(0.0f), first = product, second = product;
  for (int i = 0; i < padded; i += lanes) {
    const Floats x = load(a + i), y = load(b + i);
    product = fused(x, y, product);
    first = fused(x, x, first);
    second = fused(y, y, second);
  }
  return sum(product) / std::max(std::sqrt(sum(first)) * std::sqrt(sum(second)), 1e-8f);
}

void rotate_and_store(const Storing& storing, const Run& run, int kv_head) {
  const Model& model = *storing.model;
  const Layer& layer = *storing.layer;
  const int dim = layer.head_dim, padded = layer.padded_dim(), group = layer.group();
  const Rope& rope = model.ropes[layer.rope];
  const Row& first = storing.rows[run.first_row];
  const int number = storing.reads[first.read].tables[layer.table][first.position / block_tokens];
  std::uint8_t* keys = model.block(layer, kv_head, number);
  std::uint8_t* values = keys + model.half_block_bytes(layer);
  // A fresh block may hold anything, even NaN, which a weight of zero would not silence.
  if (first.position % block_tokens == 0) std::memset(keys, 0, 2 * model.half_block_bytes(layer));
  const std::size_t query_bytes = static_cast<std::size_t>(padded) * 4 / numbers_in_word(model.stored);
  float turned[most_head_dim];
  std::memset(turned + dim, 0, sizeof(float) * (padded - dim));
  for (int row = run.first_row; row < run.last_row; row++) {
    const int position = storing.rows[row].position, slot = position % block_tokens;
    const float* projected = storing.projected + row * storing.stride;
    for (int member = 0; member < group; member++) {
      const int head = kv_head * group + member;
      const std::size_t query = (static_cast<std::size_t>(kv_head) * storing.row_count + row) * group + member;
      rotate(projected + head * dim, rope, position, dim, turned);
      store_words(model.stored, turned, padded, storing.queries + query * query_bytes);
    }
    rotate(projected + (layer.heads + kv_head) * dim, rope, position, dim, turned);
    store_key(model.stored, turned, padded, slot, keys);
    std::memcpy(turned, projected + (layer.heads + layer.kv_heads + kv_head) * dim, sizeof(float) * dim);
    store_value(model.stored, turned, padded, slot, values);
  }
}

}  // namespace puna
