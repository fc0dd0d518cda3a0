// Products of warpgroups, in the background, and the registers that they need. A thread computes its own sums; the operands
// that it reads are checked in shares, so that a warpgroup checks all.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/source_line.h"
#include "emulator/tensor_core.h"

namespace sadmoe::emulator {

namespace {

constexpr uint64_t kSwizzle128 = 1;

// What of a product a place on the stack is; null: nothing.
const char* part_of(const Product& product, const char* p) {
  const auto within = [p](const void* begin, size_t bytes) {
    return p >= static_cast<const char*>(begin) && p < static_cast<const char*>(begin) + bytes;
  };
  if (within(product.sums, product.columns * 2)) return "sums are";
  return product.registers && within(product.registers, 16) ? "an operand is" : nullptr;
}

}  // namespace

// 8 elements of a row: depths 0-7 or 8-15. The operand as the instruction decodes it: where it begins, how far apart groups of
// 8 rows are, and the exchange of its address bits.
const char* Device::chunk(uint64_t operand, int row, int half) const {
  const size_t begin = (operand & 0x3fff) << 4, group = (operand >> 32 & 0x3fff) << 4;
  const size_t plain = begin + row / 8 * group + row % 8 * 128 + half * 16;
  return shared + (plain ^ (plain >> 7 & 7) << 4);
}

// Of this thread's share: a has a chunk for every thread of the warp.
template <class Body>
void Device::each_chunk(const Product& product, Body body) const {
  const int thread = position.thread % kWarpgroup;
  if (!product.registers) body(chunk(product.a, thread / 2, thread % 2));
  for (int i = thread; i < product.columns * 2; i += kWarpgroup) body(chunk(product.b, i / 2, i % 2));
}

// All warps of a warpgroup issue the same.
void Device::check_issued(const Product& product, const char* file, int line) {
  std::vector<Product>& issued = issued_[position.thread / kWarpgroup];
  const size_t i = current_->issued++;
  if (i == issued.size()) issued.push_back(product);
  const Product& other = issued[i];
  if (other.a != product.a || other.b != product.b || other.columns != product.columns || other.add != product.add)
    fail("warps of a warpgroup issue different products at " + source_line(file, line), nullptr);
}

// Rows of a from the registers of four lanes each, as multiply_16x8x16 has them.
void Device::gather_rows(Issued& product, const char* file, int line) {
  const auto* all = static_cast<const unsigned*>(meet(product.registers, 16, file, line));
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kProductDepth; ++k) {
      const int lane = position.thread % kWarp / 4 * 4 + k % 8 / 2;
      product.rows[half][k] = static_cast<uint16_t>(all[lane * 4 + k / 8 * 2 + half] >> k % 2 * 16);
    }
}

void Device::multiply(const Product& product, const char* file, int line, void* pc) {
  const uint64_t operands[] = {product.registers ? product.b : product.a, product.b};
  const void* all = meet(operands, sizeof operands, file, line);
  for (int lane = 0; lane < kWarp; ++lane)
    if (std::memcmp(static_cast<const char*>(all) + lane * sizeof operands, operands, sizeof operands))
      fail("lanes of a warp multiply different operands", pc);
  for (const uint64_t operand : operands)
    if (operand >> 62 != kSwizzle128) fail("an operand that is not swizzled by 128 bytes", pc);
  if (!current_->begun) fail("a product without begin_products", pc);
  for (const char* p : current_->touched)
    if (const char* part = part_of(product, p)) fail(part + std::string(" touched between begin_products and their product"), pc);
  check_issued(product, file, line);
  each_chunk(product, [&](const char* p) {
    if (!memory.is_shared(p, 16)) fail("an operand outside shared memory", pc);
    access(p, 16, 16, Access::read, pc);
    if (const std::string what = memory.unfenced(p, 16); !what.empty()) fail("a product reads " + what, pc);
    memory.set_multiplied(p, 16, 1);
  });
  Issued issued{product, {}};
  if (product.registers) gather_rows(issued, file, line);
  if (!late_copies) multiply_now(issued);
  current_->products.push_back(issued);
  ++products_issued;
}

