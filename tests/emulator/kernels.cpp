// The kernels, as they are, for the emulator.
#include "cuda/launch.cu"
