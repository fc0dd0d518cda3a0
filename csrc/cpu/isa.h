// What the processor is, and which instruction set runs: the fastest it has, or the one a test or bench asks for.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sadmoe::cpu {

std::vector<std::string> supported_isas();  // on this processor, fastest first
bool use_isa(const std::string& isa);       // for the whole process; "auto" is the fastest. False where unsupported
void use_kernels(const Kernels& some);      // or these, which this processor must be able to run
const Kernels& kernels();                   // the chosen ones
int64_t near_cache();                       // bytes of a core's first-level cache of data

}  // namespace sadmoe::cpu