// As multiply_16x8x16 adds.
void Device::multiply_now(const Issued& product) const {
  const int row0 = position.thread % kWarpgroup / kWarp * 16 + position.thread % kWarp / 4, t = position.thread % 4;
  const auto row_of = [&](uint64_t operand, int row, float (&to)[kProductDepth]) {
    for (int k = 0; k < kProductDepth; ++k) {
      uint16_t bits;
      std::memcpy(&bits, chunk(operand, row, k / 8) + k % 8 * 2, 2);
      to[k] = product.convert(bits);
    }
  };
  float a[2][kProductDepth], b[kProductDepth];
  for (int i = 0; i < 2; ++i)
    if (!product.registers)
      row_of(product.a, row0 + i * 8, a[i]);
    else
      for (int k = 0; k < kProductDepth; ++k) a[i][k] = product.convert(product.rows[i][k]);
  for (int i = 0; i < product.columns / 4; ++i) {  // this thread's columns
    row_of(product.b, i / 2 * 8 + t * 2 + i % 2, b);
    for (int half = 0; half < 2; ++half) {
      float& to = product.sums[i / 2 * 4 + half * 2 + i % 2];
      to = add_products<kProductDepth, 8>(product.add ? to : 0, a[half], b);
    }
  }
}

void Device::begin_products() { current_->begun = true, current_->touched.clear(); }

void Device::commit_products() {
  current_->begun = false;
  current_->product_commits.push_back(std::move(current_->products));
  current_->products.clear();
}

void Device::wait_products(int left) {
  auto& commits = current_->product_commits;
  while (static_cast<int>(commits.size()) > left) {
    for (const Issued& product : commits.front()) {
      each_chunk(product, [&](const char* p) { memory.set_multiplied(p, 16, -1); });
      if (late_copies) multiply_now(product);
    }
    commits.erase(commits.begin());
  }
}

// The kernel reads or writes its stack.
void Device::check_touch(const char* p, void* pc) {
  if (current_->begun) current_->touched.push_back(p);
  const auto check = [&](const std::vector<Issued>& products) {
    for (const Issued& product : products)
      if (const char* part = part_of(product, p)) fail(part + std::string(" touched before wait_products"), pc);
  };
  check(current_->products);
  for (const auto& products : current_->product_commits) check(products);
}

void Device::set_registers(int registers, bool more, const char* file, int line) {
  meet(&registers, sizeof registers, file, line);
  const int launched = 65536 / launch_->threads / 8 * 8;
  if (registers < 24 || registers > 256 || registers % 8 || (more ? registers < launched : registers > launched))
    fail("a thread of " + std::to_string(launched) + " registers cannot " + (more ? "take " : "give up all but ") +
             std::to_string(registers) + " at " + source_line(file, line),
         nullptr);
  current_->registers = registers;
}

// Empty where warpgroups agree, and together have no more than was launched.
std::string Device::too_many_registers() const {
  const int launched = 65536 / launch_->threads / 8 * 8;
  int all = 0;
  for (size_t t = 0; t < fibers_.size(); ++t) {
    all += fibers_[t].registers ? fibers_[t].registers : launched;
    if (fibers_[t].registers != fibers_[t / kWarpgroup * kWarpgroup].registers)
      return "warps of a warpgroup set different registers";
  }
  const int most = launched * static_cast<int>(fibers_.size());
  return all > most ? "a block of " + std::to_string(all) + " registers, launched with " + std::to_string(most) : "";
}

void multiply(const Product& product, const char* file, int line) {
  device().multiply(product, file, line, __builtin_return_address(0));
}
int64_t products() { return device().products_issued; }
void multiplied() { ++device().warp_threads_multiplied; }
int64_t warp_products() { return device().warp_threads_multiplied / kWarp; }
void begin_products() { device().begin_products(); }
void commit_products() { device().commit_products(); }
void wait_products(int left) { device().wait_products(left); }
void set_registers(int registers, bool more, const char* file, int line) { device().set_registers(registers, more, file, line); }

}  // namespace sadmoe::emulator
