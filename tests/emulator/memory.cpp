#include "emulator/memory.h"

#include <cstring>

namespace sadmoe::emulator {

std::string Span::at(const void* p) const { return name + " + " + std::to_string(static_cast<const char*>(p) - begin); }

void Memory::begin_block(char* shared, size_t bytes, int threads) {
  shared_.name = "shared memory";
  shared_.begin = shared, shared_.end = shared + bytes;
  shared_.element = 2;
  shared_.writable = shared_.shared = true;
  shared_.cells.resize(bytes / shared_.element + 1);
  for (Cell& cell : shared_.cells) cell.in_flight = cell.multiplied = 0;
  std::memset(shared, 0xff, bytes);
  block_phase_ = ++phase_;
  clocks.begin_block(threads);
}

bool Memory::ordered(const Span& span, const Mark& mark, int thread) const {
  if (mark.phase < (span.shared ? block_phase_ : launch_phase_)) return true;
  if (mark.phase < block_phase_) return false;
  const bool by_barrier = mark.phase < phase_ && mark.thread != clocks.engine();
  return by_barrier || mark.thread == thread || clocks.has_seen(thread, mark);
}

std::string Memory::race(const Span& span, const void* p, const char* now, const char* before, const Mark& mark) const {
  const std::string by = mark.phase < block_phase_        ? "by another block"
                         : mark.thread == clocks.engine() ? "by the copy engine"
                                                          : "by thread " + std::to_string(mark.thread);
  return "data race on " + span.at(p) + ": " + now + ", unordered with a " + before + " " + by;
}

// What an access may not come after: the last write or, of a write, the last reads. Null where it comes in order.
const Mark* Memory::unordered(const Span& span, const Cell& cell, Access kind, int thread) const {
  if (!ordered(span, cell.write, thread)) return &cell.write;
  if (kind == Access::write)
    for (const Mark* mark : {&cell.read, &cell.other})
      if (!ordered(span, *mark, thread)) return mark;
  return nullptr;
}

void Memory::remember(Cell& cell, Access kind, int thread) {
  const Mark mark{phase_, thread, clocks.now(thread)};
  if (kind == Access::write) {
    cell.write = mark;
    return;
  }
  if (cell.read.thread != thread || cell.read.phase < block_phase_) cell.other = cell.read;
  cell.read = mark;
}

std::string Memory::access(const void* p, size_t n, size_t alignment, Access kind, int thread) {
  const char *word = kind == Access::read ? "read" : "write", *first = static_cast<const char*>(p), *last = first + n - 1;
  Span* span = shared_.contains(p) ? &shared_ : nullptr;
  for (size_t i = 0; !span && i < spans.size(); ++i)
    if (spans[i]->contains(p)) span = spans[i].get();
  if (!span || last >= span->end)
    return std::string(word) + " of " + std::to_string(n) + " bytes out of bounds" +
           (span ? ", past the end of " + span->name : "");
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    return std::string("misaligned ") + word + " of " + std::to_string(n) + " bytes of " + span->at(p);
  if (!span->writable) return kind == Access::read ? "" : "write to read-only " + span->at(p);
  const size_t element = (first - span->begin) / span->element;
  Cell* cell = &span->cells[element];
  for (const char* at = span->begin + element * span->element; at <= last; at += span->element, ++cell) {
    if (cell->in_flight) return std::string(word) + " of " + span->at(at) + " while a copy to it is in flight";
    if (kind == Access::write && cell->multiplied) return "write of " + span->at(at) + " while a product reads it";
    if (kind == Access::read && !span->initialised && cell->write.phase < (span->shared ? block_phase_ : 1))
      return "read of uninitialised " + span->at(at);
    if (const Mark* mark = unordered(*span, *cell, kind, thread))
      return race(*span, at, word, mark == &cell->write ? "write" : "read", *mark);
    remember(*cell, kind, thread);
  }
  return {};
}

bool Memory::may_be_written(const void* p) const {
  for (const auto& span : spans)
    if (span->contains(p)) return span->writable;
  return false;
}

template <class Body>
void Memory::each_shared(const void* p, size_t n, Body body) {
  const size_t first = static_cast<const char*>(p) - shared_.begin;
  for (size_t i = first / shared_.element; i < (first + n) / shared_.element; ++i) body(shared_.cells[i]);
}

void Memory::set_in_flight(const void* p, size_t n, int change) {
  each_shared(p, n, [&](Cell& cell) { cell.in_flight += change; });
}

void Memory::set_multiplied(const void* p, size_t n, int change) {
  each_shared(p, n, [&](Cell& cell) { cell.multiplied += change; });
}

void Memory::land(const void* p, size_t n) {
  const int engine = clocks.engine();
  each_shared(p, n, [&](Cell& cell) { cell.write = {phase_, engine, clocks.now(engine)}; });
}

std::string Memory::unfenced(const void* p, size_t n) const {
  const size_t first = static_cast<const char*>(p) - shared_.begin;
  for (size_t i = first / shared_.element; i < (first + n) / shared_.element; ++i)
    if (const Mark& mark = shared_.cells[i].write; mark.phase >= block_phase_ && !clocks.is_fenced(mark))
      return shared_.at(shared_.begin + i * shared_.element) + ", which thread " + std::to_string(mark.thread) +
             " wrote, without fence_async";
  return {};
}

}  // namespace sadmoe::emulator
