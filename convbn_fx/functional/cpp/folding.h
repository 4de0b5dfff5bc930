// The parameters of a convolution with the batch norm folded in, and what their gradients say of its own: as loops over
// memory on the CPU, where the weights of each output channel lie together; as operations elsewhere.

#pragma once

#include <ATen/Parallel.h>

#include <cmath>

#include "operands.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

namespace convbn_fx {

// A scale on the output has to be divided out of gamma's gradient. Down to this size it is; below, this constant stands
// on the output in its place and what is missing on the weight, so that gamma may be tiny or 0.
constexpr double kSmallestDivisor = 1.0 / 128;

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

}  // namespace convbn_fx
