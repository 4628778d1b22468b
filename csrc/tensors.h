// Tensors of float or double as the core reads them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

namespace condlr {

// Whether the address is a multiple of the element size; that of torch.frombuffer with an offset need not be.
inline bool is_aligned(const torch::stable::Tensor& t) {
  const bool is_double = t.scalar_type() == torch::headeronly::ScalarType::Double;
  const std::size_t size = is_double ? sizeof(double) : sizeof(float);
  return reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % size == 0;
}

// Contiguous and aligned: t or a copy.
inline torch::stable::Tensor dense(const torch::stable::Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return is_aligned(t) ? t : torch::stable::clone(t);
}

}  // namespace condlr
