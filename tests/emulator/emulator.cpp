// Fibers, their schedule, and where they meet. Compiled without instrumentation.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "emulator/machine.h"
#include "emulator/source_line.h"

#if !defined(__x86_64__)
#error "The emulator switches fibers in x86-64 assembly: port sadmoe_switch_fiber to this processor."
#endif

// Saves the callee-saved registers on the stack and its pointer in *from, and goes on where `to` was saved.
extern "C" void sadmoe_switch_fiber(void** from, void* to);
asm(R"(
.text
.type sadmoe_switch_fiber,@function
sadmoe_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace sadmoe::emulator {
namespace {

constexpr int kSavedRegisters = 6;
constexpr int kFailed = 719;  // cudaErrorLaunchFailure
constexpr int kInvalid = 9;   // cudaErrorInvalidConfiguration

}  // namespace

Device& device() {
  static Device one;
  return one;
}

void Device::leave() { sadmoe_switch_fiber(&current_->stack_pointer, main_stack_); }

void Device::fail(const std::string& what, void* pc) {
  if (error.empty())
    error = what + ", block (" + std::to_string(position.block_x) + ", " + std::to_string(position.block_y) + ") thread " +
            std::to_string(position.thread) + source_line(pc);
  for (;;) leave();
}

void Device::enter() {
  Device& d = device();
  d.launch_->kernel(d.launch_->parameters);
  if (!d.current_->waited) d.fail("a thread of a kernel launched early returns without wait_kernel_before", nullptr);
  d.current_->state = State::done;
  for (;;) d.leave();
}

void Device::start_fibers() {
  for (int t = 0; t < launch_->threads; ++t) {
    void** top = reinterpret_cast<void**>(stacks_ + (t + 1) * kStack - 64);
    *--top = nullptr;  // the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&Device::enter);
    for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
    fibers_[t] = Fiber{};
    fibers_[t].stack_pointer = top;
    fibers_[t].waited = !launch_->early;
  }
  for (Warp& warp : warps_) warp.meetings[0].arrived = warp.meetings[1].arrived = 0;
  waiting_ = 0;
  flags_.clear();
  tile_loads_.clear();
  issued_.assign((launch_->threads + kWarpgroup - 1) / kWarpgroup, {});
}

// 0, 1, ... in the order of the schedule.
template <class Index>
void Device::arrange(std::vector<Index>& turns, std::mt19937& random) const {
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::reverse) std::reverse(turns.begin(), turns.end());
  if (order == Order::random) std::shuffle(turns.begin(), turns.end(), random);
}

bool Device::may_run(const Fiber& fiber) const {
  return fiber.state == State::ready || (fiber.state == State::at_flag && fiber.flag->phase % 2 != fiber.parity);
}

// Every fiber as far as it gets; whether one got anywhere.
bool Device::pass(std::mt19937& random) {
  bool progress = false;
  arrange(turns_, random);
  for (const int t : turns_) {
    if (!may_run(fibers_[t]) || (order == Order::random && progress && random() % 3 == 0)) continue;
    progress = true;
    position.thread = t;
    current_ = &fibers_[t];
    sadmoe_switch_fiber(&main_stack_, fibers_[t].stack_pointer);
    current_ = nullptr;
    if (!error.empty()) break;
  }
  return progress;
}

// Tiles land when nobody can go on without; in random order, at times before.
void Device::run_block(int64_t block) {
  position = {0, block % launch_->blocks_x, block / launch_->blocks_x, launch_->blocks_x, launch_->blocks_y};
  memory.begin_block(shared, launch_->shared_bytes, launch_->threads);
  start_fibers();
  std::mt19937 random(seed + static_cast<unsigned>(block));
  for (bool going = true; going && error.empty();) {
    going = pass(random);
    const size_t loads = tile_loads_.size();
    if (error.empty() && loads && (!going || (order == Order::random && random() % 4 == 0))) {
      going = true;
      land_tile(order == Order::random ? random() % loads : 0);
    }
  }
  if (error.empty()) error = stuck();
  if (error.empty()) error = too_many_registers();
}

// Empty when every thread has returned.
std::string Device::stuck() const {
  const auto is = [&](bool done) {
    return std::find_if(fibers_.begin(), fibers_.end(), [&](const Fiber& f) { return (f.state == State::done) == done; });
  };
  const auto waits = is(false), done = is(true);
  if (waits == fibers_.end()) return {};
  return "deadlock: thread " + std::to_string(waits - fibers_.begin()) + " waits at " + source_line(waits->file, waits->line) +
         (done != fibers_.end() ? ", thread " + std::to_string(done - fibers_.begin()) + " has returned" : "");
}

int Device::run(const Launch& launch) {
  const std::lock_guard<std::mutex> guard(lock);
  error.clear();
  if (launch.threads < kWarp || launch.threads > kMaxThreads || launch.threads % kWarp || launch.shared_bytes > kMaxShared ||
      launch.blocks_x < 1 || launch.blocks_x > INT32_MAX || launch.blocks_y < 1 || launch.blocks_y > 65535) {
    error = "invalid launch: " + std::to_string(launch.blocks_x) + " x " + std::to_string(launch.blocks_y) + " blocks of " +
            std::to_string(launch.threads) + " threads, " + std::to_string(launch.shared_bytes) + " bytes of shared memory";
    return kInvalid;
  }
  if (!stacks_) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks_ = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
  }
  launch_ = &launch;
  current_ = nullptr;
  fibers_.resize(launch.threads), turns_.resize(launch.threads), warps_.resize(launch.threads / kWarp);
  std::vector<char> buffer(kMaxShared + 1024);
  shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(buffer.data()) + 1023) / 1024 * 1024);
  memory.begin_launch();
  std::vector<int64_t> blocks(launch.blocks_x * launch.blocks_y);
  std::mt19937 random(seed);
  arrange(blocks, random);
  for (const int64_t block : blocks)
    if (error.empty()) run_block(block);
  return error.empty() ? 0 : kFailed;
}

