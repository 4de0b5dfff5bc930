// The fused operator: a convolution and the frozen batch norm after it, as one differentiable operation.
//
//     Z = (scale W) * X + beta + scale (b - mu),    scale = gamma / sqrt(var + eps)
//
// Of activation size, the input is all that is saved. The fused weight is computed again in the backward pass, and from
// dW' and db', the gradients of the fused parameters, come
//
//     dW = scale dW',   db = scale db',   dbeta = db',   dgamma = (<dW', W> + db' (b - mu)) / sqrt(var + eps).
//
// There are three forms, chosen by sizes and dtypes: folded, as above; scaled, where the scale stays on the output,
// because the weight is the larger or in half precision; and apart, the two operations of Eval mode. autograd.py is the
// same in Python, operation by operation. Loops over memory take the place of operations on the CPU where the weights
// of each output channel lie together.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

namespace convbn_fx {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// A weight so many times as large as the output is better left alone, and the output saved: see cost_rule.py.
constexpr double kWeightPerOutput = 16.0;

// A scale on the output has to be divided out of gamma's gradient. Down to this size it is; below, this constant stands
// on the output in its place and what is missing on the weight, so that gamma may be tiny or 0.
constexpr double kSmallestDivisor = 1.0 / 128;

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

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

// No operation where there is nothing to do: whoever watches operations would see one that returns its input.
Tensor rounded(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

OptionalTensor rounded(const OptionalTensor& tensor, at::ScalarType dtype) {
  return tensor ? OptionalTensor(rounded(*tensor, dtype)) : OptionalTensor();
}

Tensor at_least_float(const Tensor& tensor) {
  return is_half(tensor) ? tensor.to(at::kFloat) : tensor;
}

bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

// The values of a tensor are memory of the CPU that may be read: nobody traces, batches or wraps it.
bool is_memory(const Tensor& tensor) {
  const auto keys =
      tensor.key_set() - c10::autograd_dispatch_keyset_with_ADInplaceOrView - c10::autocast_dispatch_keyset;
  return keys == c10::DispatchKeySet(c10::DispatchKey::CPU);
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

// --- Folding ---------------------------------------------------------------------------------------------------------

#define ALWAYS_INLINE inline __attribute__((always_inline))

template <typename T>
ALWAYS_INLINE void fold_channel(const T* weight, T scale, T* fused, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    fused[i] = scale * weight[i];
  }
}

// Returns the product of a channel's gradient and weight, and multiplies the gradient by its scale, if there is one.
template <bool is_scaled, typename T>
ALWAYS_INLINE double unfold_channel(T* grad, const T* weight, T scale, int64_t size) {
  constexpr int64_t kLanes = 16;
  double sum = 0;
  int64_t i = 0;
  if (size >= kLanes) {
    double sums[kLanes] = {};
    for (; i + kLanes <= size; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += static_cast<double>(grad[i + lane]) * static_cast<double>(weight[i + lane]);
        if (is_scaled) {
          grad[i + lane] *= scale;
        }
      }
    }
    for (const double lane : sums) {
      sum += lane;
    }
  }
  for (; i < size; ++i) {
    sum += static_cast<double>(grad[i]) * static_cast<double>(weight[i]);
    if (is_scaled) {
      grad[i] *= scale;
    }
  }
  return sum;
}

template <typename T>
ALWAYS_INLINE void all_inverse_deviations(const T* var, double eps, double* inverse, int64_t channels) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    inverse[channel] = 1.0 / std::sqrt(static_cast<double>(var[channel]) + eps);
  }
}

template <typename T>
ALWAYS_INLINE void fold_all(const T* weight, const T* scale, T* fused, int64_t channels, int64_t size) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    fold_channel(weight + channel * size, scale[channel], fused + channel * size, size);
  }
}

template <typename T>
ALWAYS_INLINE void unfold_all(
    T* grad, const T* weight, const T* scale, double* products, int64_t channels, int64_t size) {
  for (int64_t channel = 0; channel < channels; ++channel) {
    T* const of_channel = grad + channel * size;
    products[channel] = scale ? unfold_channel<true>(of_channel, weight + channel * size, scale[channel], size)
                              : unfold_channel<false>(of_channel, weight + channel * size, T(1), size);
  }
}

