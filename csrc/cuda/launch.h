// The layer on a CUDA device, in plain pointers: what the bindings call. No torch, no CUDA headers. Nothing here
// allocates or waits: all is queued on the stream, and may be captured into a graph. Returns 0 or a cudaError_t.
#pragma once
#include <cstdint>

#include "contract.h"

namespace sadmoe::cuda {

// Makes a device current for this library's own copy of the CUDA runtime, beside torch's.
int use_device(int index);

// scores [T, E]; hidden [T, r] is scratch. x, v1, v2 of any dtypes.
int router_scores(View x, const Router& router, const RouterShape& shape, float* hidden, float* scores, void* stream);

int select(const float* scores, int64_t T, int64_t E, float tau, bool* mask, void* stream);

// Scratch of sparse_experts, bounded by the shapes alone, for any mask: tokens are taken in chunks, one after another.
struct Workspace {
  int64_t chunk;   // tokens
  int64_t starts;  // int32
  int64_t rows;    // int32
  int64_t h;       // elements of x's dtype, on 16 bytes
};
// `limit` bytes of h, or the least that one tile of tokens needs.
Workspace workspace(const ExpertsShape& shape, DType dtype, int64_t limit);

struct Scratch {
  int32_t *starts, *rows;
  void* h;
};
int sparse_experts(const Experts& experts, const bool* mask, const Workspace& workspace, const Scratch& scratch, void* stream);

const char* error_string(int code);

}  // namespace sadmoe::cuda
