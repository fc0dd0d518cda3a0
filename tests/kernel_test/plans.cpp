#include "plans.h"

#include <cstdio>
#include <random>

#include "cpu/block_plan.h"

namespace sadmoe::test {
namespace {

// On both sides of a group of tokens.
constexpr int64_t kTokens[] = {0, 1, 2, 31, 32, 33, 64, 65, 100, 512}, kExperts[] = {1, 2, 7, 64, 129};
constexpr double kShares[] = {0, 0.02, 0.5, 1};

bool holds(const std::vector<uint8_t>& mask, int64_t T, int64_t E, const cpu::BlockPlan& plan) {
  size_t active = 0;
  int32_t pairs = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (plan.offsets[e] != pairs) return false;
    for (int64_t t = 0; t < T; ++t)
      if (mask[t * E + e] && (pairs == plan.pairs() || plan.rows[pairs++] != t)) return false;
    if (plan.count(e) != pairs - plan.offsets[e]) return false;
    if (plan.count(e) && (active == plan.active.size() || plan.active[active++] != e)) return false;
  }
  return pairs == plan.pairs() && plan.rows.size() == size_t(pairs) && active == plan.active.size();
}

}  // namespace

bool plans_hold() {
  std::mt19937 random(1);
  cpu::BlockPlan plan;  // built again and again: nothing of one mask is left in the next
  int count = 0, wrong = 0;
  for (const int64_t T : kTokens)
    for (const int64_t E : kExperts)
      for (const double share : kShares) {
        std::vector<uint8_t> mask(T * E);
        for (uint8_t& chosen : mask)  // true may be any byte but 0
          chosen = random() < share * 4294967296.0 ? 1 + random() % 255 : 0;
        plan.build(reinterpret_cast<const bool*>(mask.data()), T, E);
        ++count;
        if (holds(mask, T, E, plan)) continue;
        ++wrong;
        std::printf("plan of T=%d E=%d, a share of %g: not that of the mask\n", int(T), int(E), share);
      }
  std::printf("%-12s %5d results, %d wrong\n", "plans", count, wrong);
  return wrong == 0;
}

}  // namespace sadmoe::test
