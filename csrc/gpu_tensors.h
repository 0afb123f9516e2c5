// What the operators on a GPU share: the device and stream of a call, and its scratch memory.
//
// Memory comes from torch's allocator and belongs to the current stream: what a call frees, the next call on the
// stream may reuse without waiting. Nothing here names a vendor.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "neighbors_gpu.h"
#include "tensors.h"

// A ROCm torch dispatches under the CUDA key too.
#if defined(DIFFNL_HOSTGPU)
#define DIFFNL_GPU_KEY CPU
#else
#define DIFFNL_GPU_KEY CUDA
#endif

namespace diffnl {

// The device of `t` made current, and its current stream.
class OnDevice {
 public:
#if defined(DIFFNL_HOSTGPU)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_);
    require(error == 0, "torch has no current stream");
  }
#endif
  GpuStream stream() const { return stream_; }

 private:
#if !defined(DIFFNL_HOSTGPU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// Arrays of one call in one allocation.
class Workspace {
 public:
  template <typename T>
  void add(T*& array, int64_t count) {
    parts_.push_back({reinterpret_cast<void**>(&array), bytes_});
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
  int64_t bytes() const { return bytes_; }
  void allocate(const Tensor& like) {
    memory_ = empty(like, {bytes_}, ScalarType::Byte);
    for (const Part& part : parts_) *part.array = mutable_data<char>(*memory_) + part.at;
  }

 private:
  struct Part {
    void** array;
    int64_t at;
  };
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

}  // namespace diffnl
