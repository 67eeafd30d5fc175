// What happens to single rows between the products: norm, rotation, storing.
#pragma once

#include "attention.h"
#include "model.h"

namespace puna {

// target = row / sqrt(mean of squares + epsilon) * weight; `padded` numbers, zero beyond `count`.
void normalise(const float* row, const float* weight, int count, int padded, float epsilon, float* target);

// target = row * (1 + erf(row / sqrt(2))) / 2, of `count` numbers and those that fill up its last sixteen.
void gelu(const float* row, int count, float* target);

// Cosine between two rows of `padded` numbers.
float cosine(const float* a, const float* b, int padded);

// Tokens of one read that lie in one block of its text.
struct Run {
  int first_row, last_row;
};

struct Storing {
  const Model* model;
  const Layer* layer;
  const Row* rows;
  const Read* reads;
  int row_count;
  const float* projected;  // [rows, stride]: queries, keys, values
  std::size_t stride;
  std::uint8_t* queries;  // as Attention has them
};

// Rotates the queries and keys of a run for one key-value head; stores its keys and values.
void rotate_and_store(const Storing& storing, const Run& run, int kv_head);

}  // namespace puna
