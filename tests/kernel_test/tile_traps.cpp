// The instructions of AMX that the kernels use, as the manual describes them (Intel SDM, volume 2, "AMX Instruction Reference"),
// but that the unit takes denormal bf16 for 0: a processor without them raises SIGILL, whose handler reads the instruction, does
// its work, and goes on after it. What would fault on a processor with them ends the test.
#include "tile_traps.h"

#if defined(__linux__) && defined(__x86_64__)
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/isa.h"

namespace sadmoe::test {
namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Unit {
  bool configured = false;
  int rows[kTiles], bytes[kTiles];
  alignas(64) uint8_t tiles[kTiles][kRows][kBytes];
};
thread_local Unit unit;

[[noreturn]] void fault(const char* what) {
  const auto say = [](const char* text) { (void)!write(2, text, std::strlen(text)); };
  say("an instruction of AMX would fault: "), say(what), say("\n");
  _exit(3);
}

void need(bool holds, const char* what) {
  if (!holds) fault(what);
}

// One instruction: VEX of three bytes, an opcode, and what it works on.
class Instruction {
 public:
  Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {
    need(code[0] == 0xc4 && (code[1] & 0x1f) == 2 && !(code[2] & 0x84), "not one of map 0F38, with W and L 0");
    prefix = code[2] & 3, opcode = code[3], modrm_ = code[4];
    third = ~code[2] >> 3 & 15;
  }

  enum Prefix { none, p66, pF3, pF2 };
  int prefix, opcode, third;  // third: the operand in VEX.vvvv

  bool of_registers() const { return modrm_ >> 6 == 3; }
  int reg() const { return modrm_ >> 3 & 7; }
  int rm() const { return modrm_ & 7; }
  bool has_sib() const { return rm() == 4; }
  // Of registers, none of them an upper one: there are eight tiles.
  bool of_tiles() const { return of_registers() && (code_[1] & 0xa0) == 0xa0; }

  // Of an operand in memory: where it begins, without the index of a tile's rows, and how far they are apart.
  uint8_t* base() const {
    int64_t at = has_sib() ? (no_base() ? 0 : general(sib() & 7, code_[1] & 0x20)) : general(rm(), code_[1] & 0x20);
    if (has_sib() && !is_tile() && index() != 4) at += stride();
    int8_t near;
    int32_t far;
    const uint8_t* displacement = code_ + 5 + has_sib();
    std::memcpy(&near, displacement, 1), std::memcpy(&far, displacement, 4);
    if (!has_sib() && rm() == 5 && modrm_ >> 6 == 0) at = reinterpret_cast<int64_t>(code_) + size();  // of what comes next
    return reinterpret_cast<uint8_t*>(at + (displaced() == 1 ? near : displaced() == 4 ? far : 0));
  }
  int64_t stride() const { return index() == 4 ? 0 : general(index() & 7, index() < 8 ? 0x40 : 0) << (sib() >> 6); }
  int64_t size() const { return of_registers() ? 5 : 5 + has_sib() + displaced(); }

 private:
  bool is_tile() const { return opcode == 0x4b; }
  uint8_t sib() const { return code_[5]; }
  int index() const { return (sib() >> 3 & 7) + (code_[1] & 0x40 ? 0 : 8); }
  bool no_base() const { return (sib() & 7) == 5 && modrm_ >> 6 == 0; }
  int displaced() const {
    const int mode = modrm_ >> 6;
    return mode == 1 ? 1 : mode == 2 || (has_sib() ? no_base() : rm() == 5) ? 4 : 0;
  }
  // VEX has the upper bit of a register's number inverted.
  int64_t general(int low, int not_upper) const {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[low + (not_upper ? 0 : 8)]];
  }

  const uint8_t* code_;
  const greg_t* registers_;
  uint8_t modrm_;
};

void configure(const uint8_t* from) {
  need(from[0] == 1, "LDTILECFG: palette 1");
  for (int i = 1; i < 16; ++i) need(from[i] == 0, "LDTILECFG: no row to start from, and zeros");
  for (int t = 0; t < 16; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, from + 16 + 2 * t, 2);
    const int rows = from[48 + t];
    if (t >= kTiles) {
      need(!bytes && !rows, "LDTILECFG: eight tiles");
      continue;
    }
    need(bytes <= kBytes && rows <= kRows && !bytes == !rows, "LDTILECFG: tiles of up to 16 rows of 64 bytes");
    unit.bytes[t] = bytes, unit.rows[t] = rows;
  }
  std::memset(unit.tiles, 0, sizeof unit.tiles);
  unit.configured = true;
}

