// One step: all tokens of all reads through a range of layers, phase by phase, on all threads together.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "plan.h"
#include "pool.h"
#include "rows.h"
#include "skipping.h"
#include "vectors.h"

namespace puna {
namespace {

constexpr int most_rows = 512;  // of one pass: what lies between the products should stay in the cache
constexpr int few_rows = 2;     // so many rows every thread prepares for itself instead of waiting for others

// Memory between the products. It stays for the next step; steps take turns.
std::mutex turn;
std::unique_ptr<Memory> workspace;

std::uint8_t* workspace_of(std::size_t bytes) {
  if (!workspace || workspace->bytes() < bytes) {
    workspace.reset();
    workspace = std::make_unique<Memory>(bytes + bytes / 4, false);
  }
  return workspace->data();
}

// Hands out pieces of memory one after another; without memory it only counts.
class Pieces {
 public:
  explicit Pieces(std::uint8_t* memory) : memory_(memory) {}
  template <class Item>
  void take(Item*& item, std::size_t count) {
    item = reinterpret_cast<Item*>(memory_ ? memory_ + used_ : nullptr);
    used_ += (count * sizeof(Item) + 127) / 128 * 128;
  }
  std::size_t used() const { return used_; }

 private:
  std::uint8_t* memory_;
  std::size_t used_ = 0;
};

struct Prepared {
  const std::uint8_t* rows;
  std::size_t stride;
  int count;
};

// A team of threads that prepares rows and multiplies them.
class Team {
 public:
  Team(int rows, int threads) : rows_(rows), threads_(threads), barrier_(threads) {}

  void widen(const Matrix& matrix) {
    if (matrix.data == nullptr) return;
    activation_stride_ = std::max(activation_stride_, activation_bytes(matrix.format, matrix.groups()));
    row_stride_ = std::max<std::size_t>(row_stride_, matrix.padded_inputs());
  }
  void widen_rows(std::size_t numbers) { row_stride_ = std::max(row_stride_, numbers); }

  void lay_out(Pieces& pieces) {
    pieces.take(activations_, rows_ * activation_stride_);
    pieces.take(own_activations_, threads_ * few_rows * activation_stride_);
    pieces.take(own_rows_, threads_ * row_stride_);
  }

  int share(int amount, int thread) const { return static_cast<int>(static_cast<long>(amount) * thread / threads_); }
  void wait() { barrier_.wait(); }
  float* own_row(int thread) const { return own_rows_ + thread * row_stride_; }

  // Prepares the `count` rows that source(row) gives for a product with the matrix.
  template <class Source>
  Prepared prepared(const Matrix& matrix, int count, int thread, Source source) {
    const std::size_t stride = activation_bytes(matrix.format, matrix.groups());
    if (count <= few_rows) {
      std::uint8_t* target = own_activations_ + thread * few_rows * activation_stride_;
      for (int row = 0; row < count; row++)
        prepare(matrix.format, matrix.groups(), source(row), target + row * stride);
      return {target, stride, count};
    }
    for (int row = share(count, thread); row < share(count, thread + 1); row++)
      prepare(matrix.format, matrix.groups(), source(row), activations_ + row * stride);
    wait();
    return {activations_, stride, count};
  }

  // This thread's share of the outputs; returns when all have theirs.
  void multiply_share(const Matrix& matrix, Prepared prepared, Finish finish, float* target, std::size_t stride,
                      int thread, int room = 0) {
    const Product product{&matrix, prepared.rows, prepared.stride, prepared.count, finish, target, stride,
                          room ? room : static_cast<int>(stride)};
    multiply(product, share(matrix.panels(), thread), share(matrix.panels(), thread + 1));
    wait();
  }

