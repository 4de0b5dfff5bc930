// Activation functions and batch norms that save what others save anyway.
//
// An activation whose output tells its derivative saves the output, which the next convolution saves, too. One that
// needs its input saves that alone: its output can be computed again (recomputation.h). So can the output of a batch
// norm that stays. Where nothing trains, nobody saves the output, and a mask of one byte an element tells enough.

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "recomputation.h"

namespace convbn_fx {

namespace {

using torch::autograd::Edge;
using torch::autograd::get_current_node;

enum class Saves : int64_t { kInput, kOutput, kMask };

constexpr auto kHandedOver = "handed over";

struct ActivationFunction : torch::autograd::Function<ActivationFunction> {
  static Tensor forward(
      AutogradContext* ctx,
      Tensor input,
      const Activation& activation,
      Saves saves,
      bool in_place,
      const Kept& kept,
      bool is_free) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output = input;
    if (!in_place) {
      output = activation(input);
    } else if (is_free) { // its memory has become that of what is kept
      Tensor computed = activation(kept.tensors[0]);
      if (computed.strides() != input.strides()) { // a backend's choice
        computed = at::empty_like(input).copy_(computed);
      }
      input.unsafeGetTensorImpl()->set_storage_keep_dtype(computed.storage());
    } else {
      activation.in_place(output);
    }
    if (in_place) {
      ctx->mark_dirty({input});
    }
    if (saves == Saves::kMask) {
      ctx->save_for_backward({activation.mask(output)});
    } else if (saves == Saves::kOutput && kept.tensors.empty()) {
      // Without complaint where it is changed in place later, which is allowed where PyTorch saves the input; then a
      // witness tells, and the input is computed again.
      ctx->save_for_backward({output.variable_data()});
      const Tensor witness(at::detail::empty_cpu({0}, at::kFloat)); // not by an operator, which modes would see
      witness.unsafeGetTensorImpl()->set_version_counter(output.unsafeGetTensorImpl()->version_counter());
      ctx->saved_data["witness"] = witness;
      ctx->saved_data["version"] = static_cast<int64_t>(output._version()) + in_place; // marked as dirty, it gets one more
    } else {
      ctx->save_for_backward(kept.tensors);
      kept.recipe.save(ctx);
    }
    ctx->saved_data["kind"] = static_cast<int64_t>(activation.kind);
    ctx->saved_data["saves"] = static_cast<int64_t>(saves);
    if (activation.has_numbers()) {
      ctx->saved_data["a"] = activation.a;
      ctx->saved_data["b"] = activation.b;
    }
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    Activation activation{static_cast<Kind>(ctx->saved_data["kind"].toInt()), 0, 0};
    if (activation.has_numbers()) {
      activation.a = ctx->saved_data["a"].toDouble();
      activation.b = ctx->saved_data["b"].toDouble();
    }
    const auto saves = static_cast<Saves>(ctx->saved_data["saves"].toInt());
    const variable_list saved = ctx->get_saved_variables();
    const Recipe recipe = Recipe::saved(ctx);
    const auto witness = ctx->saved_data.find("witness");
    const bool by_output = saves == Saves::kOutput;
    const bool is_changed =
        witness != ctx->saved_data.end() && witness->second.toTensor()._version() != ctx->saved_data["version"].toInt();
    const Tensor& grad = grad_outputs[0];
    variable_list found(6);
    if (!grad.defined()) {
      return found;
    }
    if (is_changed) {
      const Edge edge = edge_of_input(0);
      const Tensor input = with_history(computed_again(edge.function.get()), edge);
      found[0] = activation.backward_by_input(grad, input);
      return found;
    }
    const auto known = ctx->saved_data.find(kHandedOver);
    Tensor value;
    if (known == ctx->saved_data.end()) {
      value = recipe(saved);
    } else {
      value = known->second.toTensor();
      ctx->saved_data.erase(known);
    }
    if (by_output || !recipe.is_empty()) {
      value = with_history(value, by_output ? Edge(get_current_node(), 0) : edge_of_input(0));
    }
    found[0] = saves == Saves::kMask ? activation.backward_by_mask(grad, value) : activation.backward(grad, value);
    return found;
  }
};

struct FrozenBatchNorm : torch::autograd::Function<FrozenBatchNorm> {
  static Tensor forward(
      AutogradContext* ctx,
      const Tensor& input,
      const OptionalTensor& weight,
      const OptionalTensor& bias,
      const Tensor& mean,
      const Tensor& var,
      double eps,
      const Kept& kept) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved = {or_undefined(weight), mean, var};
    saved.insert(saved.end(), kept.tensors.begin(), kept.tensors.end());
    ctx->save_for_backward(saved);
    kept.recipe.save(ctx);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["is_there"] = std::vector<int64_t>{weight.has_value(), bias.has_value()};
    return BatchNorm{weight, bias, mean, var, eps}(input);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    variable_list found(7);
    if (!grad_outputs[0].defined()) {
      return found;
    }
    const variable_list saved = ctx->get_saved_variables();
    const Tensor input = as_it_was(Recipe::saved(ctx), variable_list(saved.begin() + 3, saved.end()), 0);
    const auto is_there = ctx->saved_data["is_there"].toIntVector();
    const bool wants_input = ctx->needs_input_grad(0);
    size_t edge = 1; // of the tensors that there were
    const bool wants_weight = is_there[0] && ctx->needs_input_grad(edge++);
    const bool wants_bias = is_there[1] && ctx->needs_input_grad(edge++);
    const auto gradients = at::native_batch_norm_backward(
        grad_outputs[0],
        input,
        or_none(saved[0]),
        saved[1],
        saved[2],
        OptionalTensor(),
        OptionalTensor(),
        false,
        ctx->saved_data["eps"].toDouble(),
        {wants_input, wants_weight, wants_bias});
    found[0] = std::get<0>(gradients);
    found[1] = wants_weight ? std::get<1>(gradients) : Tensor();
    found[2] = wants_bias ? std::get<2>(gradients) : Tensor();
    return found;
  }
};

