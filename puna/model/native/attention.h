// Attention of rows of queries over the paged store.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "model.h"
#include "vectors.h"

namespace puna {

// Keys are taken span by span at absolute positions. Within a span the largest score is found first; spans are
// joined in their order. So a row's result does not depend on which rows, tokens or tasks it was computed with.
constexpr int span_tokens = 256;
constexpr int span_blocks = span_tokens / block_tokens;

// One token of the pass: which read it is of, its position in the text, and where its hidden state goes (-1: nowhere).
struct Row {
  int read;
  int position;
  int id;
  int output;
};

// One piece of work: the rows of one read (a few tokens, all query heads of one key-value head) over some spans.
struct Task {
  int kv_head;
  int first_row, last_row;    // tokens of the pass
  int first_span, last_span;  // one after the last
  std::int64_t partial;       // number of its first state where it takes one span only; -1: all spans, to `mixed`
};

// A row's state after some spans: the largest score (times scale and log2 e), the sum of weights, then the sum of
// weighted values.
constexpr int state_header = 16;

struct Attention {
  const Model* model;
  const Layer* layer;
  const Row* rows;
  const Read* reads;
  int row_count;
  const std::uint8_t* queries;  // words [kv_heads, rows, group, padded_dim / numbers a word]
  float* mixed;                 // [rows, mixed_stride]: heads one after another
  std::size_t mixed_stride;
  float* partials;  // states

  std::size_t state_size() const { return state_header + layer->padded_dim(); }
};

// The first span of which a query at `position` sees something.
int span_of_first_key(const Layer& layer, int position);

// Bytes that a thread works in.
std::size_t attention_scratch(const Layer& layer, int tokens);

void attend(const Attention& attention, const Task& task, std::uint8_t* scratch);

// States before the first span.
void clear_states(float* states, int count, int numbers);

// state = state joined with that of a later span.
void join(float* state, const float* later, int numbers);

// The head's part of a row of `mixed`.
void write_mixed(const Layer& layer, const float* state, float* row, int head);

}  // namespace puna