 private:
  const int rows_, threads_;
  Barrier barrier_;
  std::size_t activation_stride_ = 0, row_stride_ = 0;
  std::uint8_t *activations_ = nullptr, *own_activations_ = nullptr;
  float* own_rows_ = nullptr;
};

class Pass {
 public:
  Pass(const Model& model, const Plan& plan, const Range& range, float* hidden, int threads)
      : model_(model),
        plan_(plan),
        range_(range),
        hidden_(hidden),
        rows_(static_cast<int>(plan.rows.size())),
        threads_(threads),
        team_(rows_, threads),
        skipping_(plan),
        next_task_(model.layers.size()) {}

  void run() {
    measure();
    Pieces counting(nullptr);
    lay_out(counting);
    Pieces pieces(workspace_of(counting.used()));
    lay_out(pieces);
    Pool::shared().run(threads_, [](void* pass, int thread) { static_cast<Pass*>(pass)->work(thread); }, this);
  }

 private:
  void measure();
  void lay_out(Pieces& pieces);
  void work(int thread);
  void enter(int thread);
  void embed(int row, float* target) const;
  void attention(std::size_t number, int thread);
  void linear_attention(const Layer& layer, int thread);
  void attend_all(std::size_t number, int thread);
  void feed_forward(int number, int thread);
  void feed(const Layer& layer, int count, const int* rows, int thread);
  void finish(int thread);
  const float* mixed_row(const AttentionPlan& plan, const Layer& layer, int row, float* own) const;
  void join_spans(const AttentionPlan& plan, const Layer& layer, int row, float* own) const;

  const Model& model_;
  const Plan& plan_;
  const Range range_;
  float* const hidden_;
  const int rows_, threads_;
  Team team_;
  Skipping skipping_;
  std::vector<std::atomic<int>> next_task_;  // one a layer

