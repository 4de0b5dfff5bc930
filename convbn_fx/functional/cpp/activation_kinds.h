// Activation functions, their in-place forms and their derivatives, each as PyTorch computes it.

#pragma once

#include <ATen/ATen.h>

#include <array>
#include <string_view>

namespace convbn_fx {

using at::Tensor;

enum class Kind : int64_t {
  kRelu,
  kHardtanh, // of min, max
  kLeakyRelu, // of a slope of at least 0
  kElu, // of an alpha of at least 0
  kHardsigmoid,
  kComposedHardsigmoid, // as a composition of other functions, whose rounding is another; so are the last three
  kSigmoid,
  kTanh,
  kSilu,
  kHardswish,
  kGelu,
  kGeluTanh,
  kMish,
  kComposedSilu,
  kComposedHardswish,
  kComposedMish,
};

// Their names, in that order.
constexpr std::array<std::string_view, 16> kNames = {
    "relu", "hardtanh", "leaky_relu", "elu", "hardsigmoid", "composed_hardsigmoid", "sigmoid", "tanh", "silu",
    "hardswish", "gelu", "gelu_tanh", "mish", "composed_silu", "composed_hardswish", "composed_mish"};

struct Activation {
  Kind kind;
  double a, b; // what the kind is of

  // Whether the output tells the derivative.
  bool by_output() const {
    return kind <= Kind::kTanh;
  }

  // Whether it does so in this dtype. Of a bound that is rounded, the output does not tell whether the input was at it; of
  // what is near -alpha, little is left in half precision.
  bool is_told_in(at::ScalarType dtype) const {
    const bool is_half = dtype == at::kHalf || dtype == at::kBFloat16;
    const auto is_exact = [dtype](double bound) {
      const auto wide = static_cast<float>(bound);
      return wide == (dtype == at::kHalf ? static_cast<float>(at::Half(wide)) : static_cast<float>(at::BFloat16(wide)));
    };
    return !is_half || (kind == Kind::kHardtanh ? is_exact(a) && is_exact(b) : kind != Kind::kElu);
  }

  bool is_composed() const {
    return kind == Kind::kComposedHardsigmoid || kind >= Kind::kComposedSilu;
  }

  bool has_numbers() const {
    return kind >= Kind::kHardtanh && kind <= Kind::kElu;
  }

  // Whether PyTorch's own keeps the output alone.
  bool keeps_output_anyway() const {
    return kind == Kind::kRelu || kind == Kind::kSigmoid || kind == Kind::kTanh;
  }

  // Whether the derivative is one of two numbers.
  bool has_mask() const {
    return kind <= Kind::kLeakyRelu;
  }

  Tensor operator()(const Tensor& x) const {
    switch (kind) {
      case Kind::kRelu:
        return at::relu(x);
      case Kind::kHardtanh:
        return at::hardtanh(x, a, b);
      case Kind::kLeakyRelu:
        return at::leaky_relu(x, a);
      case Kind::kElu:
        return at::elu(x, a);
      case Kind::kHardsigmoid:
        return at::hardsigmoid(x);
      case Kind::kComposedHardsigmoid:
        return gate(x);
      case Kind::kSigmoid:
        return at::sigmoid(x);
      case Kind::kTanh:
        return at::tanh(x);
      case Kind::kSilu:
        return at::silu(x);
      case Kind::kHardswish:
        return at::hardswish(x);
      case Kind::kGelu:
        return at::gelu(x);
      case Kind::kGeluTanh:
        return at::gelu(x, "tanh");
      case Kind::kMish:
        return at::mish(x);
      case Kind::kComposedSilu:
        return x * at::sigmoid(x);
      case Kind::kComposedHardswish:
        return x * gate(x);
      case Kind::kComposedMish:
        return x * at::tanh(at::softplus(x));
    }
    TORCH_INTERNAL_ASSERT(false);
  }

