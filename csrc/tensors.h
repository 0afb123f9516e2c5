// Tensors on their way to raw pointers, for every backend.
//
// Callers go through diffnl/_ops.py, which has checked shapes, dtypes and devices. What is checked here again
// only keeps a direct call of an operator from reading outside its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "errors.h"

namespace diffnl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A size of -1 is free.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t k = 0;
  for (const int64_t size : shape) {
    same = same && (size < 0 || t.size(k) == size);
    ++k;
  }
  require(same, "wrong shape of ", name);
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  require(t.scalar_type() == dtype, "wrong dtype of ", name);
}

inline ScalarType floating_dtype(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::Double, "tensors must be float32 or float64");
  return dtype;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The (N,) int64 data of system_idx, or null. The tensor must outlive the pointer.
inline const int64_t* system_data(const std::optional<Tensor>& system_idx, int64_t num_atoms) {
  if (!system_idx.has_value()) return nullptr;
  check_shape(*system_idx, "system_idx", {num_atoms});
  check_dtype(*system_idx, "system_idx", ScalarType::Long);
  return data<int64_t>(*system_idx);
}

// Asking first saves a trip through the dispatcher.
inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  if (!t.has_value()) return std::nullopt;
  return packed(*t);
}

// A list the caller has, made contiguous and kept alive while a kernel reads it. Shifts are there whenever a
// cell takes part.
class HeldList {
 public:
  HeldList(const Tensor& mapping, const std::optional<Tensor>& shifts, const std::optional<Tensor>& system_idx,
           int64_t num_atoms, int64_t num_systems, bool uses_cell)
      : mapping_(packed(mapping)), shifts_(packed(shifts)), system_idx_(packed(system_idx)) {
    check_shape(mapping, "mapping", {2, -1});
    check_dtype(mapping, "mapping", ScalarType::Long);
    const int64_t num_pairs = mapping.size(1);
    if (shifts_.has_value()) {
      check_shape(*shifts_, "shifts", {num_pairs, 3});
      check_dtype(*shifts_, "shifts", ScalarType::Int);
    }
    require(shifts_.has_value() || !uses_cell, "`shifts` must be given with a `cell`");
    require(num_atoms >= 0 && num_systems >= 0, "sizes must not be negative");
    require(num_systems > 0 || num_pairs == 0 || !uses_cell, "pairs need a system");
    if (uses_cell) systems_ = system_data(system_idx_, num_atoms);
    capacity_ = num_pairs;
  }

  const int64_t* mapping() const { return data<int64_t>(mapping_); }        // (2, P)
  const int32_t* shifts() const { return data_or_null<int32_t>(shifts_); }  // (P, 3)
  const int64_t* system_idx() const { return systems_; }                    // (N,)
  int64_t capacity() const { return capacity_; }                            // P, of a padded list more

 private:
  Tensor mapping_;
  std::optional<Tensor> shifts_, system_idx_;
  const int64_t* systems_ = nullptr;
  int64_t capacity_ = 0;
};

// The number of pairs of a padded list, where the device can read it; or null.
inline const int64_t* live_pairs(const std::optional<Tensor>& num_pairs) {
  if (!num_pairs.has_value()) return nullptr;
  check_shape(*num_pairs, "num_pairs", {});
  check_dtype(*num_pairs, "num_pairs", ScalarType::Long);
  return data<int64_t>(*num_pairs);
}

// A (3, 3) cell is one system.
inline int64_t num_systems_of(const Tensor& cell) { return cell.dim() == 2 ? 1 : cell.size(0); }

inline void check_cell(const Tensor& cell, ScalarType dtype) {
  if (cell.dim() == 2)
    check_shape(cell, "cell", {3, 3});
  else
    check_shape(cell, "cell", {-1, 3, 3});
  check_dtype(cell, "cell", dtype);
}

inline void check_capacity(int64_t capacity) { require(capacity >= 0, "`capacity` must not be negative"); }

