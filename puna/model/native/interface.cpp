// What Python calls. Every function returns 0, or what went wrong as a number below zero.
#include <sys/mman.h>

#include <cstring>
#include <new>
#include <system_error>

#include "model.h"

namespace puna {
namespace {

constexpr std::size_t large_page = std::size_t{2} << 20;

constexpr int no_memory = -1;
constexpr int no_threads = -2;

template <class Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::bad_alloc&) {
    return no_memory;
  } catch (const std::system_error&) {
    return no_threads;
  }
}

}  // namespace

Memory::Memory(std::size_t bytes, bool large_pages) : bytes_(bytes), mapped_bytes_(bytes + large_page) {
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(mapped_);
  data_ = static_cast<std::uint8_t*>(mapped_) + (large_page - start % large_page) % large_page;
#if defined(MADV_HUGEPAGE)
  if (large_pages) madvise(data_, bytes, MADV_HUGEPAGE);
#else
  (void)large_pages;
#endif
}

Memory::~Memory() { munmap(mapped_, mapped_bytes_); }

}  // namespace puna

extern "C" {

struct PunaLayer {
  std::int32_t heads, kv_heads, head_dim, width, window, sink, rope, table, format;
  std::int32_t qkv_bias, out_bias, feed_forward_bias;
  std::int32_t linear_attention, linear_feed_forward;  // one matrix [hidden, hidden]: out, or down
  std::int32_t series, shortcut;  // terms of the activation, width of the way around attention; 0: none
  std::int32_t shared;  // bit 0 qkv, 1 out, 2 gate and up, 3 down: the donor's matrix is this model's too
  float scale;
};

struct PunaModel {
  std::int32_t hidden, vocabulary, layers, blocks, stored, head_format, ropes, embedding_stored, head_shared;
  float epsilon;
  const void* embedding;
  const void* donor;  // a model of the same shapes and formats that matrices are shared with, or null
};
}

namespace puna {
namespace {

// Places everything in one piece of memory; without memory it only counts.
class Builder {
 public:
  Builder(Model& model, std::uint8_t* memory) : model_(model), memory_(memory) {}

  void place_all(const PunaModel& description, const PunaLayer* layers) {
    const int hidden = description.hidden;
    const Model* donor = static_cast<const Model*>(description.donor);
    for (int i = 0; i < description.layers; i++) {
      const PunaLayer& given = layers[i];
      Layer& layer = model_.layers[i];
      const Format format = static_cast<Format>(given.format);
      const auto lent = [&](int bit, const Matrix Layer::* matrix) {
        return given.shared >> bit & 1 ? &(donor->layers[i].*matrix) : nullptr;
      };
      if (given.heads) {
        const int queries = given.heads * given.head_dim, keys = given.kv_heads * given.head_dim;
        const int outputs = queries + 2 * keys + given.shortcut;
        place(layer.qkv, lent(0, &Layer::qkv), format, outputs, hidden, given.qkv_bias);
        place(layer.out, lent(1, &Layer::out), format, hidden, layer.out_inputs(), given.out_bias);
        place_numbers(layer.attention_norm, model_.padded_hidden());
      } else if (given.linear_attention) {
        place(layer.out, lent(1, &Layer::out), format, hidden, hidden, given.out_bias);
        place_numbers(layer.attention_norm, model_.padded_hidden());
      }
      if (given.width) {
        const int width = 2 * rounded_up(given.width, 16);
        place(layer.gate_up, lent(2, &Layer::gate_up), format, width, hidden, given.feed_forward_bias, given.series);
        place(layer.down, lent(3, &Layer::down), format, hidden, given.width, given.feed_forward_bias);
        place_numbers(layer.feed_forward_norm, model_.padded_hidden());
      } else if (given.linear_feed_forward) {
        place(layer.down, lent(3, &Layer::down), format, hidden, hidden, given.feed_forward_bias);
        place_numbers(layer.feed_forward_norm, model_.padded_hidden());
      }
    }
    const Format format = static_cast<Format>(description.head_format);
    place(model_.head, description.head_shared ? &donor->head : nullptr, format, description.vocabulary, hidden, false);
    place_numbers(model_.final_norm, model_.padded_hidden());
  }

  std::size_t used() const { return used_; }
  std::size_t shared() const { return shared_; }