void in_use(int tile) { need(unit.configured && tile < kTiles && unit.rows[tile], "a tile that is not configured"); }

float wide(const uint8_t* bf16) {
  uint16_t half;
  std::memcpy(&half, bf16, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// sum += the products of two neighbours, or of four, in 32 bits.
void multiply_bf16(uint8_t* sum, const uint8_t (*a)[4], const uint8_t (*b)[kBytes], int depth) {
  float both[2] = {0, 0}, before;
  for (int k = 0; k < depth; ++k)
    for (int i = 0; i < 2; ++i) both[i] = std::fma(wide(a[k] + 2 * i), wide(b[k] + 2 * i), both[i]);
  std::memcpy(&before, sum, 4);
  before += both[0] + both[1];
  std::memcpy(sum, &before, 4);
}

template <class A, class B>
void multiply_bytes(uint8_t* sum, const uint8_t (*a)[4], const uint8_t (*b)[kBytes], int depth) {
  uint32_t total;
  std::memcpy(&total, sum, 4);
  for (int k = 0; k < depth; ++k)
    for (int i = 0; i < 4; ++i) total += static_cast<uint32_t>(static_cast<A>(a[k][i]) * static_cast<B>(b[k][i]));
  std::memcpy(sum, &total, 4);
}

template <class Multiply>
void product(const Instruction& it, Multiply multiply) {
  const int c = it.reg(), a = it.rm(), b = it.third;
  need(it.of_tiles(), "a product of three tiles");
  in_use(a), in_use(b), in_use(c);
  need(a != b && b != c && a != c, "a product of three different tiles");
  need(unit.rows[c] == unit.rows[a] && unit.bytes[c] == unit.bytes[b] && unit.bytes[a] == 4 * unit.rows[b],
       "a product of tiles whose shapes match");
  for (int i = 0; i < unit.rows[c]; ++i)
    for (int j = 0; j < unit.bytes[c]; j += 4)
      multiply(unit.tiles[c][i] + j, reinterpret_cast<const uint8_t (*)[4]>(unit.tiles[a][i]),
               reinterpret_cast<const uint8_t (*)[kBytes]>(unit.tiles[b][0] + j), unit.rows[b]);
}

void load_or_store(const Instruction& it, bool load) {
  in_use(it.reg());
  need(it.has_sib() && it.third == 0, "TILELOADD, TILESTORED: a base, an index, and no third operand");
  uint8_t* memory = it.base();
  for (int i = 0; i < kRows; ++i, memory += it.stride()) {
    uint8_t* row = unit.tiles[it.reg()][i];
    const int bytes = i < unit.rows[it.reg()] ? unit.bytes[it.reg()] : 0;
    if (load)
      std::memset(row, 0, kBytes), std::memcpy(row, memory, bytes);
    else
      std::memcpy(memory, row, bytes);
  }
}

void run(const Instruction& it) {
  using I = Instruction;
  switch (it.opcode << 8 | it.prefix) {
    case 0x49 << 8 | I::none:
      if (!it.of_registers()) return configure(it.base());
      return unit.configured = false, void();  // TILERELEASE
    case 0x49 << 8 | I::pF2:
      in_use(it.reg());
      return std::memset(unit.tiles[it.reg()], 0, sizeof unit.tiles[0]), void();
    case 0x4b << 8 | I::pF2:
      return load_or_store(it, true);
    case 0x4b << 8 | I::pF3:
      return load_or_store(it, false);
    case 0x5c << 8 | I::pF3:
      return product(it, multiply_bf16);
    case 0x5e << 8 | I::pF2:
      return product(it, multiply_bytes<int8_t, int8_t>);
    case 0x5e << 8 | I::p66:
      return product(it, multiply_bytes<uint8_t, int8_t>);
    default:
      fault("unknown to this test");
  }
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction it(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  run(it);
  registers[REG_RIP] += it.size();
}

bool has(const std::vector<std::string>& isas, const char* isa) { return std::find(isas.begin(), isas.end(), isa) != isas.end(); }

}  // namespace

const cpu::Kernels* kernels_by_traps() {
  static const cpu::Kernels* const kFound = []() -> const cpu::Kernels* {
    const auto isas = cpu::supported_isas();
    if (has(isas, "amx") || !has(isas, "avx512bf16")) return nullptr;
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGILL, &action, nullptr) ? nullptr : &cpu::kernels_amx();
  }();
  return kFound;
}

}  // namespace sadmoe::test
#else
namespace sadmoe::test {

const cpu::Kernels* kernels_by_traps() { return nullptr; }

}  // namespace sadmoe::test
#endif
