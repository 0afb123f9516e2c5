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

// Size of `rows` of a linked list (ops.cpp), and its parts: the first pair of each row, atoms grouped by system,
// the first atom of each system.
inline int64_t num_rows(int64_t num_atoms, int64_t num_systems) { return 2 * num_atoms + num_systems + 2; }

struct RowPointers {
  int64_t *offsets, *order, *first_of_system;

  RowPointers(const Tensor& rows, int64_t num_atoms)
      : offsets(mutable_data<int64_t>(rows)), order(offsets + num_atoms + 1), first_of_system(order + num_atoms) {}
};

// `pbc` is (3,) or (B, 3). The tensors must outlive the pointers.
template <typename T>
GpuAtoms<T> atoms_of(const Tensor& positions, const Tensor& cell, const Tensor& pbc,
                     const std::optional<Tensor>& system_idx) {
  const int64_t num_atoms = positions.size(0);
  return {data<T>(positions),     data<T>(cell), data<bool>(pbc),     system_data(system_idx, num_atoms),
          pbc.dim() == 1 ? 0 : 3, num_atoms,     num_systems_of(cell)};
}

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
