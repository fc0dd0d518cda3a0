#include "cpu/isa.h"

#include <atomic>

namespace sadmoe::cpu {
namespace {

bool runs_portable() { return true; }
#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

struct Entry {
  const char* isa;
  bool (*runs)();
  const Kernels& (*kernels)();
};

constexpr Entry kEntries[] = {
#define SADMOE_KERNELS(isa) {#isa, runs_##isa, kernels_##isa},
#include "cpu/kernels.inc"
#undef SADMOE_KERNELS
};

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& fastest() {
  for (const Entry& entry : kEntries)
    if (entry.runs()) return entry.kernels();
  return kernels_portable();
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries)
    if (entry.runs()) names.emplace_back(entry.isa);
  return names;
}

bool use_isa(const std::string& isa) {
  if (isa == "auto") return chosen = nullptr, true;
  for (const Entry& entry : kEntries)
    if (isa == entry.isa && entry.runs()) return chosen = &entry.kernels(), true;
  return false;
}

const Kernels& kernels() {
  const Kernels* one = chosen.load();
  return one ? *one : fastest();
}

}  // namespace sadmoe::cpu
