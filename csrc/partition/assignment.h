// The balanced assignment of f rows to E experts of s = f / E rows each, solved exactly. No torch, no Python.
//
//   minimise  sum_i cost[i, label[i]]     over the labels with  |{ i : label[i] = e }| = s  for every e
//
// The answer carries its own proof: prices [E] under which every row sits where it is cheapest,
//
//   cost[i, label[i]] + price[label[i]] = min_e ( cost[i, e] + price[e] )     for every i,
//
// and since prices add the same sum to every balanced labelling, none is cheaper. All arithmetic is in integers, in
// one thread: the same input gives the same labels and prices on every machine.
#pragma once
#include <cstdint>
#include <functional>

namespace sadmoe {

constexpr int32_t kMaxCost = 1 << 27;        // |cost|: a path of costs and prices then stays within int32
constexpr int32_t kMaxPrice = 2 * kMaxCost;  // no optimal price is farther above the least one

struct Assignment {
  int64_t f, E;         // 1 <= E <= f < 2^31, E divides f
  const int32_t* cost;  // [f, E] row-major
  int64_t* labels;      // [f] in: a guess, or -1, which only settles ties of the first placing; out: the optimum
  int32_t* prices;      // [E] in: a guess in [0, kMaxPrice], or 0; out: the proof, the least price being 0
};

// Guesses from a similar problem (the previous step of k-means) make this one quick, whatever they are worth.
// O(f E), and one shortest path over the experts for each row that finds its cheapest expert full; O(E^2) memory.
// `poll` is called now and then, and may throw to give up: labels and prices are then worth nothing.
void solve(const Assignment& problem, const std::function<void()>& poll);

}  // namespace sadmoe
