#include "emulator/source_line.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

namespace sadmoe::emulator {

std::string source_line(void* pc) {
  Dl_info image;
  if (!pc || !dladdr(pc, &image)) return {};
  char command[1024], line[512] = "";
  const auto offset = static_cast<char*>(pc) - static_cast<char*>(image.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -Cs -e '%s' 0x%tx 2>/dev/null", image.dli_fname, offset);
  if (FILE* pipe = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  line[std::strcspn(line, " \n")] = 0;
  return line[0] ? std::string(" at ") + line : "";
}

std::string source_line(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

}  // namespace sadmoe::emulator