// The checks that all searches share. `pbc` is (3,), for all systems, or (B, 3).
inline void check_search(const Tensor& positions, const Tensor& cell, const Tensor& pbc) {
  check_shape(positions, "positions", {-1, 3});
  check_cell(cell, floating_dtype(positions));
  if (pbc.dim() == 1)
    check_shape(pbc, "pbc", {3});
  else
    check_shape(pbc, "pbc", {num_systems_of(cell), 3});
  check_dtype(pbc, "pbc", ScalarType::Bool);
  require(num_systems_of(cell) > 0 || positions.size(0) == 0, "atoms need a system");
}

inline void check_vectors(const Tensor& positions, const std::optional<Tensor>& cell) {
  check_shape(positions, "positions", {-1, 3});
  if (cell.has_value()) check_cell(*cell, floating_dtype(positions));
}

// Calls run(float) or run(double).
template <typename Run>
void by_dtype(const Tensor& t, const Run& run) {
  floating_dtype(t) == ScalarType::Float ? run(0.0f) : run(0.0);
}

// Sizes and strides of a packed tensor, at most three of each.
struct Layout {
  std::array<int64_t, 3> sizes{}, strides{};
  int64_t dims;

  explicit Layout(std::initializer_list<int64_t> shape) : dims(static_cast<int64_t>(shape.size())) {
    std::copy(shape.begin(), shape.end(), sizes.begin());
    int64_t stride = 1;
    for (size_t k = shape.size(); k-- > 0; stride *= std::max<int64_t>(sizes[k], 1)) strides[k] = stride;
  }
};

// The first elements of a packed tensor in another shape, in the same memory; no view in autograd's sense.
inline Tensor front_of(const Tensor& t, std::initializer_list<int64_t> shape) {
  const Layout layout(shape);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      aoti_torch__reinterpret_tensor(t.get(), layout.dims, layout.sizes.data(), layout.strides.data(), 0, &handle);
  require(error == 0, "torch could not make a tensor");
  return Tensor(handle);
}

struct AllocationFailed : DataError {
  explicit AllocationFailed(int64_t bytes) : DataError("no_memory", bytes, 0) {}
};

// torch.empty on the device of `like`. Straight from the C interface: torch::stable::new_empty goes through the
// dispatcher, which costs as much as a kernel launch.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const Layout layout(shape);
  int32_t device = 0, dtype_code = 0;
  switch (dtype) {
    case ScalarType::Byte:
      dtype_code = aoti_torch_dtype_uint8();
      break;
    case ScalarType::Int:
      dtype_code = aoti_torch_dtype_int32();
      break;
    case ScalarType::Long:
      dtype_code = aoti_torch_dtype_int64();
      break;
    case ScalarType::Float:
      dtype_code = aoti_torch_dtype_float32();
      break;
    default:
      dtype_code = aoti_torch_dtype_float64();
  }
  require(aoti_torch_get_device_type(like.get(), &device) == 0, "a tensor has no device");
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(layout.dims, layout.sizes.data(), layout.strides.data(),
                                                        dtype_code, device, like.get_device_index(), &handle);
  if (error != 0) {
    const bool wide = dtype == ScalarType::Long || dtype == ScalarType::Double;
    int64_t bytes = dtype == ScalarType::Byte ? 1 : wide ? 8 : 4;
    for (const int64_t size : shape) bytes *= size;
    throw AllocationFailed(bytes);
  }
  return Tensor(handle);
}

// What `make` makes, or nothing where torch does not give the memory for it. Why not, torch's C interface does not
// say: diffnl/_validate.py asks for the same memory again, and raises what torch says then.
template <typename Make>
auto if_memory_suffices(const Make& make) -> std::optional<decltype(make())> {
  try {
    return make();
  } catch (const AllocationFailed&) {
    return std::nullopt;
  }
}

}  // namespace diffnl