 private:
  std::uint8_t* take(std::size_t bytes) {
    std::uint8_t* place = memory_ ? memory_ + used_ : nullptr;
    used_ += (bytes + 63) / 64 * 64;
    return place;
  }
  void place(Matrix& matrix, const Matrix* lent, Format format, int outputs, int inputs, bool biased, int terms = 0) {
    if (lent) {
      matrix = *lent;
      shared_ += matrix.bytes() + (matrix.bias ? sizeof(float) * matrix.padded_outputs() : 0);
      shared_ += sizeof(float) * matrix.series_numbers();
      return;
    }
    matrix.format = format;
    matrix.outputs = outputs;
    matrix.inputs = inputs;
    matrix.data = take(matrix.bytes());
    matrix.terms = terms;
    if (biased) place_numbers(matrix.bias, matrix.padded_outputs());
    if (terms) place_numbers(matrix.series, matrix.series_numbers());
  }
  void place_numbers(float*& numbers, int count) {
    numbers = reinterpret_cast<float*>(take(sizeof(float) * static_cast<std::size_t>(count)));
  }

  Model& model_;
  std::uint8_t* memory_;
  std::size_t used_ = 0;
  std::size_t shared_ = 0;
};

void describe(Model& model, const PunaModel& description, const PunaLayer* layers) {
  model.hidden = description.hidden;
  model.vocabulary = description.vocabulary;
  model.blocks = description.blocks;
  model.epsilon = description.epsilon;
  model.stored = static_cast<Stored>(description.stored);
  model.embedding = description.embedding;
  model.embedding_stored = static_cast<Stored>(description.embedding_stored);
  model.ropes.resize(description.ropes);
  model.layers.resize(description.layers);
  for (int i = 0; i < description.layers; i++) {
    const PunaLayer& given = layers[i];
    Layer& layer = model.layers[i];
    layer.heads = given.heads;
    layer.kv_heads = given.kv_heads;
    layer.head_dim = given.head_dim;
    layer.width = given.width;
    layer.shortcut = given.shortcut;
    layer.linear_attention = given.linear_attention;
    layer.linear_feed_forward = given.linear_feed_forward;
    layer.window = given.window;
    layer.sink = given.sink;
    layer.rope = given.rope;
    layer.table = given.table;
    layer.scale = given.scale;
  }
}

void make_store(Model& model) {
  std::size_t bytes = 0;
  std::vector<std::size_t> starts;
  for (const Layer& layer : model.layers) {
    starts.push_back(bytes);
    bytes += static_cast<std::size_t>(layer.kv_heads) * model.blocks * 2 * model.half_block_bytes(layer);
  }
  model.cache = std::make_unique<Memory>(bytes, false);
  for (std::size_t i = 0; i < starts.size(); i++) model.layers[i].store = model.cache->data() + starts[i];
}

Matrix& matrix_of(Model& model, int layer, int which) {
  if (layer < 0) return model.head;
  Layer& found = model.layers[layer];
  Matrix* const matrices[] = {&found.qkv, &found.out, &found.gate_up, &found.down};
  return *matrices[which];
}

}  // namespace
}  // namespace puna

