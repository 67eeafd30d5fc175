#include "attention.h"

#include <algorithm>
#include <cstring>

namespace puna {
namespace {

constexpr int tile_rows = 12;  // the most queries taken together
// With so many queries, sums for so many vectors of keys or of dimensions stay in registers.
constexpr int vectors_beside(int rows) { return rows > 6 ? 2 : 4; }
constexpr float nothing = -1e30f;
constexpr float log2_e = 1.44269504f;

PUNA_INLINE Floats as_floats(Ints words) {
  Floats value;
  std::memcpy(&value, &words, sizeof value);
  return value;
}

template <Stored stored>
PUNA_INLINE Floats accumulate(Floats total, Ints words, Ints shared) {
  if (stored == Stored::float32) return fused(as_floats(words), as_floats(shared), total);
  return dot_bfloat16(total, words, shared);
}

// Scores of `rows` queries with the 16 keys of each of `blocks` blocks: scores[row][16 * block + key]. Where few
// queries meet keys that nobody touched lately, the blocks' values and the keys of the blocks `ahead` are fetched.
template <Stored stored, int rows, int blocks>
void score(const std::uint8_t* queries, std::size_t stride, const std::uint8_t* const* keys,
           const std::uint8_t* const* ahead, int words, float* scores) {
  Floats total[rows][blocks];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int b = 0; b < blocks; b++) total[r][b] = broadcast(0.0f);
  for (int word = 0; word < words; word++) {
    Ints key[blocks];
#pragma GCC unroll 8
    for (int b = 0; b < blocks; b++) key[b] = load_ints(keys[b] + word * 64);
    if (ahead)
#pragma GCC unroll 8
      for (int b = 0; b < blocks; b++) {
        __builtin_prefetch(keys[b] + (words + word) * 64);
        __builtin_prefetch(ahead[b] + word * 64);
      }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      const Ints query = broadcast_word(queries + r * stride + word * 4);
#pragma GCC unroll 8
      for (int b = 0; b < blocks; b++) total[r][b] = accumulate<stored>(total[r][b], key[b], query);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int b = 0; b < blocks; b++) store(scores + r * span_tokens + b * lanes, total[r][b]);
}

// Weighted values of `rows` queries: 16 * `vectors` dimensions from `dimension` on, over all blocks.
template <Stored stored, int rows, int vectors>
void mix(const std::uint8_t* weights, const std::uint8_t* const* values, int blocks, int padded_dim, int dimension,
         float* target, std::size_t target_stride) {
  constexpr int per_block = block_tokens / numbers_in_word(stored);  // words of one dimension
  constexpr std::size_t stride = span_tokens * 4 / numbers_in_word(stored);
  Floats total[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) total[r][v] = broadcast(0.0f);
  for (int b = 0; b < blocks; b++) {
    const std::uint8_t* value = values[b] + dimension * 4;
    for (int word = 0; word < per_block; word++, weights += 4, value += padded_dim * 4) {
      Ints words[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) words[v] = load_ints(value + v * 64);
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        const Ints weight = broadcast_word(weights + r * stride);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) total[r][v] = accumulate<stored>(total[r][v], words[v], weight);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) store(target + r * target_stride + dimension + v * lanes, total[r][v]);
}

constexpr int most_ahead = 4;

// The blocks of a span that some row of a tile sees, in their order.
struct Seen {
  const std::uint8_t* keys[span_blocks + most_ahead];
  const std::uint8_t* values[span_blocks];
  int first_key[span_blocks];
  bool whole[span_blocks];  // every row sees all of it
  int count = 0;
};

// First key after those that a window hides from a query at `position`; keys before the sink are seen even so.
int window_start(const Layer& layer, int position) {
  return layer.window ? std::max(0, position - layer.window + 1) : 0;
}

Seen blocks_seen(const Attention& attention, const Task& task, int span, int low, int high) {
  const Layer& layer = *attention.layer;
  const Model& model = *attention.model;
  const std::int32_t* table = attention.reads[attention.rows[task.first_row].read].tables[layer.table];
  Seen seen;
  const int last = std::min((span + 1) * span_blocks, high / block_tokens + 1);
  for (int b = span * span_blocks; b < last; b++) {
    const int first = b * block_tokens, end = first + block_tokens;
    const bool near = end > window_start(layer, low);
    if (table[b] < 0 || !(near || first < layer.sink)) continue;
    seen.keys[seen.count] = model.block(layer, task.kv_head, table[b]);
    seen.values[seen.count] = seen.keys[seen.count] + model.half_block_bytes(layer);
    seen.first_key[seen.count] = first;
    seen.whole[seen.count] = end <= low + 1 && (first >= window_start(layer, high) || end <= layer.sink);
    seen.count++;
  }
  // There is always something to fetch ahead; behind the last block it is that block once more.
  for (int b = 0; seen.count && b < most_ahead; b++) seen.keys[seen.count + b] = seen.keys[seen.count - 1];
  return seen;
}

PUNA_INLINE Floats hide(Floats scores, int first_key, int position, int start, int sink) {
  constexpr std::int32_t numbers[lanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Ints lane = load_ints(numbers);
  for (int i = 0; i < parts; i++) {
    const IntPart key = lane.part[i] + first_key;
    const IntPart seen = (key <= position) & ((key >= start) | (key < sink));
    scores.part[i] = seen ? scores.part[i] : FloatPart{} + nothing;
  }
  return scores;
}

template <Stored stored>
PUNA_INLINE void store_weights(std::uint8_t* target, int number, Floats weights) {
  if (stored == Stored::float32)
    store(target + number * 4, weights);
  else
    store_bfloat16(reinterpret_cast<std::uint16_t*>(target) + number, weights);
}

// Scores of one row to weights; the head of its state.
template <Stored stored>
void soften(const Layer& layer, const Seen& seen, int position, float* scores, std::uint8_t* weights, float* state) {
  const int start = window_start(layer, position);
  Floats top = broadcast(nothing);
  for (int b = 0; b < seen.count; b++) {
    Floats score = load(scores + b * lanes);
    if (!seen.whole[b]) {
      score = hide(score, seen.first_key[b], position, start, layer.sink);
      store(scores + b * lanes, score);
    }
    top = largest(top, score);
  }
  const float most = maximum(top), factor = layer.scale * log2_e;
  const float shift = most > nothing ? most * factor : 0.0f;
  Floats total = broadcast(0.0f);
  for (int b = 0; b < seen.count; b++) {
    const Floats weight = exp2(fused(load(scores + b * lanes), broadcast(factor), broadcast(-shift)));
    store_weights<stored>(weights, b * lanes, weight);
    total = total + weight;
  }
  state[0] = most > nothing ? shift : nothing;
  state[1] = sum(total);
}

struct Scratch {
  float* scores;          // [tile_rows, span_tokens]
  std::uint8_t* weights;  // [tile_rows, span_tokens] numbers
  float* states;          // [tile_rows] states
  float* totals;          // states of all rows of the task
};

Scratch divide(std::uint8_t* memory, const Attention& attention) {
  Scratch scratch;
  scratch.scores = reinterpret_cast<float*>(memory);
  scratch.weights = memory + tile_rows * span_tokens * 4;
  scratch.states = reinterpret_cast<float*>(memory + 2 * tile_rows * span_tokens * 4);
  scratch.totals = scratch.states + tile_rows * attention.state_size();
  return scratch;
}

// States of `rows` queries of one tile over one span.
template <Stored stored, int rows>
void attend_tile(const Attention& attention, const Seen& seen, const std::uint8_t* queries, const int* positions,
                 bool fetch, float* states, const Scratch& scratch) {
  const Layer& layer = *attention.layer;
  const int padded = layer.padded_dim(), words = padded / numbers_in_word(stored);
  constexpr int together = vectors_beside(rows);
  int b = 0;
  for (; b + together <= seen.count; b += together)
    score<stored, rows, together>(queries, words * 4, seen.keys + b, fetch ? seen.keys + b + together : nullptr, words,
                                  scratch.scores + b * lanes);
  for (; b < seen.count; b++)
    score<stored, rows, 1>(queries, words * 4, seen.keys + b, fetch ? seen.keys + b + 1 : nullptr, words,
                           scratch.scores + b * lanes);
  constexpr std::size_t weight_stride = span_tokens * 4 / numbers_in_word(stored);
  for (int r = 0; r < rows; r++)
    soften<stored>(layer, seen, positions[r], scratch.scores + r * span_tokens, scratch.weights + r * weight_stride,
                   states + r * attention.state_size());
  float* target = states + state_header;
  int d = 0;
  for (; d + together * lanes <= padded; d += together * lanes)
    mix<stored, rows, together>(scratch.weights, seen.values, seen.count, padded, d, target, attention.state_size());
  for (; d < padded; d += lanes)
    mix<stored, rows, 1>(scratch.weights, seen.values, seen.count, padded, d, target, attention.state_size());
}

using Tile = void (*)(const Attention&, const Seen&, const std::uint8_t*, const int*, bool, float*, const Scratch&);
struct Choice {
  int rows;
  Tile tile;
};
template <Stored stored>
constexpr Choice choices[] = {{tile_rows, attend_tile<stored, tile_rows>}, {6, attend_tile<stored, 6>},
                              {5, attend_tile<stored, 5>},                 {4, attend_tile<stored, 4>},
                              {3, attend_tile<stored, 3>},                 {2, attend_tile<stored, 2>},
                              {1, attend_tile<stored, 1>}};

// All rows of a task over one span: to its own states, or joined into the totals.
void attend_span(const Attention& attention, const Task& task, int span, const Scratch& scratch) {
  const Layer& layer = *attention.layer;
  const Stored stored = attention.model->stored;
  const int group = layer.group(), first = task.first_row * group, last = task.last_row * group;
  const std::size_t size = attention.state_size();
  const std::size_t query_bytes = static_cast<std::size_t>(layer.padded_dim()) * 4 / numbers_in_word(stored);
  const int low = attention.rows[task.first_row].position, high = attention.rows[task.last_row - 1].position;
  const bool thin = last - first <= tile_rows;  // one tile: nothing that it loads is used again
  Seen seen = blocks_seen(attention, task, span, low, high);
  const bool alike = std::all_of(seen.whole, seen.whole + seen.count, [](bool whole) { return whole; });
  const Choice* choice = stored == Stored::float32 ? choices<Stored::float32> : choices<Stored::bfloat16>;
  for (int row = first; row < last; row += choice->rows) {
    while (choice->rows > last - row) choice++;
    int positions[tile_rows];
    for (int r = 0; r < choice->rows; r++) positions[r] = attention.rows[(row + r) / group].position;
    if (!alike) seen = blocks_seen(attention, task, span, positions[0], positions[choice->rows - 1]);
    if (task.partial < 0 && seen.count == 0) continue;
    const std::int64_t query = static_cast<std::int64_t>(task.kv_head) * attention.row_count * group + row;
    float* states = task.partial < 0 ? scratch.states : attention.partials + (task.partial + row - first) * size;
    choice->tile(attention, seen, attention.queries + query * query_bytes, positions, thin, states, scratch);
    if (task.partial >= 0) continue;
    for (int r = 0; r < choice->rows; r++)
      join(scratch.totals + (row - first + r) * size, scratch.states + r * size, layer.padded_dim());
  }
}

}  // namespace

void join(float* state, const float* later, int numbers) {
  const float most = std::max(state[0], later[0]);
  float factors[lanes] = {state[0] - most, later[0] - most};
  store(factors, exp2(load(factors)));
  state[0] = most;
  state[1] = state[1] * factors[0] + later[1] * factors[1];
  const Floats before = broadcast(factors[0]), now = broadcast(factors[1]);
  for (int d = state_header; d < state_header + numbers; d += lanes)
    store(state + d, fused(load(later + d), now, load(state + d) * before));
}

int span_of_first_key(const Layer& layer, int position) {
  return layer.sink ? 0 : window_start(layer, position) / span_tokens;
}

std::size_t attention_scratch(const Layer& layer, int tokens) {
  const std::size_t states = tile_rows + static_cast<std::size_t>(tokens) * layer.group();
  return 2 * tile_rows * span_tokens * 4 + states * (state_header + layer.padded_dim()) * 4;
}

void attend(const Attention& attention, const Task& task, std::uint8_t* memory) {
  const Layer& layer = *attention.layer;
  const Scratch scratch = divide(memory, attention);
  if (task.partial >= 0) {
    attend_span(attention, task, task.first_span, scratch);
    return;
  }
  const std::size_t size = attention.state_size();
  const int group = layer.group(), states = (task.last_row - task.first_row) * group;
  clear_states(scratch.totals, states, layer.padded_dim());
  for (int span = task.first_span; span < task.last_span; span++) attend_span(attention, task, span, scratch);
  for (int i = 0; i < states; i++) {
    float* target = attention.mixed + (task.first_row + i / group) * attention.mixed_stride;
    write_mixed(layer, scratch.totals + i * size, target, task.kv_head * group + i % group);
  }
}

void clear_states(float* states, int count, int numbers) {
  const std::size_t size = state_header + numbers;
  std::memset(states, 0, count * size * sizeof(float));
  for (int i = 0; i < count; i++) states[i * size] = nothing;
}

void write_mixed(const Layer& layer, const float* state, float* row, int head) {
  float* target = row + static_cast<std::size_t>(head) * layer.head_dim;
  const float total = state[1];
  for (int d = 0; d < layer.head_dim; d++) target[d] = state[state_header + d] / total;
  if (head + 1 < layer.heads) return;
  const int filled = layer.heads * layer.head_dim;  // what follows in the row meets weights of zero
  std::memset(row + filled, 0, sizeof(float) * (layer.out.padded_inputs() - filled));
}

}  // namespace puna
