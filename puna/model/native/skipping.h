// Feed-forwards that rows leave out once one of the middle layers hardly turns their stream (S53, FFN-SkipLLM).
#pragma once

#include <vector>

#include "plan.h"

namespace puna {

// Which rows of a pass run the feed-forward of which layer. One thread settles a layer; then all may look.
class Skipping {
 public:
  explicit Skipping(const Plan& plan);

  // Whether any row leaves out anything at all, or might in this layer.
  bool any() const { return any_; }
  bool concerns(int layer) const { return any_ && layer >= first_ && layer <= last_; }

  // Decides which rows run the layer's feed-forward, and counts those that do not.
  void settle(int layer);
  const std::vector<int>& running() const { return running_; }  // rising

  // After the feed-forward of a row that ran it: the cosine of its stream before and behind decides what follows.
  bool watches(int row, int layer) const;
  void saw(int row, float cosine);

 private:
  struct State {
    Skip skip;
    std::int32_t* skipped;
    bool saturated;
    int left;  // of the budget
  };
  std::vector<State> states_;  // one a row
  std::vector<int> running_;
  bool any_ = false;
  int first_ = 0, last_ = -1;  // layers that concern any row
};

}  // namespace puna