#define LOOPS_OVER(T)                                                                                           \
  FOR_EVERY_PROCESSOR                                                                                           \
  void inverse_deviations(const T* var, double eps, double* inverse, int64_t channels) {                        \
    all_inverse_deviations(var, eps, inverse, channels);                                                        \
  }                                                                                                             \
  FOR_EVERY_PROCESSOR                                                                                           \
  void fold_channels(const T* weight, const T* scale, T* fused, int64_t channels, int64_t size) {               \
    fold_all(weight, scale, fused, channels, size);                                                             \
  }                                                                                                             \
  FOR_EVERY_PROCESSOR                                                                                           \
  void unfold_channels(                                                                                         \
      T* grad, const T* weight, const T* scale, double* products, int64_t channels, int64_t size) {             \
    unfold_all(grad, weight, scale, products, channels, size);                                                  \
  }

LOOPS_OVER(float)
LOOPS_OVER(double)

// So many channels are worth a thread.
int64_t grain(int64_t size) {
  return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(size, 1));
}

// A convolution and the batch norm after it, about to become one convolution. The scale is a product of one on the weight
// and one on the output: where it is folded, that on the output is one; else, that on the weight, unless it is tiny.
class Folding {
 public:
  Folding(
      const Geometry& geometry,
      const Tensor& weight,
      const OptionalTensor& bias,
      const BatchNorm& norm,
      bool recorded,
      bool is_scaled)
      : geometry_(geometry), weight_(weight), bias_(bias), norm_(norm) {
    in_memory_ = !recorded && weight.defined() && !geometry.transposed && is_contiguous_by_channel() && are_memory();
    if (!in_memory_) {
      inverse_ = norm.inverse_deviation();
      scale_ = norm.scale(inverse_);
    } else if (norm.var.scalar_type() == at::kFloat) {
      read_scale<float>(is_scaled);
    } else {
      read_scale<double>(is_scaled);
    }
  }

  bool in_memory() const {
    return in_memory_;
  }

  // The scale on the output, as a vector; where it is in memory, and not folded.
  Tensor output_scale() const {
    Tensor scale = at::empty_like(norm_.var);
    if (scale.scalar_type() == at::kFloat) {
      std::copy(on_output_.begin(), on_output_.end(), scale.mutable_data_ptr<float>());
    } else {
      std::copy(on_output_.begin(), on_output_.end(), scale.mutable_data_ptr<double>());
    }
    return scale;
  }

  Tensor weight() const {
    if (in_memory_ && on_weight_.empty()) {
      return weight_;
    }
    if (!in_memory_) {
      return rounded(weight_ * geometry_.along_channels(scale_, weight_.sizes()), weight_.scalar_type());
    }
    Tensor fused = at::empty_like(weight_);
    return weight_.scalar_type() == at::kFloat ? fold<float>(fused) : fold<double>(fused);
  }

  Tensor bias() const {
    if (!in_memory_) {
      return rounded(norm_.plus_centred(norm_.beta, scale_, bias_), weight_.scalar_type());
    }
    return weight_.scalar_type() == at::kFloat ? shift<float>() : shift<double>();
  }

  struct Gradients {
    Tensor weight, bias, gamma;
  };

