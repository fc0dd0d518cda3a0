// What code compiled with -fsanitize=thread calls at each access to memory.
#include <cstring>

#include "emulator/emulator.h"

using sadmoe::emulator::Access;
using sadmoe::emulator::seen;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) { seen(p, n, 1, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { seen(p, n, 1, Access::write, __builtin_return_address(0)); }
#define SADMOE_HOOKS(n)                                                                                \
  void __tsan_read##n(void* p) { seen(p, n, n, Access::read, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { seen(p, n, n, Access::write, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##n(void* p) { seen(p, n, n, Access::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { seen(p, n, n, Access::write, __builtin_return_address(0)); }
SADMOE_HOOKS(1)
SADMOE_HOOKS(2)
SADMOE_HOOKS(4)
SADMOE_HOOKS(8)
SADMOE_HOOKS(16)
void* __tsan_memset(void* to, int value, size_t n) {
  seen(to, n, 1, Access::write, __builtin_return_address(0));
  return std::memset(to, value, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  seen(from, n, 1, Access::read, __builtin_return_address(0));
  seen(to, n, 1, Access::write, __builtin_return_address(0));
  return std::memcpy(to, from, n);
}
}
