// Plans of a block of the mask, against the mask itself.
#pragma once

namespace sadmoe::test {

// Whether every pair is in one row of its expert, rows ascend, and the counts, offsets and active experts are right. Tells what
// is not.
bool plans_hold();

}  // namespace sadmoe::test