  std::size_t projected_stride_ = 0, mixed_stride_ = 0, gated_stride_ = 0, query_bytes_ = 0, scratch_bytes_ = 0;
  float *residual_ = nullptr, *projected_ = nullptr, *mixed_ = nullptr, *gated_ = nullptr, *partials_ = nullptr;
  float *before_ = nullptr, *fed_ = nullptr;  // of rows that skip
  std::uint8_t *queries_ = nullptr, *scratch_ = nullptr;
};

void Pass::measure() {
  team_.widen_rows(model_.padded_hidden());
  for (const Layer& layer : model_.layers) {
    for (const Matrix* matrix : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) team_.widen(*matrix);
    if (layer.heads) {
      projected_stride_ = std::max<std::size_t>(projected_stride_, layer.qkv.padded_outputs());
      mixed_stride_ = std::max<std::size_t>(mixed_stride_, layer.out.padded_inputs());
      team_.widen_rows(layer.out.padded_inputs() + state_header + layer.padded_dim());
      query_bytes_ = std::max<std::size_t>(query_bytes_, static_cast<std::size_t>(layer.heads) * layer.padded_dim() * 4);
      scratch_bytes_ = std::max(scratch_bytes_, attention_scratch(layer, task_tokens));
    }
    if (layer.width) gated_stride_ = std::max<std::size_t>(gated_stride_, layer.down.padded_inputs());
  }
  scratch_bytes_ = (scratch_bytes_ + 127) / 128 * 128;
}

void Pass::lay_out(Pieces& pieces) {
  const std::size_t rows = rows_;
  team_.lay_out(pieces);
  pieces.take(residual_, rows * model_.padded_hidden());
  pieces.take(projected_, rows * projected_stride_);
  pieces.take(mixed_, rows * mixed_stride_);
  pieces.take(gated_, rows * gated_stride_);
  pieces.take(partials_, plan_.partial_numbers);
  pieces.take(before_, skipping_.any() ? rows * model_.padded_hidden() : 0);
  pieces.take(fed_, skipping_.any() ? rows * model_.padded_hidden() : 0);
  pieces.take(queries_, rows * query_bytes_);
  pieces.take(scratch_, threads_ * scratch_bytes_);
}

void Pass::work(int thread) {
  enter(thread);
  for (int number = range_.first; number < range_.last; number++) {
    const Layer& layer = model_.layers[number];
    if (layer.heads) attention(number, thread);
    if (layer.linear_attention) linear_attention(layer, thread);
    if (layer.width || layer.linear_feed_forward) feed_forward(number, thread);
  }
  finish(thread);
}

void Pass::enter(int thread) {
  const int padded = model_.padded_hidden();
  for (int row = team_.share(rows_, thread); row < team_.share(rows_, thread + 1); row++) {
    float* target = residual_ + static_cast<std::size_t>(row) * padded;
    if (range_.entering)
      std::memcpy(target, range_.entering + static_cast<std::size_t>(row) * model_.hidden, sizeof(float) * model_.hidden);
    else
      embed(row, target);
    std::memset(target + model_.hidden, 0, sizeof(float) * (padded - model_.hidden));
  }
  team_.wait();
}

void Pass::embed(int row, float* target) const {
  const std::size_t id = plan_.rows[row].id, first = id * model_.hidden;
  if (model_.embedding == nullptr)
    unpack(model_.head, static_cast<int>(id), target);
  else if (model_.embedding_stored == Stored::float32)
    std::memcpy(target, static_cast<const float*>(model_.embedding) + first, sizeof(float) * model_.hidden);
  else
    for (int i = 0; i < model_.hidden; i++)
      target[i] = from_bfloat16(static_cast<const std::uint16_t*>(model_.embedding)[first + i]);
}

void Pass::attention(std::size_t number, int thread) {
  const Layer& layer = model_.layers[number];
  const AttentionPlan& plan = plan_.attention[plan_.attention_of_layer[number]];
  const int padded = model_.padded_hidden();
  float* own = team_.own_row(thread);
  const Prepared normed = team_.prepared(layer.qkv, rows_, thread, [&](int row) {
    const float* residual = residual_ + static_cast<std::size_t>(row) * padded;
    normalise(residual, layer.attention_norm, model_.hidden, padded, model_.epsilon, own);
    return own;
  });
  team_.multiply_share(layer.qkv, normed, Finish::store, projected_, projected_stride_, thread);
  const Storing storing{&model_, &layer, plan_.rows.data(), plan_.reads.data(), rows_, projected_, projected_stride_,
                        queries_};
  const int units = static_cast<int>(plan_.runs.size()) * layer.kv_heads;
  for (int unit = team_.share(units, thread); unit < team_.share(units, thread + 1); unit++)
    rotate_and_store(storing, plan_.runs[unit / layer.kv_heads], unit % layer.kv_heads);
  team_.wait();
  attend_all(number, thread);
  const Prepared mixed = team_.prepared(layer.out, rows_, thread, [&](int row) { return mixed_row(plan, layer, row, own); });
  team_.multiply_share(layer.out, mixed, Finish::add, residual_, padded, thread);
}

// One matrix in place of attention: what it gives is added to the rows that it reads.
void Pass::linear_attention(const Layer& layer, int thread) {
  const int padded = model_.padded_hidden();
  float* own = team_.own_row(thread);
  const Prepared normed = team_.prepared(layer.out, rows_, thread, [&](int row) {
    normalise(residual_ + static_cast<std::size_t>(row) * padded, layer.attention_norm, model_.hidden, padded,
              model_.epsilon, own);
    return own;
  });
  team_.wait();  // of few rows every thread prepares all: nobody adds to one that another still reads
  team_.multiply_share(layer.out, normed, Finish::add, residual_, padded, thread);
}

void Pass::attend_all(std::size_t number, int thread) {
  const Layer& layer = model_.layers[number];
  const std::vector<Task>& tasks = plan_.attention[plan_.attention_of_layer[number]].tasks;
  const Attention attention{&model_,   &layer, plan_.rows.data(), plan_.reads.data(), rows_,
                            queries_, mixed_, mixed_stride_,     partials_};
  std::uint8_t* scratch = scratch_ + thread * scratch_bytes_;
  const int count = static_cast<int>(tasks.size());
  for (int task = next_task_[number].fetch_add(1); task < count; task = next_task_[number].fetch_add(1))
    attend(attention, tasks[task], scratch);
  team_.wait();
}

// What the output projection reads of one row: the heads' results, joined where spans were computed apart, and
// behind them what goes around attention.
const float* Pass::mixed_row(const AttentionPlan& plan, const Layer& layer, int row, float* own) const {
  const AttentionPlan::Split& split = plan.splits[plan_.rows[row].read];
  const float* mixed = mixed_ + static_cast<std::size_t>(row) * mixed_stride_;
  if (split.first_state >= 0)
    join_spans(plan, layer, row, own);
  else if (layer.shortcut)
    std::memcpy(own, mixed, sizeof(float) * layer.out.padded_inputs());
  else
    return mixed;
  const float* projected = projected_ + static_cast<std::size_t>(row) * projected_stride_;
  gelu(projected + layer.squeezed_at(), layer.shortcut, own + layer.expanded_at());
  return own;
}

void Pass::join_spans(const AttentionPlan& plan, const Layer& layer, int row, float* own) const {
  const AttentionPlan::Split& split = plan.splits[plan_.rows[row].read];
  const int group = layer.group(), padded = layer.padded_dim();
  float* state = own + layer.out.padded_inputs();
  for (int head = 0; head < layer.heads; head++) {
    clear_states(state, 1, padded);
    for (int span = 0; span < split.spans; span++) {
      const std::int64_t place = (static_cast<std::int64_t>(span) * layer.kv_heads + head / group) * split.tokens;
      const std::int64_t number = split.first_state + (place + row - split.first_row) * group + head % group;
      join(state, partials_ + number * (state_header + padded), padded);
    }
    write_mixed(layer, state, own, head);
  }
}

void Pass::feed_forward(int number, int thread) {
  const Layer& layer = model_.layers[number];
  if (!skipping_.concerns(number)) return feed(layer, rows_, nullptr, thread);
  if (thread == 0) skipping_.settle(number);
  team_.wait();
  const std::vector<int>& running = skipping_.running();
  const int count = static_cast<int>(running.size()), padded = model_.padded_hidden();
  if (count == 0) return;
  const auto each_watched = [&](auto act) {
    for (int i = team_.share(count, thread); i < team_.share(count, thread + 1); i++)
      if (skipping_.watches(running[i], number))
        act(running[i], before_ + static_cast<std::size_t>(i) * padded,
            residual_ + static_cast<std::size_t>(running[i]) * padded);
  };
  each_watched([&](int, float* before, const float* row) { std::memcpy(before, row, sizeof(float) * padded); });
  feed(layer, count, count == rows_ ? nullptr : running.data(), thread);
  each_watched([&](int row, const float* before, const float* after) { skipping_.saw(row, cosine(before, after, padded)); });
  team_.wait();
}

// The feed-forward of `count` rows: those of `rows`, or all.
void Pass::feed(const Layer& layer, int count, const int* rows, int thread) {
  const int padded = model_.padded_hidden();
  float* own = team_.own_row(thread);
  const auto residual = [&](int i) { return residual_ + static_cast<std::size_t>(rows ? rows[i] : i) * padded; };
  const Matrix& first = layer.width ? layer.gate_up : layer.down;
  Prepared gated = team_.prepared(first, count, thread, [&](int i) {
    normalise(residual(i), layer.feed_forward_norm, model_.hidden, padded, model_.epsilon, own);
    return own;
  });
  if (layer.width) {
    team_.multiply_share(layer.gate_up, gated, Finish::gate, gated_, gated_stride_, thread);
    gated = team_.prepared(layer.down, count, thread,
                           [&](int i) { return gated_ + static_cast<std::size_t>(i) * gated_stride_; });
  } else {
    team_.wait();  // of few rows every thread prepares all: nobody adds to one that another still reads
  }
  if (rows == nullptr) return team_.multiply_share(layer.down, gated, Finish::add, residual_, padded, thread);
  // The rows do not lie side by side: what is added to them comes apart first.
  team_.multiply_share(layer.down, gated, Finish::store, fed_, padded, thread);
  for (int i = team_.share(count, thread); i < team_.share(count, thread + 1); i++)
    for (int k = 0; k < model_.hidden; k++) residual(i)[k] += fed_[static_cast<std::size_t>(i) * padded + k];
  team_.wait();
}

void Pass::finish(int thread) {
  const int padded = model_.padded_hidden();
  float* own = team_.own_row(thread);
  for (int row = team_.share(rows_, thread); row < team_.share(rows_, thread + 1); row++) {
    const float* residual = residual_ + static_cast<std::size_t>(row) * padded;
    if (range_.leaving)
      std::memcpy(range_.leaving + static_cast<std::size_t>(row) * model_.hidden, residual, sizeof(float) * model_.hidden);
    if (plan_.rows[row].output < 0) continue;
    normalise(residual, model_.final_norm, model_.hidden, padded, model_.epsilon, own);
    float* target = hidden_ + static_cast<std::size_t>(plan_.rows[row].output) * model_.hidden;
    std::memcpy(target, own, sizeof(float) * model_.hidden);
  }
}

// Logits of rows of hidden states.
struct Head {
  const Model& model;
  const int count;
  const float* hidden;
  float* target;
  Team team;