  // Gradients of the parameters out of those of the fused ones; that of the fused weight may be changed in place.
  Gradients gradients(
      Tensor grad_weight,
      const Tensor& grad_shift,
      IntArrayRef weight_size,
      bool wants_weight,
      bool wants_bias,
      bool wants_gamma,
      bool recorded) const {
    Gradients found;
    if (in_memory_ && grad_weight.defined() && is_memory(grad_weight) && grad_weight.strides() == weight_.strides() &&
        (!grad_shift.defined() || is_memory(grad_shift))) {
      return weight_.scalar_type() == at::kFloat
          ? unfold<float>(grad_weight, grad_shift, wants_weight, wants_bias, wants_gamma)
          : unfold<double>(grad_weight, grad_shift, wants_weight, wants_bias, wants_gamma);
    }
    const Tensor inverse = in_memory_ ? norm_.inverse_deviation() : inverse_;
    const Tensor scale = in_memory_ ? norm_.scale(inverse) : scale_;
    // What of the scale is on the output is in the weight's gradient already.
    const Tensor output_scale = on_output_.empty() ? Tensor() : this->output_scale();
    if (wants_gamma) {
      const Tensor products = geometry_.products(grad_weight, weight_);
      found.gamma =
          norm_.plus_centred(output_scale.defined() ? products / output_scale : products, grad_shift, bias_) * inverse;
    }
    if (wants_weight) {
      const Tensor factor =
          geometry_.along_channels(output_scale.defined() ? scale / output_scale : scale, weight_size);
      found.weight = recorded ? grad_weight * factor : grad_weight.mul_(factor);
    }
    if (wants_bias) {
      found.bias = scale * grad_shift;
    }
    return found;
  }

 private:
  bool is_contiguous_by_channel() const {
    return weight_.is_contiguous() || weight_.is_contiguous(at::MemoryFormat::ChannelsLast) ||
        weight_.is_contiguous(at::MemoryFormat::ChannelsLast3d);
  }

  bool are_memory() const {
    const auto dtype = weight_.scalar_type();
    if ((dtype != at::kFloat && dtype != at::kDouble) || !is_memory(weight_)) {
      return false;
    }
    for (const OptionalTensor* vector : {&bias_, &norm_.gamma, &norm_.beta}) {
      if (*vector && !is_readable(**vector)) {
        return false;
      }
    }
    return is_readable(norm_.mean) && is_readable(norm_.var);
  }

  bool is_readable(const Tensor& vector) const {
    return is_memory(vector) && vector.is_contiguous() && vector.scalar_type() == weight_.scalar_type();
  }

  template <typename T>
  static const T* values(const OptionalTensor& tensor) {
    return tensor ? tensor->const_data_ptr<T>() : nullptr;
  }

  template <typename T>
  void read_scale(bool is_scaled) {
    const int64_t channels = weight_.size(0);
    const T* gamma = values<T>(norm_.gamma);
    inverses_.resize(channels);
    inverse_deviations(norm_.var.const_data_ptr<T>(), norm_.eps, inverses_.data(), channels);
    scales_ = inverses_;
    for (int64_t channel = 0; gamma && channel < channels; ++channel) {
      scales_[channel] *= gamma[channel];
    }
    if (!is_scaled) {
      on_weight_.assign(scales_.begin(), scales_.end());
      return;
    }
    on_output_ = scales_;
    for (int64_t channel = 0; channel < channels; ++channel) {
      if (std::abs(scales_[channel]) < kSmallestDivisor) {
        on_weight_.resize(channels, 1.0);
        on_output_[channel] = kSmallestDivisor;
        on_weight_[channel] = scales_[channel] / kSmallestDivisor;
      }
    }
  }

  template <typename T>
  std::vector<T> on_weight() const {
    return {on_weight_.begin(), on_weight_.end()};
  }

  template <typename T>
  Tensor fold(const Tensor& fused) const {
    const std::vector<T> scale = on_weight<T>();
    const int64_t channels = weight_.size(0), size = channels ? weight_.numel() / channels : 0;
    const T* from = weight_.const_data_ptr<T>();
    T* to = fused.mutable_data_ptr<T>();
    at::parallel_for(0, channels, grain(size), [&](int64_t begin, int64_t end) {
      fold_channels(from + begin * size, scale.data() + begin, to + begin * size, end - begin, size);
    });
    return fused;
  }

