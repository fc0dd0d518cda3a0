// The layer on a CUDA device, in plain pointers: what the bindings call. No torch, no CUDA headers. Nothing here
// allocates or waits: all is queued on the stream, and may be captured into a graph. Returns 0 or a cudaError_t.
#pragma once
#include <cstdint>

#include "contract.h"

namespace sadmoe::cuda {

// Makes a device current for this library's own copy of the CUDA runtime, beside torch's.
int use_device(int index);

struct Options {
  int64_t hidden_bytes = int64_t{512} << 20;  // of hidden activations at once; more tokens go in chunks
  int64_t decode_tokens = 64;  // at most these, and 64, go to the decode kernels, whose results are the same bit for bit
  bool tf32 = false;           // float32 experts by tensor cores, operands rounded to 11 bits; never the router
  bool hopper = true;          // the kernels of sm_90a, on such a device, where they fit
  // Shares of all pairs, negative: by the shape. From the first on every neuron is computed; the second makes tokens a crowd.
  double up_all = -1, crowd = -1;  // see up_all_share and crowd_share
  // Blocks of the down projection take so many times 64 tokens: 1, 2 or, of 16 bits and where they fit, 4; 0: by the shape.
  int64_t down_tiles = 0;
};

// scores [T, E]; hidden [T, r] is scratch. x, v1, v2 of any dtypes.
int router_scores(View x, const Router& router, const RouterShape& shape, const Options& options, float* hidden, float* scores,
                  void* stream);

int select(const float* scores, int64_t T, int64_t E, float tau, bool* mask, void* stream);

int masked_activation(const MaskedActivation& p, void* stream);

// Scratch of sparse_experts, bounded by the shapes alone, for any choice: tokens are taken in chunks, one after another.
struct Workspace {
  int64_t chunk;   // tokens
  int64_t words;   // int32
  int64_t starts;  // int32
  int64_t rows;    // int32
  int64_t h;       // elements of x's dtype, on 16 bytes
};
// Of options.hidden_bytes of h, or the least that one tile of tokens needs.
Workspace workspace(const ExpertsShape& shape, DType dtype, const Options& options);

struct Scratch {
  int32_t *words, *starts, *rows;
  void* h;
};
int sparse_experts(const Experts& experts, const Choice& choice, const Options& options, const Workspace& workspace,
                   const Scratch& scratch, void* stream);

struct Device {
  int multiprocessors;
  int shared;  // bytes of memory of each
};
// Tiles of 64 tokens in a block of the down projection on such a device, 1, 2 or, of 16 bits, 4: what the options ask for, where
// it fits, else with which a multiprocessor reads least.
int down_tiles(int64_t T, int64_t d_out, DType dtype, const Options& options, const Device& device);

// Where the tokens of a chunk chose at least this share of all experts, the hidden activations are computed as one dense product,
// of which those of pairs are kept: experts of few neurons use products worse. Above 1: never. warpgroups: by those of sm_90a.
double up_all_share(const ExpertsShape& shape, DType dtype, bool gated, bool warpgroups, const Options& options,
                    const Device& device);

// 256 tokens that chose at least this share of all experts are a crowd and go through all together, for that takes less time than
// to add up what each chose. Above 1: none do. warpgroups: by the products of sm_90a.
double crowd_share(const ExpertsShape& shape, DType dtype, bool warpgroups, const Options& options, const Device& device);

const char* error_string(int code);

}  // namespace sadmoe::cuda
