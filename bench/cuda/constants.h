#pragma once

namespace bench {

// Measures and writes them as JSON: rates in bytes/s and FLOP/s, times in s, streamed as a share of memory.
void measure_constants(const char* path);

}  // namespace bench