#pragma GCC visibility push(default)
extern "C" {

// A model without content, or null where the memory is missing.
void* puna_create(const PunaModel* description, const PunaLayer* layers) {
  puna::Model* model = nullptr;
  const int failed = puna::guarded([&] {
    auto made = std::make_unique<puna::Model>();
    puna::describe(*made, *description, layers);
    puna::Builder counting(*made, nullptr);
    counting.place_all(*description, layers);
    made->weights = std::make_unique<puna::Memory>(counting.used(), true);
    made->shared_bytes = counting.shared();
    puna::Builder(*made, made->weights->data()).place_all(*description, layers);
    puna::make_store(*made);
    model = made.release();
  });
  return failed ? nullptr : model;
}

void puna_destroy(void* model) { delete static_cast<puna::Model*>(model); }

std::int64_t puna_weight_bytes(const void* model) {
  return static_cast<std::int64_t>(static_cast<const puna::Model*>(model)->weights->bytes());
}

std::int64_t puna_shared_bytes(const void* model) {
  return static_cast<std::int64_t>(static_cast<const puna::Model*>(model)->shared_bytes);
}

std::int64_t puna_store_bytes(const void* model) {
  return static_cast<std::int64_t>(static_cast<const puna::Model*>(model)->cache->bytes());
}

// Rows [count, inputs] of the matrix `which` (0 qkv, 1 out, 2 gate and up, 3 down; layer -1: the head). Scales and
// minimums [count, groups of 32] of the grid they lie on, or null.
int puna_fill(void* model, int layer, int which, int first, int count, const float* rows, const float* scales,
              const float* minimums, int threads) {
  return puna::guarded([&] {
    const puna::Matrix& matrix = puna::matrix_of(*static_cast<puna::Model*>(model), layer, which);
    puna::pack(matrix, first, count, rows, scales, minimums, threads);
  });
}

// Output `row` of a matrix as float32 [groups * 32]: what the kernels multiply with.
int puna_row(void* model, int layer, int which, int row, float* target) {
  return puna::guarded([&] {
    puna::unpack(puna::matrix_of(*static_cast<puna::Model*>(model), layer, which), row, target);
  });
}

int puna_bias(void* model, int layer, int which, const float* bias) {
  const puna::Matrix& matrix = puna::matrix_of(*static_cast<puna::Model*>(model), layer, which);
  std::memcpy(matrix.bias, bias, sizeof(float) * matrix.outputs);
  return 0;
}

// Scales and shifts of a layer's activations, [terms, 2, channels filled up to panels].
int puna_series(void* model, int layer, const float* numbers) {
  const puna::Matrix& matrix = static_cast<puna::Model*>(model)->layers[layer].gate_up;
  std::memcpy(matrix.series, numbers, sizeof(float) * matrix.series_numbers());
  return 0;
}

// The norm before attention (0) or feed-forward (1); layer -1: the last.
int puna_norm(void* handle, int layer, int which, const float* weight) {
  puna::Model& model = *static_cast<puna::Model*>(handle);
  float* target = model.final_norm;
  if (layer >= 0) target = which ? model.layers[layer].feed_forward_norm : model.layers[layer].attention_norm;
  std::memcpy(target, weight, sizeof(float) * model.hidden);
  return 0;
}

// Cosines and sines [positions, head_dim / 2], which must stay where they are.
int puna_rope(void* handle, int index, const float* cosines, const float* sines, int positions) {
  static_cast<puna::Model*>(handle)->ropes[index] = {cosines, sines, positions};
  return 0;
}

int puna_copy_block(void* handle, int table, int source, int target) {
  puna::Model& model = *static_cast<puna::Model*>(handle);
  for (const puna::Layer& layer : model.layers)
    for (int head = 0; layer.heads && layer.table == table && head < layer.kv_heads; head++)
      std::memcpy(model.block(layer, head, target), model.block(layer, head, source), 2 * model.half_block_bytes(layer));
  return 0;
}

// shapes [reads, 3]: tokens, position of the first, hidden states wanted. Tables [reads, groups] follow one another in
// `tables` from `table_starts` on. Null or, for each read, the middle's first and last layer and the budget [reads, 3],
// the threshold, and where to count what is skipped; a middle that ends before it begins skips nothing. Layers
// `first_layer` to `last_layer` - 1 run, over `entering` where it is given; `leaving` is null or takes the stream.
int puna_step(const void* handle, int reads, const std::int32_t* ids, const std::int32_t* shapes,
              const std::int32_t* tables, const std::int32_t* table_starts, int groups, const std::int32_t* middles,
              const float* thresholds, std::int32_t* skipped, int first_layer, int last_layer, const float* entering,
              float* leaving, float* hidden, int threads) {
  return puna::guarded([&] {
    std::vector<const std::int32_t*> starts;
    for (int i = 0; i < reads * groups; i++) starts.push_back(tables + table_starts[i]);
    std::vector<puna::Read> given;
    for (int i = 0; i < reads; i++) {
      const std::int32_t* shape = shapes + 3 * i;
      puna::Skip skip;
      if (middles) skip = {middles[3 * i], middles[3 * i + 1], middles[3 * i + 2], thresholds[i]};
      given.push_back({ids, shape[0], shape[1], shape[2], starts.data() + i * groups, skip, skipped + i});
      ids += shape[0];
    }
    const puna::Range range{first_layer, last_layer, entering, leaving};
    puna::step(*static_cast<const puna::Model*>(handle), given, range, hidden, threads);
  });
}

int puna_logits(const void* handle, const float* hidden, int rows, float* target, int threads) {
  return puna::guarded([&] {
    puna::logits(*static_cast<const puna::Model*>(handle), hidden, rows, target, threads);
  });
}
}
#pragma GCC visibility pop
