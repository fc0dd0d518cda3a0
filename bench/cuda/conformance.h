#pragma once

namespace bench {

// Runs every right twin of tests/emulator/planted.cuh on the device, and says which fail; how many.
int check_conformance();

// Those of planted_hopper.cuh, compiled for sm_90a alone; says so on another device.
int check_hopper();

}  // namespace bench
