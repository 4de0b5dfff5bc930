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
// same in Python, operation by operation.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <array>

#include "folding.h"
#include "recomputation.h"

namespace convbn_fx {

// A weight so many times as large as the output is better left alone, and the output saved: see cost_rule.py.
constexpr double kWeightPerOutput = 16.0;
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
  bool is_scaled, keeps_output_at_hand; // the latter: what is saved is enough to compute the output again
  int64_t version_of_beta;
  std::array<bool, 5> is_there; // of input, weight, bias, gamma and beta
  std::vector<at::ScalarType> dtypes; // of weight, bias, gamma and beta
  Geometry geometry;
  std::vector<int64_t> input_size, weight_size;

  static constexpr int64_t kRanks = 9; // where sizes begin

  static std::vector<int64_t> of(
      const Geometry& geometry,
      const Tensor& input,
      const Tensor& weight,
      const OptionalTensor& bias,
      const OptionalTensor& gamma,
      const OptionalTensor& beta,
      bool is_scaled,
      bool keeps_output_at_hand) {
    std::vector<int64_t> list;
    list.reserve(40);
    list.insert(
        list.end(), {is_scaled, keeps_output_at_hand, beta ? static_cast<int64_t>(beta->_version()) : 0, geometry.transposed, geometry.groups, static_cast<int64_t>(weight.scalar_type())});
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

  explicit Numbers(const std::vector<int64_t>& list)
      : is_scaled(list[0] != 0), keeps_output_at_hand(list[1] != 0), version_of_beta(list[2]), is_there{true, true} {
    geometry.transposed = list[3] != 0;
    geometry.groups = list[4];
    for (size_t i = 0; i < 4; ++i) {
      is_there[i + 1] = list[i + 5] >= 0;
      dtypes.push_back(is_there[i + 1] ? static_cast<at::ScalarType>(list[i + 5]) : at::kFloat);
    }
    // A rank a size; of a linear layer nothing more.
    const auto rest = static_cast<int64_t>(list.size()) - kRanks;
    const int64_t rank = rest == 4 ? 2 : (rest + 8) / 6;
    auto next = list.begin() + kRanks;
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
    variable_list saved = {
        wants_input || wants_gamma ? weight : Tensor(),
        wants_gamma ? or_undefined(bias) : Tensor(),
        or_undefined(gamma),
        mean,
        var};
    const bool keeps_input = wants_weight || wants_gamma;
    if (keeps_input) {
      const Kept kept = Origin::keep(input);
      kept.recipe.save(ctx);
      saved.insert(saved.end(), kept.tensors.begin(), kept.tensors.end());
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["eps"] = eps;
    const bool keeps_output_at_hand = keeps_input && saved[0].defined() && (wants_gamma || !bias);
    ctx->saved_data["geometry"] =
        Numbers::of(geometry, input, weight, bias, gamma, beta, is_scaled, keeps_output_at_hand);
    if (keeps_output_at_hand && beta) {
      ctx->saved_data["beta"] = *beta;
    }
    at::AutoDispatchBelowADInplaceOrView below; // what is returned is no view, whatever the backend does
    const BatchNorm norm{gamma, beta, mean, var, eps};
    return is_scaled ? apart(geometry, input, weight, bias, norm) : folded(geometry, input, weight, bias, norm);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = unpacked(ctx);
    ctx->saved_data.erase(kUnpacked);
    const Numbers numbers(ctx->saved_data["geometry"].toIntVector());
    bool was_recomputed = false;
    Tensor input = saved_input(ctx, saved, was_recomputed);
    if (was_recomputed) {
      if (ctx->needs_input_grad(0)) {
        hand_over(edge_of_input(0).function.get(), input);
      }
      input = with_history(input, edge_of_input(0));
    }
    size_t edge = 0; // of the tensors that there were
    std::array<bool, 5> wanted{};
    for (size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = numbers.is_there[i] && ctx->needs_input_grad(edge++);
    }
    const Backward pass{
        numbers.geometry,
        input,
        saved[0],
        or_none(saved[1]),
        saved_norm(ctx, saved),
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

  // The output, of which nobody has kept the values.
  static Tensor computed_again(AutogradContext* ctx) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = unpacked(ctx);
    ctx->saved_data[kUnpacked] = c10::ivalue::Tuple::create(torch::autograd::get_current_graph_task_id(), saved);
    const Numbers numbers(ctx->saved_data["geometry"].toIntVector());
    const auto beta = ctx->saved_data.find("beta");
    BatchNorm norm = saved_norm(ctx, saved);
    if (beta != ctx->saved_data.end()) {
      norm.beta = beta->second.toTensor();
      TORCH_CHECK(
          norm.beta->_version() == numbers.version_of_beta,
          "one of the variables needed for gradient computation has been modified by an inplace operation: the bias of a "
          "batch norm, after the activation that follows it was changed in place, too");
    }
    bool was_recomputed = false;
    const Tensor input = saved_input(ctx, saved, was_recomputed);
    return (numbers.is_scaled ? apart : folded)(numbers.geometry, input, saved[0], or_none(saved[1]), norm);
  }

 private:
  // What is saved, unpacked once in a backward pass: a region that is recomputed gives each tensor out once.
  static variable_list unpacked(AutogradContext* ctx) {
    const auto known = ctx->saved_data.find(kUnpacked);
    if (known != ctx->saved_data.end()) {
      const auto& pass_and_tensors = known->second.toTupleRef().elements();
      if (pass_and_tensors[0].toInt() == torch::autograd::get_current_graph_task_id()) {
        return pass_and_tensors[1].toTensorVector();
      }
    }
    return ctx->get_saved_variables();
  }

  static constexpr auto kUnpacked = "unpacked";

  static BatchNorm saved_norm(AutogradContext* ctx, const variable_list& saved) {
    return {or_none(saved[2]), OptionalTensor(), saved[3], saved[4], ctx->saved_data["eps"].toDouble()};
  }

  static Tensor saved_input(AutogradContext* ctx, const variable_list& saved, bool& was_recomputed) {
    if (saved.size() == 5) {
      return {};
    }
    const Recipe recipe = Recipe::saved(ctx);
    was_recomputed = !recipe.is_empty();
    return recipe(variable_list(saved.begin() + 5, saved.end()));
  }
};

namespace {

const torch::autograd::CppNode<ConvBatchNorm>* as_pair(const torch::autograd::Node* node) {
  return dynamic_cast<const torch::autograd::CppNode<ConvBatchNorm>*>(node);
}

} // namespace

bool can_be_computed_again(const Tensor& tensor) {
  const auto* pair = as_pair(tensor.grad_fn().get());
  return pair != nullptr && tensor._version() == 0 && pair->ctx_.saved_data.at("geometry").toIntList()[1] != 0;
}

Tensor computed_again(const torch::autograd::Node* node) {
  const auto* pair = as_pair(node);
  TORCH_CHECK(
      pair != nullptr,
      "an activation's output was changed in place, and compiled autograd does not tell what had computed its input: tune with "
      "activations=False");
  at::NoGradGuard no_grad;
  return ConvBatchNorm::computed_again(const_cast<AutogradContext*>(&pair->ctx_));
}

bool comes_from_frozen_pairs(const torch::autograd::Node* node, int depth) {
  if (node == nullptr) {
    return false;
  }
  if (as_pair(node)) {
    for (size_t i = 1; i < node->num_outputs(); ++i) {
      if (node->next_edge(i).is_valid()) {
        return false;
      }
    }
    return true;
  }
  if (saves_mask(*node)) { // for this reason
    return true;
  }
  if (depth == 0 || node->num_outputs() == 0) {
    return false;
  }
  for (const auto& edge : node->next_edges()) {
    if (edge.is_valid() && !comes_from_frozen_pairs(edge.function.get(), depth - 1)) {
      return false;
    }
  }
  return true;
}

bool comes_from_frozen_pairs(const Tensor& tensor) {
  return comes_from_frozen_pairs(tensor.grad_fn().get(), 4); // pooling, a sum, what is in its branches
}

// --- The operator ----------------------------------------------------------------------------------------------------

// The dtype that the convolution computes in; none where its operands do not agree on one. Autocast casts the operands of
// a convolution, except those in float64.
std::optional<at::ScalarType> computing_dtype(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const auto own = input.scalar_type(), of_weight = weight.scalar_type(), of_bias = bias ? bias->scalar_type() : of_weight;
  if (is_autocast_on(input.device().type())) {
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
