// The operands of a convolution and of a batch norm, and what is asked of tensors everywhere.

#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <numeric>
#include <optional>
#include <vector>

namespace convbn_fx {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Geometry {
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed;
  int64_t groups;

  Tensor convolution(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) const {
    if (weight.dim() == 2) {
      return at::linear(input, weight, bias);
    }
    return at::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }

  // Gradients of a bare convolution: of its input if there is a weight, of its weight if there is an input. Not of its
  // bias: the sums that backends make of it are four times as far off as Eval mode's.
  std::pair<Tensor, Tensor> gradients(
      const Tensor& grad_output, Tensor input, Tensor weight, IntArrayRef input_size, IntArrayRef weight_size) const {
    const bool wants_input = weight.defined(), wants_weight = input.defined();
    if (weight_size.size() == 2) {
      return {
          wants_input ? grad_output.matmul(weight) : Tensor(), wants_weight ? grad_output.t().matmul(input) : Tensor()};
    }
    if (!wants_input && !wants_weight) {
      return {};
    }
    // Of an operand that no wanted gradient reads, only the shape counts.
    if (!wants_weight) {
      input = grad_output.new_empty({}).expand(input_size);
    }
    if (!wants_input) {
      weight = grad_output.new_empty({}).expand(weight_size);
    }
    auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
        grad_output,
        input,
        weight,
        at::OptionalIntArrayRef(),
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        {wants_input, wants_weight, false});
    return {grad_input, grad_weight};
  }

  int64_t output_channels(const Tensor& weight) const {
    return transposed ? weight.size(1) * groups : weight.size(0);
  }

  int64_t output_size(const Tensor& input, const Tensor& weight) const {
    int64_t size = input.size(0) * output_channels(weight);
    for (int64_t i = 0; i + 2 < weight.dim(); ++i) {
      const int64_t reach = dilation[i] * (weight.size(i + 2) - 1);
      const int64_t length = input.size(i + 2) + (transposed ? 0 : 2 * padding[i] - reach - 1);
      size *= transposed ? (length - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i] + 1
                         : length / std::max<int64_t>(stride[i], 1) + 1;
    }
    return size;
  }

  // A vector of one number per output channel, in a shape that broadcasts over the weight.
  Tensor along_channels(const Tensor& vector, IntArrayRef weight_size) const {
    std::vector<int64_t> shape(weight_size.size(), 1);
    if (!transposed) {
      shape[0] = -1;
      return vector.view(shape);
    }
    shape[1] = -1;
    if (groups == 1) {
      return vector.view(shape);
    }
    shape[0] = weight_size[0];
    return vector.view({groups, -1}).repeat_interleave(weight_size[0] / groups, 0).view(shape);
  }

  // The scalar products of two weights, one per output channel.
  Tensor products(const Tensor& left, const Tensor& right) const {
    Tensor elements = left * right;
    if (!transposed) {
      std::vector<int64_t> rest(elements.dim() - 1);
      std::iota(rest.begin(), rest.end(), 1);
      return elements.sum(rest);
    }
    const int64_t rows = elements.size(0) / groups, columns = elements.size(1);
    return elements.view({groups, rows, columns, -1}).sum({1, 3}).view({-1});
  }
};

inline bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

// No operation where there is nothing to do: whoever watches operations would see one that returns its input.
inline Tensor rounded(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

inline OptionalTensor rounded(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor ? OptionalTensor(rounded(*tensor, dtype)) : OptionalTensor();
}

inline Tensor at_least_float(const Tensor& tensor) {
  return is_half(tensor) ? tensor.to(at::kFloat) : tensor;
}

inline bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

inline OptionalTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

inline Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor ? *tensor : Tensor();
}

inline bool is_autocast_on(c10::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

// The values of a tensor are memory of the CPU that may be read: nobody traces, batches or wraps it.
inline bool is_memory(const Tensor& tensor) {
  const auto keys =
      tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU);
}

// Whether nobody else has a view of the tensor's memory, which it fills: memory of PyTorch's, not of an array or a file.
inline bool is_memory_of_its_own(const Tensor& tensor) {
  return tensor.storage().use_count() == 1 && is_memory(tensor) && tensor.storage().resizable() &&
      tensor.storage_offset() == 0 && tensor.is_non_overlapping_and_dense() &&
      tensor.unsafeGetTensorImpl()->allow_tensor_metadata_change();
}

struct BatchNorm {
  OptionalTensor gamma, beta;
  Tensor mean, var;
  double eps;

  Tensor operator()(const Tensor& input) const {
    return at::batch_norm(input, gamma, beta, mean, var, false, 0.0, eps, at::globalContext().userEnabledCuDNN());
  }

  Tensor inverse_deviation() const {
    return (at_least_float(var) + eps).rsqrt();
  }

  Tensor scale(const Tensor& inverse) const {
    return gamma ? *gamma * inverse : inverse;
  }

  // `base + factor (b - mu)`; b and mu may be large and nearly cancel, so they go first.
  Tensor plus_centred(const OptionalTensor& base, const Tensor& factor, const OptionalTensor& bias) const {
    const Tensor difference = bias ? *bias - at_least_float(mean) : -at_least_float(mean);
    return base ? at::addcmul(*base, factor, difference) : factor * difference;
  }
};

}  // namespace convbn_fx
