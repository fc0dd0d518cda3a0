// The kernels, as they are, for the emulator.
#include "cuda/decode.cu"
#include "cuda/hopper.cu"
#include "cuda/launch.cu"