  template <typename T>
  Tensor shift() const {
    Tensor result = at::empty_like(norm_.var);
    const T *bias = values<T>(bias_), *beta = values<T>(norm_.beta), *mean = values<T>(norm_.mean);
    T* to = result.mutable_data_ptr<T>();
    for (size_t channel = 0; channel < scales_.size(); ++channel) {
      const double difference = (bias ? static_cast<double>(bias[channel]) : 0.0) - mean[channel];
      to[channel] = static_cast<T>((beta ? beta[channel] : 0.0) + scales_[channel] * difference);
    }
    return result;
  }

  template <typename T>
  Gradients unfold(
      const Tensor& grad_weight, const Tensor& grad_shift, bool wants_weight, bool wants_bias, bool wants_gamma) const {
    const std::vector<T> scale = on_weight<T>();
    const int64_t channels = weight_.size(0), size = channels ? weight_.numel() / channels : 0;
    std::vector<double> products(channels);
    T* grad = grad_weight.mutable_data_ptr<T>();
    const T* weight = weight_.const_data_ptr<T>();
    at::parallel_for(0, channels, grain(size), [&](int64_t begin, int64_t end) {
      unfold_channels(
          grad + begin * size,
          weight + begin * size,
          scale.empty() ? nullptr : scale.data() + begin,
          products.data() + begin,
          end - begin,
          size);
    });
    Gradients found;
    if (wants_weight) {
      found.weight = grad_weight;
    }
    const Tensor shift = grad_shift.defined() ? grad_shift.contiguous() : grad_shift;
    if (wants_bias) {
      found.bias = at::empty_like(shift);
      T* to = found.bias.template mutable_data_ptr<T>();
      const T* from = shift.const_data_ptr<T>();
      for (int64_t channel = 0; channel < channels; ++channel) {
        to[channel] = static_cast<T>(scales_[channel] * from[channel]);
      }
    }
    if (wants_gamma) {
      found.gamma = at::empty_like(shift);
      const T *bias = values<T>(bias_), *mean = values<T>(norm_.mean);
      const T* from = shift.const_data_ptr<T>();
      T* to = found.gamma.template mutable_data_ptr<T>();
      for (int64_t channel = 0; channel < channels; ++channel) {
        const double difference = (bias ? static_cast<double>(bias[channel]) : 0.0) - mean[channel];
        const double product = on_output_.empty() ? products[channel] : products[channel] / on_output_[channel];
        to[channel] = static_cast<T>((product + from[channel] * difference) * inverses_[channel]);
      }
    }
    return found;
  }

  const Geometry& geometry_;
  const Tensor& weight_;
  const OptionalTensor& bias_;
  const BatchNorm& norm_;
  bool in_memory_;
  std::vector<double> inverses_, scales_, on_weight_, on_output_; // where the operands are memory; empty for ones
  Tensor inverse_, scale_; // where they are not
};

// --- The three forms -------------------------------------------------------------------------------------------------

Tensor folded(
    const Geometry& geometry,
    const Tensor& input,
    const Tensor& weight,
    const OptionalTensor& bias,
    const BatchNorm& norm) {
  const Folding folding(geometry, weight, bias, norm, false, false);
  return geometry.convolution(input, folding.weight(), folding.bias());
}

// Eval mode's two steps.
Tensor apart(
    const Geometry& geometry,
    const Tensor& input,
    const Tensor& weight,
    const OptionalTensor& bias,
    const BatchNorm& norm) {
  const auto dtype = input.scalar_type();
  return norm(geometry.convolution(input, rounded(weight, dtype), rounded(bias, dtype)));
}

Tensor sum_over_positions(const Tensor& grad_output) {
  std::vector<int64_t> positions = {0};
  for (int64_t dimension = 2; dimension < grad_output.dim(); ++dimension) {
    positions.push_back(dimension);
  }
  return grad_output.sum(
      positions, false, is_half(grad_output) ? std::optional<at::ScalarType>(at::kFloat) : std::nullopt);
}

// A gradient of the output with each channel multiplied by its number, in float32 at least.
Tensor on_channels(const Tensor& grad_output, const Tensor& scale) {
  std::vector<int64_t> shape(grad_output.dim() - 1, 1);
  shape[0] = -1;
  const auto wide = at::promote_types(grad_output.scalar_type(), at::kFloat);
  return rounded(grad_output * rounded(scale, wide).view(shape), grad_output.scalar_type());
}

