// Memory on the device that frees itself, and the one timer of bench_cuda.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace bench {

inline void must(int code, const char* what) {
  if (code == 0) return;
  std::fprintf(stderr, "bench_cuda: %s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(code)));
  std::exit(3);  // 1: something was found to be wrong
}

// Bytes on the device, at first zero.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    must(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "cudaMalloc");
    must(cudaMemset(data_, 0, bytes), "cudaMemset");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// In so many cycles the host asks for all that is timed: else it would be waited for.
template <class Cycles>
__global__ void wait_for_host(Cycles cycles) {
  const Cycles begin = clock64();
  while (clock64() - begin < cycles) {
  }
}

// Seconds of one call(i, stream), i = 0, 1, ..., calls - 1: those are captured into one graph, whose replays are timed.
// The median of the replays.
template <class Call>
double seconds(Call call, int calls = 20, int replays = 30) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  cudaEvent_t begin, end;
  must(cudaStreamCreate(&stream), "cudaStreamCreate");
  call(0, stream);  // what a first call sets up must not be captured
  must(cudaStreamSynchronize(stream), "a first call");
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i) call(i, stream);
  must(cudaStreamEndCapture(stream, &graph), "end of capture");
  must(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  long long ahead = 200000;
  for (int i = -6; i < replays; ++i) {
    wait_for_host<<<1, 1, 0, stream>>>(ahead);
    must(cudaEventRecord(begin, stream), "cudaEventRecord");
    must(cudaGraphLaunch(ready, stream), "cudaGraphLaunch");
    must(cudaEventRecord(end, stream), "cudaEventRecord");
    if (i < 0 && cudaEventQuery(begin) == cudaSuccess) ahead *= 2;  // the host was not done asking
    cudaGetLastError();                                             // that it is not ready is no error, but would be kept as one
    must(cudaEventSynchronize(end), "a replay");
    float milliseconds = 0;
    must(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(milliseconds);
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  cudaGraphExecDestroy(ready), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  std::nth_element(times.begin(), times.begin() + replays / 2, times.end());
  return times[replays / 2] * 1e-3 / calls;
}

}  // namespace bench
