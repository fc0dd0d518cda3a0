// Successive shortest paths, on a graph of E nodes instead of f + E.
//
// Rows enter one at a time. A row that finds its cheapest expert full may push out one of the expert's rows, which
// moves to another expert, and so on, until one has room: the cheapest such chain is a shortest path over experts, with
//   step(a, e) = min over the rows i of a of  cost[i, e] - cost[i, a]
// as the price of going from a to e. Raising the prices of the experts that the search has passed keeps every placed
// row where it is cheapest (the invariant of the header), and makes all steps non-negative for the next search.
#include "partition/assignment.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace sadmoe {
namespace {

constexpr int32_t kInfinite = std::numeric_limits<int32_t>::max();
constexpr int32_t kPassed = 11 * kMaxCost;  // as a price: above any path (at most 5 kMaxCost), and no overflow on one
constexpr int64_t kBlock = 64;              // experts that share a minimum, so that the nearest is found quickly
constexpr int64_t kWorkPerPoll = 1 << 24;   // entries that loops have looked at: some milliseconds

class Solver {
 public:
  Solver(const Assignment& problem, const std::function<void()>& poll)
      : p_(problem),
        poll_(poll),
        s_(problem.f / problem.E),
        members_(problem.E),
        steps_(problem.E),
        fresh_(problem.E, false),
        path_(problem.E),
        open_price_(problem.E),
        via_(problem.E),
        block_min_((problem.E + kBlock - 1) / kBlock) {}

  void run() {
    poll_();
    for (const int32_t row : place_all()) insert(row);
    const int32_t least = *std::min_element(p_.prices, p_.prices + p_.E);
    for (int64_t e = 0; e < p_.E; ++e) p_.prices[e] -= least;
  }

 private:
  void worked(int64_t entries) {
    if ((left_ -= entries) > 0) return;
    left_ = kWorkPerPoll;
    poll_();
  }

  const int32_t* cost(int64_t i) const { return p_.cost + i * p_.E; }
  bool has_room(int64_t e) const { return static_cast<int64_t>(members_[e].size()) < s_; }

  void join(int32_t i, int64_t e) {
    members_[e].push_back(i);
    p_.labels[i] = e;
    fresh_[e] = false;
  }

  // Rows to their cheapest experts while those have room, first the rows with the most to lose. Returns the others.
  std::vector<int32_t> place_all() {
    std::vector<std::pair<int32_t, int32_t>> gain_and_row(p_.f);
    for (int64_t i = 0; i < p_.f; ++i) gain_and_row[i] = {choose(i), static_cast<int32_t>(i)};
    std::sort(gain_and_row.begin(), gain_and_row.end());
    std::vector<int32_t> left_over;
    for (const auto& [gain, i] : gain_and_row) {
      if (has_room(p_.labels[i])) {
        join(i, p_.labels[i]);
      } else {
        left_over.push_back(i);
      }
    }
    return left_over;
  }

  // The label of the row's cheapest expert, the guess among equals; returns what the second cheapest would gain (<= 0).
  int32_t choose(int64_t i) {
    const int32_t* c = cost(i);
    int32_t best = kPassed, second = kPassed;
    int64_t at = 0;
    for (int64_t e = 0; e < p_.E; ++e) {
      const int32_t priced = c[e] + p_.prices[e];
      if (priced < best) {
        second = best;
        best = priced;
        at = e;
      } else if (priced < second) {
        second = priced;
      }
    }
    const int64_t guess = p_.labels[i];
    p_.labels[i] = guess >= 0 && c[guess] + p_.prices[guess] == best ? guess : at;
    return best - second;
  }

  void insert(int32_t row) {
    std::copy_n(cost(row), p_.E, path_.begin());
    std::copy_n(p_.prices, p_.E, open_price_.begin());
    std::fill(via_.begin(), via_.end(), -1);
    passed_.clear();
    int64_t end = nearest();
    while (!has_room(end)) {
      worked(2 * p_.E);
      passed_.emplace_back(end, path_[end] + open_price_[end]);
      open_price_[end] = kPassed;
      relax(end);
      end = nearest();
    }
    const int32_t length = path_[end] + open_price_[end];
    for (const auto& [e, distance] : passed_) p_.prices[e] += length - distance;
    shift(row, end);
  }

  // path_[e]: cost of the cheapest chain found to e, without e's price.
  void relax(int64_t a) {
    const int32_t* step = steps(a);
    const int32_t base = path_[a], here = static_cast<int32_t>(a);
    int32_t *path = path_.data(), *via = via_.data();
    for (int64_t e = 0; e < p_.E; ++e) {
      const int32_t through = base + step[e];
      via[e] = through < path[e] ? here : via[e];
      path[e] = through < path[e] ? through : path[e];
    }
  }

  // step(a, e) for every e, kept until the rows of a change.
  const int32_t* steps(int64_t a) {
    std::vector<int32_t>& kept = steps_[a];
    if (fresh_[a]) return kept.data();
    worked(static_cast<int64_t>(members_[a].size()) * p_.E);
    kept.assign(p_.E, kInfinite);
    int32_t* step = kept.data();
    for (const int32_t i : members_[a]) {
      const int32_t* c = cost(i);
      const int32_t here = c[a];
      for (int64_t e = 0; e < p_.E; ++e) step[e] = std::min(step[e], c[e] - here);
    }
    fresh_[a] = true;
    return step;
  }

  // The open expert at the least distance; among equals one with room, which ends the search, else the first.
  int64_t nearest() {
    int32_t least = kInfinite;
    for (size_t n = 0; n < block_min_.size(); ++n) {
      int32_t m = kInfinite;
      for (int64_t e = n * kBlock, end = block_end(n); e < end; ++e) m = std::min(m, path_[e] + open_price_[e]);
      block_min_[n] = m;
      least = std::min(least, m);
    }
    int64_t first = -1;
    for (size_t n = 0; n < block_min_.size(); ++n) {
      if (block_min_[n] != least) continue;
      for (int64_t e = n * kBlock, end = block_end(n); e < end; ++e) {
        if (path_[e] + open_price_[e] != least) continue;
        if (has_room(e)) return e;
        if (first < 0) first = e;
      }
    }
    return first;
  }

  int64_t block_end(size_t n) const { return std::min(p_.E, static_cast<int64_t>(n + 1) * kBlock); }

  // Moves one row along every step of the path that ends at `to`, the last step first, and `row` in at its start.
  void shift(int32_t row, int64_t to) {
    for (int64_t from = via_[to]; from >= 0; to = from, from = via_[to]) {
      const auto it = std::find_if(members_[from].begin(), members_[from].end(),
                                   [&](int32_t i) { return cost(i)[to] - cost(i)[from] == steps_[from][to]; });
      if (it == members_[from].end()) throw std::runtime_error("assign: cost was written to while it was solved");
      const int32_t moved = *it;
      members_[from].erase(it);
      join(moved, to);
    }
    join(row, to);
  }

  const Assignment p_;
  const std::function<void()>& poll_;
  int64_t left_ = kWorkPerPoll;  // until the next poll
  const int64_t s_;
  std::vector<std::vector<int32_t>> members_, steps_;         // rows of every expert; steps from it
  std::vector<bool> fresh_;                                   // steps_ is that of members_
  std::vector<int32_t> path_, open_price_, via_, block_min_;  // of one search, by expert
  std::vector<std::pair<int64_t, int32_t>> passed_;           // experts that the search has left, with their distance
};

}  // namespace

void solve(const Assignment& problem, const std::function<void()>& poll) { Solver(problem, poll).run(); }

}  // namespace sadmoe