  void in_place(Tensor& x) const {
    switch (kind) {
      case Kind::kRelu:
        at::relu_(x);
        break;
      case Kind::kHardtanh:
        at::hardtanh_(x, a, b);
        break;
      case Kind::kLeakyRelu:
        at::leaky_relu_(x, a);
        break;
      case Kind::kElu:
        at::elu_(x, a);
        break;
      case Kind::kHardsigmoid:
        at::hardsigmoid_(x);
        break;
      case Kind::kSigmoid:
        at::sigmoid_(x);
        break;
      case Kind::kTanh:
        at::tanh_(x);
        break;
      case Kind::kSilu:
        at::silu_(x);
        break;
      case Kind::kHardswish:
        at::hardswish_(x);
        break;
      case Kind::kMish:
        at::mish_(x);
        break;
      default:
        x.copy_((*this)(x));
    }
  }

  // The gradient of the input. `value` is the output or the input, as `by_output` says.
  Tensor backward(const Tensor& grad, const Tensor& value) const {
    switch (kind) {
      case Kind::kRelu:
        return at::threshold_backward(grad, value, 0);
      case Kind::kHardtanh:
        return at::hardtanh_backward(grad, value, a, b);
      case Kind::kLeakyRelu:
        return at::leaky_relu_backward(grad, value, a, /*self_is_result=*/true);
      case Kind::kElu:
        return at::elu_backward(grad, a, 1, 1, /*is_result=*/true, value);
      case Kind::kHardsigmoid: // with the sixth of PyTorch's own, which is a float for every dtype
        return at::where(inside(value), grad * static_cast<double>(1.0f / 6.0f), at::zeros({}, grad.options()));
      case Kind::kComposedHardsigmoid:
        return at::where(inside(value), grad / 6.0, at::zeros({}, grad.options()));
      case Kind::kSigmoid:
        return at::sigmoid_backward(grad, value);
      case Kind::kTanh:
        return at::tanh_backward(grad, value);
      case Kind::kSilu:
        if (at::GradMode::is_enabled()) { // PyTorch's own cannot be differentiated again
          const Tensor gate = at::sigmoid(value);
          return grad * gate * (1 + value * (1 - gate));
        }
        return at::silu_backward(grad, value);
      case Kind::kHardswish:
        return at::hardswish_backward(grad, value);
      case Kind::kGelu:
        return at::gelu_backward(grad, value);
      case Kind::kGeluTanh:
        return at::gelu_backward(grad, value, "tanh");
      case Kind::kMish:
        if (at::GradMode::is_enabled()) {
          const Tensor gate = at::tanh(at::softplus(value));
          return grad * (gate + value * at::sigmoid(value) * (1 - gate * gate));
        }
        return at::mish_backward(grad, value);
      case Kind::kComposedSilu: {
        const Tensor gate = at::sigmoid(value);
        return grad * gate + at::sigmoid_backward(grad * value, gate);
      }
      case Kind::kComposedHardswish:
        return grad * gate(value) + at::hardtanh_backward(grad * value / 6.0, value + 3.0, 0, 6);
      case Kind::kComposedMish: {
        const Tensor gate = at::tanh(at::softplus(value));
        return grad * gate + at::softplus_backward(at::tanh_backward(grad * value, gate), value, 1, 20);
      }
    }
    TORCH_INTERNAL_ASSERT(false);
  }

  // The gradient of the input of a kind that is told by its output, from the input.
  Tensor backward_by_input(const Tensor& grad, const Tensor& input) const {
    switch (kind) {
      case Kind::kLeakyRelu:
        return at::leaky_relu_backward(grad, input, a, /*self_is_result=*/false);
      case Kind::kElu:
        return at::elu_backward(grad, a, 1, 1, /*is_result=*/false, input);
      default:
        return backward(grad, (*this)(input));
    }
  }

  // Where the derivative is the smaller of its two numbers, of one byte an element.
  Tensor mask(const Tensor& output) const {
    switch (kind) {
      case Kind::kHardtanh:
        return output.le(a).logical_or_(output.ge(b));
      case Kind::kLeakyRelu:
        return output.gt(0).logical_not_(); // of what is no number, too
      default:
        return output.le(0);
    }
  }

  Tensor backward_by_mask(const Tensor& grad, const Tensor& mask) const {
    return kind == Kind::kLeakyRelu ? at::where(mask, grad * a, grad) : grad.masked_fill(mask, 0);
  }

 private:
  static Tensor inside(const Tensor& output) {
    return output.gt(0).logical_and_(output.lt(1));
  }

  static Tensor gate(const Tensor& x) {
    return at::hardtanh(x + 3.0, 0, 6).div_(6.0);
  }
};

} // namespace convbn_fx