// What the backward pass works with: saved tensors, and which gradients are wanted.
struct Backward {
  Geometry geometry;
  Tensor input, weight;
  OptionalTensor bias;
  BatchNorm norm;
  std::vector<int64_t> input_size, weight_size;
  std::vector<at::ScalarType> dtypes; // of weight, bias, gamma and beta
  bool wants_input, wants_weight, wants_bias, wants_gamma, wants_beta;

  // Gradients of input, weight, bias, gamma and beta.
  variable_list operator()(const Tensor& grad_output, bool is_scaled) const {
    const bool recorded = at::GradMode::is_enabled();
    if (is_scaled && is_half(grad_output)) {
      return of_scaled(grad_output);
    }
    const Folding folding(geometry, weight, bias, norm, recorded, is_scaled);
    if (is_scaled && !folding.in_memory()) {
      return of_scaled(grad_output);
    }
    const auto [grad_input, grad_weight] = geometry.gradients(
        is_scaled ? on_channels(grad_output, folding.output_scale()) : grad_output,
        wants_weight || wants_gamma ? input : Tensor(),
        wants_input ? folding.weight() : Tensor(),
        input_size,
        weight_size);
    const Tensor grad_shift = wants_bias || wants_gamma || wants_beta ? sum_over_positions(grad_output) : Tensor();
    const auto found =
        folding.gradients(grad_weight, grad_shift, weight_size, wants_weight, wants_bias, wants_gamma, recorded);
    return {grad_input, found.weight, found.bias, found.gamma, wants_beta ? grad_shift : Tensor()};
  }

  variable_list of_scaled(const Tensor& grad_output) const {
    const auto dtype = grad_output.scalar_type();
    const Tensor as_seen = weight.defined() ? rounded(weight, dtype) : weight; // by the convolution
    const OptionalTensor bias_as_seen = rounded(bias, dtype);
    const Tensor inverse = norm.inverse_deviation(), scale = norm.scale(inverse);
    const bool from_weight = wants_gamma && wants_weight; // then gamma's gradient comes out of the weight's
    Tensor output_scale = scale, weight_scale; // whose product is the scale; undefined stands for ones
    if (from_weight) {
      const Tensor tiny = scale.detach().abs().lt(kSmallestDivisor);
      if (!is_memory(scale) || tiny.any().item<bool>()) {
        output_scale = at::where(tiny, at::scalar_tensor(kSmallestDivisor, scale.options()), scale.detach());
        weight_scale = scale / output_scale;
      }
    }
    const auto on_weight = [&](const Tensor& tensor) {
      return weight_scale.defined()
          ? rounded(tensor * geometry.along_channels(weight_scale, weight_size), tensor.scalar_type())
          : tensor;
    };
    const Tensor grad_scaled = on_channels(grad_output, output_scale);
    auto [grad_input, grad_weight] = geometry.gradients(
        grad_scaled,
        wants_weight ? input : Tensor(),
        wants_input ? on_weight(as_seen) : Tensor(),
        input_size,
        weight_size);
    Tensor grad_shift, grad_bias, grad_gamma;
    if (wants_bias || wants_beta || from_weight) {
      grad_shift = sum_over_positions(grad_output);
    }
    if (wants_bias) {
      grad_bias = scale * grad_shift;
    }
    if (from_weight) {
      const Tensor per_scale =
          geometry.products(at_least_float(grad_weight), at_least_float(as_seen)) / output_scale;
      // What rounding has added to the scaled gradient is in `per_scale`, times a mean that may be large.
      const bool rounds = dtypes[0] == at::kHalf || dtypes[0] == at::kBFloat16;
      const Tensor centring = rounds ? sum_over_positions(grad_scaled) / output_scale : grad_shift;
      grad_gamma = norm.plus_centred(per_scale, centring, bias_as_seen) * inverse;
    }
    const bool overflowed = from_weight && (dtype == at::kHalf || dtype == at::kBFloat16) && is_memory(grad_gamma) &&
        !grad_gamma.isfinite().all().item<bool>();
    if (wants_gamma && (!from_weight || overflowed)) {
      grad_gamma = of_gamma(grad_output, as_seen, bias_as_seen) * inverse;
      if (weight_scale.defined()) { // then the weight's gradient, not scaled yet, has overflowed
        grad_weight =
            geometry.gradients(on_channels(grad_output, scale), input, Tensor(), input_size, weight_size).second;
        weight_scale = Tensor();
      }
    }
    if (grad_weight.defined()) {
      grad_weight = on_weight(grad_weight);
    }
    variable_list found = {grad_weight, grad_bias, grad_gamma, wants_beta ? grad_shift : Tensor()};
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i].defined()) {
        found[i] = rounded(found[i], dtypes[i]);
      }
    }
    found.insert(found.begin(), grad_input);
    return found;
  }

  // Eval mode's sum for gamma, from the convolution's output computed again.
  Tensor of_gamma(const Tensor& grad_output, const Tensor& as_seen, const OptionalTensor& bias_as_seen) const {
    const Tensor output = at_least_float(geometry.convolution(input, as_seen, bias_as_seen));
    std::vector<int64_t> shape(output.dim() - 1, 1);
    shape[0] = -1;
    return sum_over_positions(grad_output * (output - rounded(norm.mean, output.scalar_type()).view(shape)));
  }
};