// Both factors require a gradient, so that each is saved for the other's sake.
struct Product : torch::autograd::Function<Product> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& left, const Tensor& right, const Kept& of_left, const Kept& of_right) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list saved = of_left.tensors;
    saved.insert(saved.end(), of_right.tensors.begin(), of_right.tensors.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["of_left"] = static_cast<int64_t>(of_left.tensors.size());
    of_left.recipe.save(ctx, "left");
    of_right.recipe.save(ctx, "right");
    return left * right;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
    variable_list found(4);
    const Tensor& grad = grad_outputs[0];
    if (!grad.defined()) {
      return found;
    }
    const variable_list saved = ctx->get_saved_variables();
    const auto middle = saved.begin() + ctx->saved_data["of_left"].toInt();
    const Tensor left = as_it_was(Recipe::saved(ctx, "left"), variable_list(saved.begin(), middle), 0);
    const Tensor right = as_it_was(Recipe::saved(ctx, "right"), variable_list(middle, saved.end()), 1);
    if (ctx->needs_input_grad(0)) {
      found[0] = (grad * right).sum_to_size(left.sizes());
    }
    if (ctx->needs_input_grad(1)) {
      found[1] = (grad * left).sum_to_size(right.sizes());
    }
    return found;
  }
};

bool is_recorded(const Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad() && at::isFloatingType(tensor.scalar_type());
}

} // namespace

void hand_over(const torch::autograd::Node* node, const Tensor& output) {
  const auto* activation = dynamic_cast<const torch::autograd::CppNode<ActivationFunction>*>(node);
  if (activation == nullptr) {
    return;
  }
  auto& data = const_cast<AutogradContext&>(activation->ctx_).saved_data;
  if (data.at("saves").toInt() == static_cast<int64_t>(Saves::kOutput) && data.count("witness") == 0) {
    data[kHandedOver] = output;
  }
}

bool saves_mask(const torch::autograd::Node& node) {
  const auto* activation = dynamic_cast<const torch::autograd::CppNode<ActivationFunction>*>(&node);
  return activation != nullptr &&
      activation->ctx_.saved_data.at("saves").toInt() == static_cast<int64_t>(Saves::kMask);
}

