// The 16-bit floats as bits.
#pragma once
#include <cstdint>

namespace sadmoe::cpu {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

}  // namespace sadmoe::cpu