void Device::set_waiting(State state, const char* file, int line) {
  current_->state = state;
  current_->file = file;
  current_->line = line;
}

void Device::barrier(const char* file, int line) {
  set_waiting(State::at_barrier, file, line);
  if (++waiting_ == launch_->threads) {
    for (const Fiber& f : fibers_)
      if (f.line != line || std::strcmp(f.file, file))
        fail("divergent barrier: " + source_line(file, line) + " and " + source_line(f.file, f.line), nullptr);
    for (Fiber& f : fibers_) f.state = State::ready;
    waiting_ = 0;
    memory.next_phase();
  }
  leave();
}

const void* Device::meet(const void* bytes, size_t n, const char* file, int line) {
  const int first = position.thread / kWarp * kWarp;
  Meeting& meeting = warps_[position.thread / kWarp].meetings[current_->meetings++ % 2];
  if (meeting.arrived == 0) meeting.n = n, meeting.file = file, meeting.line = line;
  if (meeting.line != line || meeting.n != n || std::strcmp(meeting.file, file))
    fail("lanes of a warp meet in different operations: " + source_line(meeting.file, meeting.line) + " and " +
             source_line(file, line),
         nullptr);
  std::memcpy(meeting.bytes + (position.thread - first) * n, bytes, n);
  set_waiting(State::in_warp, file, line);
  if (++meeting.arrived == kWarp) {
    for (int t = first; t < first + kWarp; ++t) fibers_[t].state = State::ready;
    meeting.arrived = 0;
  }
  leave();
  return meeting.bytes;
}

bool Device::on_host(const char* p) const {
  const char* parameters = static_cast<const char*>(launch_->parameters);
  return (p >= stacks_ && p < stacks_ + kMaxThreads * kStack) || (p >= parameters && p < parameters + launch_->parameters_bytes);
}

void Device::sync_warp(const char* file, int line) {
  Meeting& meeting = warps_[position.thread / kWarp].meetings[current_->meetings % 2];
  if (meeting.arrived == 0) meeting.told.clear();
  memory.clocks.tell(position.thread, meeting.told);
  const char nothing = 0;
  meet(&nothing, sizeof nothing, file, line);
  memory.clocks.hear(position.thread, meeting.told);
}

void Device::access(const void* p, size_t n, size_t alignment, Access kind, void* pc) {
  if (on_host(static_cast<const char*>(p))) return check_touch(static_cast<const char*>(p), pc);
  if (!current_->waited && memory.may_be_written(p)) fail("memory that a kernel writes is touched before wait_kernel_before", pc);
  const std::string what = memory.access(p, n, alignment, kind, position.thread);
  if (!what.empty()) fail(what, pc);
}

const Position& here() { return device().position; }
void* shared_memory() { return device().shared; }
size_t shared_offset(const void* p) { return static_cast<const char*>(p) - device().shared; }
void barrier(const char* file, int line) { device().barrier(file, line); }
const void* meet(const void* bytes, size_t n, const char* file, int line) { return device().meet(bytes, n, file, line); }
void wait_kernel_before() { device().wait_kernel_before(); }
void sync_warp(const char* file, int line) { device().sync_warp(file, line); }
void check_read(const void* p, size_t n, size_t alignment) {
  device().access(p, n, alignment, Access::read, __builtin_return_address(0));
}
void seen(const void* p, size_t n, size_t alignment, Access kind, void* pc) {
  if (device().running()) device().access(p, n, alignment, kind, pc);
}
int run(const Launch& launch) {
  ++device().launched;
  return device().run(launch);
}
int64_t launches() { return device().launched; }
const char* last_error() { return device().error.c_str(); }

void schedule(Order order, unsigned seed, bool late_copies) {
  const std::lock_guard<std::mutex> guard(device().lock);
  device().order = order, device().seed = seed, device().late_copies = late_copies;
}

Region::Region(const char* name, const void* data, size_t bytes, size_t element, Use use) {
  const bool writable = use != Use::read, initialised = use != Use::write;
  const std::lock_guard<std::mutex> guard(device().lock);
  const char* begin = static_cast<const char*>(data);
  span_ = new Span{name, begin, begin + bytes, element, writable, initialised, false, {}};
  device().memory.spans.emplace_back(span_);
  if (!writable) return;
  span_->cells.resize(bytes / element + 1);
  if (!initialised) std::memset(const_cast<void*>(data), 0xff, bytes);
}

Region::~Region() {
  const std::lock_guard<std::mutex> guard(device().lock);
  auto& spans = device().memory.spans;  // other threads may have added theirs since
  spans.erase(std::find_if(spans.begin(), spans.end(), [this](const auto& span) { return span.get() == span_; }));
}

}  // namespace sadmoe::emulator