namespace {

// The tensor's values, which an operation in place is about to overwrite, with its history up to now. Where nobody else
// has a view of the memory, the tensor gets other memory instead of a copy of this.
Tensor values_of(const Tensor& tensor, bool& is_free) {
  is_free = is_memory_of_its_own(tensor);
  if (!is_free) {
    return tensor.clone();
  }
  Tensor values = tensor.variable_data();
  torch::autograd::impl::set_gradient_edge(values, torch::autograd::impl::gradient_edge(tensor));
  return values;
}

// As PyTorch's own, and as it records it.
Tensor as_ever(Tensor input, const Activation& activation, bool in_place) {
  if (!in_place) {
    return activation(input);
  }
  activation.in_place(input);
  return input;
}

Tensor recorded(Tensor input, const Activation& activation, bool in_place) {
  const bool casts = activation.is_composed() && is_autocast_on(input.device().type()); // for some of the functions
  if (casts || !activation.is_told_in(input.scalar_type())) {
    return as_ever(input, activation, in_place);
  }
  Kept kept = Origin::keep(input);
  const bool can_be_recomputed = !kept.recipe.is_empty();
  auto saves = Saves::kInput;
  if (activation.by_output()) {
    saves = Saves::kOutput;
    if (can_be_recomputed) {
      kept.recipe = kept.recipe.then(activation);
    } else {
      kept = {};
      if (activation.has_mask() && comes_from_frozen_pairs(input)) {
        saves = Saves::kMask;
      } else if (activation.keeps_output_anyway()) {
        return as_ever(input, activation, in_place);
      } else if (!can_be_computed_again(input)) {
        if (!activation.has_mask()) {
          return as_ever(input, activation, in_place);
        }
        saves = Saves::kMask;
      }
    }
  }
  bool is_free = false;
  if (in_place && saves == Saves::kInput && !can_be_recomputed) {
    kept.tensors[0] = values_of(input, is_free);
  }
  const Tensor output = ActivationFunction::apply(input, activation, saves, in_place, kept, is_free);
  if (!kept.tensors.empty()) {
    Origin::set(output, saves == Saves::kInput ? Kept{kept.tensors, kept.recipe.then(activation)} : kept);
  }
  return output;
}

} // namespace

std::vector<std::string> activation_kinds() {
  return {kNames.begin(), kNames.end()};
}

Activation checked(int64_t kind, double a, double b) {
  TORCH_CHECK_VALUE(kind >= 0 && kind < static_cast<int64_t>(kNames.size()), "activation: there is no kind ", kind);
  return {static_cast<Kind>(kind), a, b};
}

Tensor activation(const Tensor& input, int64_t kind, double a, double b) {
  const Activation function = checked(kind, a, b);
  return is_recorded(input) ? recorded(input, function, false) : function(input);
}

Tensor& activation_(Tensor& input, int64_t kind, double a, double b) {
  const Activation function = checked(kind, a, b);
  // Of a leaf PyTorch's own raises; of a view, it has to write the history of its base.
  if (is_recorded(input) && !input.is_leaf() && !input.is_view()) {
    recorded(input, function, true);
  } else {
    function.in_place(input);
  }
  return input;
}

Tensor frozen_batch_norm(
    const Tensor& input,
    const OptionalTensor& weight,
    const OptionalTensor& bias,
    const Tensor& mean,
    const Tensor& var,
    double eps) {
  if (!is_recorded(input) && !(at::GradMode::is_enabled() && (requires_grad(weight) || requires_grad(bias)))) {
    return BatchNorm{weight, bias, mean, var, eps}(input);
  }
  Kept kept = Origin::keep(input);
  const Tensor output = FrozenBatchNorm::apply(input, weight, bias, mean, var, eps, kept);
  kept.recipe = kept.recipe.then_batch_norm(eps);
  kept.tensors.insert(kept.tensors.end(), {or_undefined(weight), or_undefined(bias), mean, var});
  Origin::set(output, kept);
  return output;
}

Tensor product(const Tensor& left, const Tensor& right) {
  if (!is_recorded(left) || !is_recorded(right) || left.scalar_type() != right.scalar_type()) {
    return left * right;
  }
  const Kept of_left = Origin::keep(left), of_right = Origin::keep(right);
  const Tensor output = Product::apply(left, right, of_left, of_right);
  Kept kept{of_left.tensors, of_left.recipe.times(of_right.recipe)};
  kept.tensors.insert(kept.tensors.end(), of_right.tensors.begin(), of_right.tensors.end());
  Origin::set(output, kept);
  return output;
}

TORCH_LIBRARY_FRAGMENT(convbn_fx, library) {
  library.def("activation_kinds() -> str[]", activation_kinds);
  library.def("activation(Tensor input, int kind, float a, float b) -> Tensor");
  library.def("activation_(Tensor(a!) input, int kind, float a, float b) -> Tensor(a!)");
  library.def(
      "frozen_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps) "
      "-> Tensor");
  library.def("product(Tensor left, Tensor right) -> Tensor");
}

TORCH_LIBRARY_IMPL(convbn_fx, CompositeExplicitAutograd, library) {
  library.impl("activation", activation);
  library.impl("activation_", activation_);
  library.impl("frozen_batch_norm", frozen_batch_norm);
  library.impl("product", product);
}

TORCH_LIBRARY_IMPL(convbn_fx, Autograd, library) {
  library.impl("activation", activation);
  library.impl("activation_", activation_);
  library.impl("frozen_batch_norm", frozen_batch_norm);
  library.impl("product", product);
}

} // namespace convbn_fx
