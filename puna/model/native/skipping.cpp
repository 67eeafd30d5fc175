#include "skipping.h"

#include <algorithm>

namespace puna {
namespace {

bool inside(const Skip& skip, int layer) { return layer >= skip.first && layer <= skip.last; }

}  // namespace

Skipping::Skipping(const Plan& plan) {
  for (const Read& read : plan.reads) {
    if (read.skip.last < read.skip.first) continue;
    first_ = any_ ? std::min(first_, read.skip.first) : read.skip.first;
    last_ = std::max(last_, read.skip.last);
    any_ = true;
  }
  if (!any_) return;
  running_.reserve(plan.rows.size());
  for (const Row& row : plan.rows) {
    const Read& read = plan.reads[row.read];
    states_.push_back({read.skip, read.skipped, false, read.skip.budget});
  }
}

void Skipping::settle(int layer) {
  running_.clear();
  for (std::size_t row = 0; row < states_.size(); row++) {
    State& state = states_[row];
    if (inside(state.skip, layer) && state.saturated && state.left > 0) {
      state.left--;
      ++*state.skipped;
    } else {
      running_.push_back(static_cast<int>(row));
    }
  }
}

bool Skipping::watches(int row, int layer) const { return inside(states_[row].skip, layer); }

void Skipping::saw(int row, float cosine) {
  if (cosine > states_[row].skip.threshold) states_[row].saturated = true;
}

}  // namespace puna
