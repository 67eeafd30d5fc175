// What a pass has to do, settled before its threads start.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "model.h"
#include "rows.h"

namespace puna {

constexpr int task_tokens = 32;  // of one read in one task
constexpr int few_tokens = 8;    // a read of no more may be split over spans of keys

// The attention of all layers of one shape and one block table.
struct AttentionPlan {
  // A read whose spans are computed apart and joined later; states [spans, kv_heads, tokens, group].
  struct Split {
    std::int64_t first_state = -1;  // -1: not split
    int spans = 0;
    int first_row = 0;
    int tokens = 0;
  };
  const Layer* layer = nullptr;
  std::vector<Task> tasks;
  std::vector<Split> splits;  // one a read
};

struct Plan {
  std::vector<Read> reads;  // the part of each that this pass reads
  std::vector<Row> rows;
  std::vector<Run> runs;
  std::vector<AttentionPlan> attention;
  std::vector<int> attention_of_layer;
  std::size_t partial_numbers = 0;  // floats of all states of the largest plan
};

// `first_output` is where the first hidden state of each read goes.
Plan make_plan(const Model& model, std::vector<Read> reads, const std::vector<int>& first_output, int threads);

}  // namespace puna