// --- Autograd --------------------------------------------------------------------------------------------------------

// What the backward pass has to know besides tensors, in one list: the context keeps nothing that is no value of PyTorch's.
struct Numbers {
  bool is_scaled;
  std::array<bool, 5> is_there; // of input, weight, bias, gamma and beta
  std::vector<at::ScalarType> dtypes; // of weight, bias, gamma and beta
  Geometry geometry;
  std::vector<int64_t> input_size, weight_size;

  static std::vector<int64_t> of(
      const Geometry& geometry,
      const Tensor& input,
      const Tensor& weight,
      const OptionalTensor& bias,
      const OptionalTensor& gamma,
      const OptionalTensor& beta,
      bool is_scaled) {
    std::vector<int64_t> list;
    list.reserve(40);
    list.insert(list.end(), {is_scaled, geometry.transposed, geometry.groups, static_cast<int64_t>(weight.scalar_type())});
    for (const OptionalTensor* tensor : {&bias, &gamma, &beta}) {
      list.push_back(*tensor ? static_cast<int64_t>((*tensor)->scalar_type()) : -1);
    }
    for (const IntArrayRef part : {input.sizes(), weight.sizes()}) {
      list.insert(list.end(), part.begin(), part.end());
    }
    for (const auto* part : {&geometry.stride, &geometry.padding, &geometry.dilation, &geometry.output_padding}) {
      list.insert(list.end(), part->begin(), part->end());
    }
    return list;
  }

  explicit Numbers(const std::vector<int64_t>& list) : is_scaled(list[0] != 0), is_there{true, true} {
    geometry.transposed = list[1] != 0;
    geometry.groups = list[2];
    for (size_t i = 0; i < 4; ++i) {
      is_there[i + 1] = list[i + 3] >= 0;
      dtypes.push_back(is_there[i + 1] ? static_cast<at::ScalarType>(list[i + 3]) : at::kFloat);
    }
    // A rank a size; of a linear layer nothing more.
    const auto rest = static_cast<int64_t>(list.size()) - 7;
    const int64_t rank = rest == 4 ? 2 : (rest + 8) / 6;
    auto next = list.begin() + 7;
    const auto take = [&](int64_t count) {
      const auto begin = next;
      next += count;
      return std::vector<int64_t>(begin, next);
    };
    input_size = take(rank);
    weight_size = take(rank);
    if (rank > 2) {
      geometry.stride = take(rank - 2);
      geometry.padding = take(rank - 2);
      geometry.dilation = take(rank - 2);
      geometry.output_padding = take(rank - 2);
    }
  }
};

