// The way of operands from the warpgroup that brings them to those that multiply them: a ring of stages, each full, then empty
// again.
#pragma once
#include "cuda/hopper.cuh"

namespace sadmoe::cuda {

constexpr int kMostBytes = 227 << 10;  // of shared memory, of a block

template <int kStagesOf>
struct Ring {
  static constexpr int kStages = kStagesOf;
  // Stages that are on their way: one is still multiplied while the next already is, and both are waited for.
  static constexpr int kAhead = kStages - 2;
  static_assert(kAhead >= 2, "enough on its way");
  Barrier full[kStages], empty[kStages];

  // By one thread. So many warps bring, and so many take.
  SADMOE_DEVICE void init(int bringing, int taking) {
    for (Barrier& b : full) init_barrier(b, bringing);
    for (Barrier& b : empty) init_barrier(b, taking);
    fence_async();
  }
  // By a warp that is done with a stage.
  SADMOE_DEVICE void release(int stage) {
    sync_warp();
    if (thread_index() % 32 == 0) arrive(empty[stage]);
  }
};

// Where in the ring a step is, and which turn of the ring it is.
template <class Ring>
struct Turn {
  int stage = 0, parity = 0;
  SADMOE_DEVICE void next() {
    if (++stage == Ring::kStages) stage = 0, parity ^= 1;
  }
};

// What the warpgroup that brings does beside its copies: a stage is full once those that were started kAhead steps ago have
// landed.
template <class Ring>
class Bringing {
 public:
  SADMOE_DEVICE explicit Bringing(Ring& ring) : ring_(ring) {}
  // The next stage, once it is empty.
  SADMOE_DEVICE int begin() {
    wait_barrier(ring_.empty[filled_.stage], filled_.parity ^ 1);
    return filled_.stage;
  }
  // All its copies are started.
  SADMOE_DEVICE void end() {
    filled_.next();
    advance();
  }
  // After the last.
  SADMOE_DEVICE void finish() {
    for (const int64_t steps = step_; step_ < steps + Ring::kAhead;) advance();
  }

 private:
  SADMOE_DEVICE void advance() {
    commit_copies();
    if (step_++ < Ring::kAhead) return;
    wait_copies<Ring::kAhead>();
    fence_async();
    sync_warp();
    if (thread_index() % 32 == 0) arrive(ring_.full[landed_.stage]);
    landed_.next();
  }

  Ring& ring_;
  Turn<Ring> filled_, landed_;
  int64_t step_ = 0;
};

}  // namespace sadmoe::cuda
