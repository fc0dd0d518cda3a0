#pragma once
#include <string>

namespace sadmoe::emulator {

// " at file:line" of a machine address; empty without addr2line.
std::string source_line(void* pc);

// "file:line", the file without its folder.
std::string source_line(const char* file, int line);

}  // namespace sadmoe::emulator
