#pragma once

namespace bench {

// Runs every right twin of tests/emulator/planted.cuh on the device, and says which fail; how many.
int check_conformance();

}  // namespace bench
