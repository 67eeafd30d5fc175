#include "plan.h"

#include <algorithm>

namespace puna {
namespace {

bool alike(const Layer& a, const Layer& b) {
  return a.table == b.table && a.window == b.window && a.sink == b.sink && a.kv_heads == b.kv_heads &&
         a.heads == b.heads && a.head_dim == b.head_dim;
}

// One task for each span; returns how many states they leave.
std::int64_t split_read(AttentionPlan& plan, int read, int first_row, int count, int first_span, int last_span,
                        std::int64_t first_state) {
  const Layer& layer = *plan.layer;
  const int spans = last_span - first_span;
  plan.splits[read] = {first_state, spans, first_row, count};
  const std::int64_t states = static_cast<std::int64_t>(count) * layer.group();
  for (int span = 0; span < spans; span++)
    for (int head = 0; head < layer.kv_heads; head++) {
      const std::int64_t state = first_state + (static_cast<std::int64_t>(span) * layer.kv_heads + head) * states;
      plan.tasks.push_back({head, first_row, first_row + count, first_span + span, first_span + span + 1, state});
    }
  return spans * layer.kv_heads * states;
}

AttentionPlan plan_attention(const Layer& layer, const std::vector<Read>& reads, int threads, std::size_t* numbers) {
  AttentionPlan plan;
  plan.layer = &layer;
  plan.splits.resize(reads.size());
  const bool scarce = static_cast<int>(reads.size()) * layer.kv_heads < 4 * threads;  // tasks, if none is split
  std::int64_t states = 0;
  int first_row = 0;
  for (std::size_t read = 0; read < reads.size(); read++) {
    const int count = reads[read].count, start = reads[read].start;
    const int last_span = (start + count - 1) / span_tokens + 1;
    if (count <= few_tokens && scarce) {
      const int first_span = span_of_first_key(layer, start);
      states += split_read(plan, static_cast<int>(read), first_row, count, first_span, last_span, states);
    } else {
      // The latest tokens see the most keys: the longest tasks come first.
      for (int token = (count - 1) / task_tokens * task_tokens; token >= 0; token -= task_tokens) {
        const int end = std::min(count, token + task_tokens);
        const int spans_end = (start + end - 1) / span_tokens + 1;
        const int first_span = span_of_first_key(layer, start + token);
        for (int head = 0; head < layer.kv_heads; head++)
          plan.tasks.push_back({head, first_row + token, first_row + end, first_span, spans_end, -1});
      }
    }
    first_row += count;
  }
  *numbers = std::max(*numbers, states * (state_header + static_cast<std::size_t>(layer.padded_dim())));
  return plan;
}

}  // namespace

Plan make_plan(const Model& model, std::vector<Read> reads, const std::vector<int>& first_output, int threads) {
  Plan plan;
  for (std::size_t index = 0; index < reads.size(); index++) {
    const Read& read = reads[index];
    for (int i = 0; i < read.count; i++) {
      const int position = read.start + i, from_end = read.count - i;
      const bool wanted = from_end <= read.outputs;
      const int output = wanted ? first_output[index] + read.outputs - from_end : -1;
      const int row = static_cast<int>(plan.rows.size());
      if (i == 0 || position % block_tokens == 0) plan.runs.push_back({row, row});
      plan.runs.back().last_row = row + 1;
      plan.rows.push_back({static_cast<int>(index), position, read.ids[i], output});
    }
  }
  for (const Layer& layer : model.layers) {
    int found = -1;
    for (std::size_t i = 0; layer.heads && i < plan.attention.size(); i++)
      if (alike(layer, *plan.attention[i].layer)) found = static_cast<int>(i);
    if (layer.heads && found < 0) {
      found = static_cast<int>(plan.attention.size());
      plan.attention.push_back(plan_attention(layer, reads, threads, &plan.partial_numbers));
    }
    plan.attention_of_layer.push_back(found);
  }
  plan.reads = std::move(reads);
  return plan;
}

}  // namespace puna