struct ConvBatchNorm : torch::autograd::Function<ConvBatchNorm> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& input,
      const Tensor& weight,
      const OptionalTensor& bias,
      const OptionalTensor& gamma,
      const OptionalTensor& beta,
      const Tensor& mean,
      const Tensor& var,
      double eps,
      const Geometry& geometry,
      bool is_scaled) {
    const bool wants_input = input.requires_grad(), wants_weight = weight.requires_grad(),
               wants_gamma = requires_grad(gamma);
    const auto or_none = [](const OptionalTensor& tensor) { return tensor ? *tensor : Tensor(); };
    ctx->save_for_backward(
        {wants_weight || wants_gamma ? input : Tensor(),
         wants_input || wants_gamma ? weight : Tensor(),
         wants_gamma ? or_none(bias) : Tensor(),
         or_none(gamma),
         mean,
         var});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["numbers"] = Numbers::of(geometry, input, weight, bias, gamma, beta, is_scaled);
    at::AutoDispatchBelowADInplaceOrView below; // what is returned is no view, whatever the backend does
    const BatchNorm norm{gamma, beta, mean, var, eps};
    return is_scaled ? apart(geometry, input, weight, bias, norm) : folded(geometry, input, weight, bias, norm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = ctx->get_saved_variables();
    const Numbers numbers(ctx->saved_data["numbers"].toIntVector());
    const auto or_none = [](const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor(); };
    size_t edge = 0; // of the tensors that there were
    std::array<bool, 5> wanted{};
    for (size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = numbers.is_there[i] && ctx->needs_input_grad(edge++);
    }
    const Backward pass{
        numbers.geometry,
        saved[0],
        saved[1],
        or_none(saved[2]),
        BatchNorm{or_none(saved[3]), OptionalTensor(), saved[4], saved[5], ctx->saved_data["eps"].toDouble()},
        numbers.input_size,
        numbers.weight_size,
        numbers.dtypes,
        wanted[0],
        wanted[1],
        wanted[2],
        wanted[3],
        wanted[4]};
    variable_list found = pass(grad_outputs[0], numbers.is_scaled);
    found.resize(10); // nothing for what is no parameter
    return found;
  }
};

// --- The operator ----------------------------------------------------------------------------------------------------

// The dtype that the convolution computes in; none where its operands do not agree on one. Autocast casts the operands of
// a convolution, except those in float64.
std::optional<at::ScalarType> computing_dtype(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const auto own = input.scalar_type(), of_weight = weight.scalar_type(), of_bias = bias ? bias->scalar_type() : of_weight;
  if (at::autocast::is_autocast_available(input.device().type()) &&
      at::autocast::is_autocast_enabled(input.device().type())) {
    for (const auto dtype : {own, of_weight, of_bias}) {
      if (!at::isFloatingType(dtype) || dtype == at::kDouble) {
        return std::nullopt;
      }
    }
    return at::autocast::get_autocast_dtype(input.device().type());
  }
  return own == of_weight && own == of_bias ? std::optional(own) : std::nullopt;
}

// Whether dtypes and shapes are such that Eval mode works and the fused form is known to equal it.
bool are_ordinary(
    const Tensor& input,
    const Tensor& weight,
    const OptionalTensor& bias,
    const BatchNorm& norm,
    const Geometry& geometry,
    at::ScalarType dtype) {
  const auto of_statistics = norm.var.scalar_type();
  const bool half = dtype == at::kHalf || dtype == at::kBFloat16;
  if (!(half || dtype == at::kFloat || dtype == at::kDouble) ||
      !(of_statistics == dtype || (half && of_statistics == at::kFloat))) {
    return false;
  }
  if (input.dim() != weight.dim() || weight.dim() < 2 || weight.dim() > 5 || input.numel() == 0 ||
      input.layout() != at::kStrided || weight.layout() != at::kStrided) {
    return false;
  }
  const int64_t channels = geometry.output_channels(weight);
  const auto is_vector = [&](const Tensor& tensor) {
    return tensor.layout() == at::kStrided && tensor.dim() == 1 && tensor.size(0) == channels;
  };
  for (const OptionalTensor* vector : {&norm.gamma, &norm.beta}) {
    if (*vector && !(is_vector(**vector) && (*vector)->scalar_type() == of_statistics)) {
      return false;
    }
  }
  return is_vector(norm.var) && is_vector(norm.mean) && norm.mean.scalar_type() == of_statistics &&
      (!bias || is_vector(*bias)) && !norm.mean.requires_grad() && !norm.var.requires_grad();
}