  void work(int thread) {
    float* own = team.own_row(thread);
    const Prepared rows = team.prepared(model.head, count, thread, [&](int row) {
      std::memcpy(own, hidden + static_cast<std::size_t>(row) * model.hidden, sizeof(float) * model.hidden);
      std::memset(own + model.hidden, 0, sizeof(float) * (model.padded_hidden() - model.hidden));
      return own;
    });
    team.multiply_share(model.head, rows, Finish::store, target, model.vocabulary, thread);
  }
};

}  // namespace

void step(const Model& model, const std::vector<Read>& reads, const Range& range, float* hidden, int threads) {
  const std::lock_guard<std::mutex> guard(turn);
  std::vector<Read> parts;
  std::vector<int> first_output;
  int rows = 0, outputs = 0;
  Range rest = range;  // of the rows that are still to be read
  const auto flush = [&] {
    if (rows) Pass(model, make_plan(model, parts, first_output, threads), rest, hidden, threads).run();
    const std::size_t numbers = static_cast<std::size_t>(rows) * model.hidden;
    if (rest.entering) rest.entering += numbers;
    if (rest.leaving) rest.leaving += numbers;
    parts.clear();
    first_output.clear();
    rows = 0;
  };
  for (const Read& read : reads) {
    for (int done = 0; done < read.count;) {
      const int count = std::min(read.count - done, most_rows - rows);
      const int later = read.count - done - count;  // tokens of the read after this part
      const int wanted = std::max(0, std::min(count, read.outputs - later));
      parts.push_back({read.ids + done, count, read.start + done, wanted, read.tables, read.skip, read.skipped});
      first_output.push_back(outputs);
      outputs += wanted;
      done += count;
      rows += count;
      if (rows == most_rows) flush();
    }
  }
  flush();
}

void logits(const Model& model, const float* hidden, int rows, float* target, int threads) {
  const std::lock_guard<std::mutex> guard(turn);
  Head head{model, rows, hidden, target, {rows, threads}};
  head.team.widen(model.head);
  Pieces counting(nullptr);
  head.team.lay_out(counting);
  Pieces pieces(workspace_of(counting.used()));
  head.team.lay_out(pieces);
  Pool::shared().run(threads, [](void* head, int thread) { static_cast<Head*>(head)->work(thread); }, &head);
}

}  // namespace puna
