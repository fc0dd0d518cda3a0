#include "cpu/isa.h"

#include <atomic>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sadmoe::cpu {
namespace {

bool runs_portable() { return true; }
#if defined(__aarch64__)
bool runs_neon() { return true; }
#endif
#if defined(__x86_64__)
bool runs_f16c() {  // by hand: clang knows its name since 18
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29);
  }();
  return found;
}
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && runs_f16c(); }
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool runs_avx512vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool runs_avx512bf16() { return runs_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
bool runs_avx512zen5() {
  static const bool found = [] {
    constexpr unsigned kZen5 = 0x1a;
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 15) + (a >> 20 & 255) >= kZen5;  // the family
  }();
  return found && runs_avx512bf16();
}

// Linux lends the tile registers to processes that ask; the answer holds for all threads.
bool runs_amx() {
#if defined(__linux__)
  static const bool lent = [] {
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    constexpr long kAskForFeature = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    return runs_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
           syscall(SYS_arch_prctl, kAskForFeature, kTileData) == 0;
  }();
  return lent;
#else
  return false;
#endif
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

void use_kernels(const Kernels& some) { chosen = &some; }

const Kernels& kernels() {
  static const Kernels& best = fastest();
  const Kernels* one = chosen.load();
  return one ? *one : best;
}

int64_t near_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  constexpr int64_t found = 0;
#endif
  return found > 0 ? found : 32 * 1024;  // what most have
}

}  // namespace sadmoe::cpu
