// A decoder as a step needs it: layers with their packed weights, and the store of keys and values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "matrix.h"

namespace puna {

constexpr int block_tokens = 16;  // of the paged store
constexpr int most_head_dim = 1024;

// Large zeroed memory that the system need not back before it is used, on large pages where it can.
class Memory {
 public:
  Memory(std::size_t bytes, bool large_pages);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::uint8_t* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  void* mapped_;
  std::size_t mapped_bytes_;
  std::uint8_t* data_;
};

// How keys and values are kept: 32-bit words that hold one float32 or two bfloat16 numbers.
//
// A block of one key-value head holds its keys as [head_dim / numbers a word][16 tokens] words (a pair is two
// dimensions of one token) and after them its values as [16 / numbers a word][head_dim] words (a pair is one
// dimension of two tokens): what one instruction takes from sixteen lanes stands side by side.
enum class Stored : std::int32_t { float32 = 0, bfloat16 = 1 };
constexpr int numbers_in_word(Stored stored) { return stored == Stored::float32 ? 1 : 2; }

struct Rope {
  const float* cosines = nullptr;  // [positions, pairs]
  const float* sines = nullptr;
  int positions = 0;
};

struct Layer {
  int heads = 0;  // none: the layer has no attention, or a linear one
  int kv_heads = 0;
  int head_dim = 0;
  int width = 0;   // none: the layer has no feed-forward, or a linear one
  int window = 0;  // keys that a query sees, its own included; 0: all
  int sink = 0;    // first keys that are seen nevertheless
  int rope = 0;
  int table = 0;  // which block table of a text is this layer's
  int shortcut = 0;  // width of the way around attention; 0: none
  float scale = 1.0f;
  bool linear_attention = false;     // `out` alone, [hidden, hidden]
  bool linear_feed_forward = false;  // `down` alone, [hidden, hidden]
  Matrix qkv, out, gate_up, down;
  float* attention_norm = nullptr;
  float* feed_forward_norm = nullptr;
  std::uint8_t* store = nullptr;  // [kv_heads, blocks, block_bytes]

  int group() const { return heads / kv_heads; }
  int padded_dim() const { return rounded_up(head_dim, 16); }
  // The shortcut's first matrix gives the last outputs of `qkv`; its second reads inputs of `out` in groups of their own.
  int squeezed_at() const { return (heads + 2 * kv_heads) * head_dim; }
  int expanded_at() const { return rounded_up(heads * head_dim, group_inputs); }
  int out_inputs() const { return shortcut ? expanded_at() + shortcut : heads * head_dim; }
};

struct Model {
  int hidden = 0;
  int vocabulary = 0;
  int blocks = 0;
  float epsilon = 0.0f;
  Stored stored = Stored::float32;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Matrix head;
  float* final_norm = nullptr;
  const void* embedding = nullptr;  // [vocabulary, hidden] where the head is not tied, else null
  Stored embedding_stored = Stored::float32;
  std::unique_ptr<Memory> weights;
  std::size_t shared_bytes = 0;  // of matrices that are another model's, which must outlive this one
  std::unique_ptr<Memory> cache;

  int padded_hidden() const { return rounded_up(hidden, group_inputs); }
  std::size_t half_block_bytes(const Layer& layer) const {
    return static_cast<std::size_t>(layer.padded_dim()) * block_tokens * 4 / numbers_in_word(stored);
  }
  // Where the keys of a block are; its values follow.
  std::uint8_t* block(const Layer& layer, int kv_head, int number) const {
    return layer.store + (static_cast<std::size_t>(kv_head) * blocks + number) * 2 * half_block_bytes(layer);
  }
};

// Which feed-forwards a row may leave out: of the layers first to last, behind one whose cosine of the stream before
// and behind it is above the threshold, so many at most. By default none.
struct Skip {
  int first = 0;
  int last = -1;
  int budget = 0;
  float threshold = 0.0f;
};

// Tokens of one text to be read.
struct Read {
  const std::int32_t* ids;
  int count;
  int start;                          // position of the first
  int outputs;                        // final hidden states wanted, of the last tokens
  const std::int32_t* const* tables;  // one block table for each group of layers
  Skip skip;
  std::int32_t* skipped;  // counts the feed-forwards that are left out
};

// The layers that a step runs, `first` to `last` - 1, and the stream before and behind them, [tokens, hidden] in the
// order of reads. Without `entering` it begins with the embeddings; without `leaving` it is not wanted.
struct Range {
  int first = 0;
  int last = 0;
  const float* entering = nullptr;
  float* leaving = nullptr;
};

// All tokens of all reads through a range of layers; hidden states behind the last norm [sum of outputs, hidden] in
// the order of reads.
void step(const Model& model, const std::vector<Read>& reads, const Range& range, float* hidden, int threads);

// Float32 logits [rows, vocabulary] of final hidden states [rows, hidden].
void logits(const Model& model, const float* hidden, int rows, float* target, int threads);

}  // namespace puna