// Eval mode's two steps as modules take them, whatever the operands are.
Tensor as_in_eval_mode(
    const Geometry& geometry,
    const Tensor& input,
    const Tensor& weight,
    const OptionalTensor& bias,
    const BatchNorm& norm) {
  const auto& [stride, padding, dilation, output_padding, transposed, groups] = geometry;
  switch (weight.dim()) {
    case 3:
      return norm(
          transposed ? at::conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups, dilation)
                     : at::conv1d(input, weight, bias, stride, padding, dilation, groups));
    case 4:
      return norm(
          transposed ? at::conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
                     : at::conv2d(input, weight, bias, stride, padding, dilation, groups));
    case 5:
      return norm(
          transposed ? at::conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups, dilation)
                     : at::conv3d(input, weight, bias, stride, padding, dilation, groups));
    default:
      return norm(at::linear(input, weight, bias));
  }
}

Tensor conv_batch_norm(
    const Tensor& input,
    const Tensor& weight,
    const OptionalTensor& bias,
    const OptionalTensor& gamma,
    const OptionalTensor& beta,
    const Tensor& mean,
    const Tensor& var,
    double eps,
    IntArrayRef stride,
    IntArrayRef padding,
    IntArrayRef dilation,
    bool transposed,
    IntArrayRef output_padding,
    int64_t groups) {
  const size_t spatial = std::max<int64_t>(weight.dim() - 2, 0);
  const auto per_dimension = [spatial](IntArrayRef numbers) {
    TORCH_CHECK(
        numbers.size() == spatial || numbers.size() == 1, "conv_batch_norm: ", numbers, " for ", spatial, " dimensions");
    return numbers.size() == spatial ? numbers.vec() : std::vector<int64_t>(spatial, numbers[0]);
  };
  const Geometry geometry{
      per_dimension(stride),
      per_dimension(padding),
      per_dimension(dilation),
      per_dimension(output_padding),
      transposed,
      groups};
  const BatchNorm norm{gamma, beta, mean, var, eps};
  const auto dtype = computing_dtype(input, weight, bias);
  if (!dtype || !are_ordinary(input, weight, bias, norm, geometry, *dtype)) {
    return as_in_eval_mode(geometry, input, weight, bias, norm);
  }
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  const Tensor cast = rounded(input, *dtype);
  const double weights = weight.numel(), outputs = geometry.output_size(input, weight);
  const bool is_scaled = is_half(cast) || weights > outputs;
  const bool wanted = at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || requires_grad(bias) || requires_grad(gamma) ||
       requires_grad(beta));
  if (wanted && !(requires_grad(gamma) && weights > kWeightPerOutput * outputs)) {
    return ConvBatchNorm::apply(cast, weight, bias, gamma, beta, mean, var, eps, geometry, is_scaled);
  }
  return wanted || is_scaled ? apart(geometry, cast, weight, bias, norm) : folded(geometry, cast, weight, bias, norm);
}

TORCH_LIBRARY(convbn_fx, library) {
  library.def(
      "conv_batch_norm(Tensor input, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor running_mean, "
      "Tensor running_var, float eps, int[] stride, int[] padding, int[] dilation, bool transposed, "
      "int[] output_padding, int groups) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(convbn_fx, CompositeExplicitAutograd, library) {
  library.impl("conv_batch_norm", conv_batch_norm);
}

TORCH_LIBRARY_IMPL(convbn_fx, Autograd, library) {
  library.impl("conv_batch_norm", conv_batch_norm);
}

} // namespace convbn_fx
