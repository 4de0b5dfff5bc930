// Tensors that need not be saved, because they can be computed again from what is: exactly as they were.
//
// The output of an activation whose derivative needs its input, or of a batch norm that stays, carries its `Origin`:
// what it was made of, and how. A node that is to save such a tensor saves what is in the origin, which the activation
// saves anyway, and computes the tensor again in the backward pass.

#pragma once

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <mutex>
#include <string>
#include <vector>

#include "activation_kinds.h"
#include "operands.h"

namespace convbn_fx {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How a tensor is computed from others: steps on a stack, as a pocket calculator takes them. Without any it is the one
// tensor there is.
class Recipe {
 public:
  bool is_empty() const {
    return steps_.empty();
  }

  Recipe then(const Activation& activation) const {
    Recipe longer = begun();
    longer.steps_.push_back(static_cast<int64_t>(activation.kind));
    longer.numbers_.insert(longer.numbers_.end(), {activation.a, activation.b});
    return longer;
  }

  Recipe then_batch_norm(double eps) const {
    Recipe longer = begun();
    longer.steps_.push_back(kBatchNorm);
    longer.numbers_.push_back(eps);
    return longer;
  }

  Recipe times(const Recipe& other) const {
    Recipe longer = begun();
    const Recipe second = other.begun();
    longer.steps_.insert(longer.steps_.end(), second.steps_.begin(), second.steps_.end());
    longer.numbers_.insert(longer.numbers_.end(), second.numbers_.begin(), second.numbers_.end());
    longer.steps_.push_back(kProduct);
    return longer;
  }

  Tensor operator()(const variable_list& tensors) const {
    if (is_empty()) {
      return tensors[0];
    }
    at::AutoDispatchBelowADInplaceOrView below;
    std::vector<Tensor> stack;
    auto tensor = tensors.begin();
    auto number = numbers_.begin();
    for (const int64_t step : steps_) {
      if (step == kTensor) {
        stack.push_back(*tensor++);
      } else if (step == kBatchNorm) {
        const BatchNorm norm{or_none(tensor[0]), or_none(tensor[1]), tensor[2], tensor[3], *number++};
        tensor += 4;
        stack.back() = norm(stack.back());
      } else if (step == kProduct) {
        const Tensor right = stack.back();
        stack.pop_back();
        stack.back() = stack.back() * right;
      } else {
        stack.back() = Activation{static_cast<Kind>(step), number[0], number[1]}(stack.back());
        number += 2;
      }
    }
    return stack.back();
  }

  // As values of PyTorch's, which is all that the context of a node keeps.
  void save(AutogradContext* ctx, const std::string& name = "input") const {
    if (!is_empty()) {
      ctx->saved_data[name + " steps"] = steps_;
      ctx->saved_data[name + " numbers"] = numbers_;
    }
  }

  static Recipe saved(AutogradContext* ctx, const std::string& name = "input") {
    Recipe recipe;
    const auto steps = ctx->saved_data.find(name + " steps");
    if (steps != ctx->saved_data.end()) {
      recipe.steps_ = steps->second.toIntVector();
      recipe.numbers_ = ctx->saved_data[name + " numbers"].toDoubleVector();
    }
    return recipe;
  }

 private:
  static constexpr int64_t kTensor = -1, kBatchNorm = -2, kProduct = -3; // others are kinds of activations

  Recipe begun() const {
    Recipe recipe = *this;
    if (is_empty()) {
      recipe.steps_.push_back(kTensor);
    }
    return recipe;
  }

  std::vector<int64_t> steps_;
  std::vector<double> numbers_;
};

// What a node saves for the sake of one tensor.
struct Kept {
  variable_list tensors;
  Recipe recipe;
};

// What a tensor was made of. The tensor carries it, as long as it is what it was.
class Origin : public c10::BackendMeta {
 public:
  // Detached from the tensor, or copied with it, it would not be dropped in time.
  c10::intrusive_ptr<c10::BackendMeta> clone(const c10::intrusive_ptr<c10::BackendMeta>&) const override {
    return {};
  }

  static void set(const Tensor& made, const Kept& from) {
    if (made.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
      return;
    }
    auto* other = made.unsafeGetTensorImpl()->get_backend_meta();
    if (other != nullptr && dynamic_cast<Origin*>(other) == nullptr) {
      return; // a backend has something of its own there
    }
    auto origin = c10::make_intrusive<Origin>();
    origin->recipe_ = from.recipe;
    origin->hooks_ = hooks();
    for (const Tensor& tensor : from.tensors) {
      origin->ingredients_.push_back({tensor.defined(), Weak(tensor.getIntrusivePtr()), Contents(tensor)});
    }
    if (origin->hooks_) {
      origin->held_ = from.tensors;
    }
    origin->contents_ = Contents(made);
    origin->offset_ = made.storage_offset();
    origin->sizes_ = made.sizes().vec();
    origin->strides_ = made.strides().vec();
    made.unsafeGetTensorImpl()->set_backend_meta(std::move(origin));
  }

  // What to save for the sake of a tensor: what it was made of, or itself.
  static Kept keep(const Tensor& tensor) {
    auto* origin = dynamic_cast<Origin*>(tensor.unsafeGetTensorImpl()->get_backend_meta());
    Kept kept;
    if (origin == nullptr || !origin->is_under_its_hooks() || !origin->still_makes(tensor) ||
        !origin->add_unchanged(kept.tensors)) {
      return {{tensor}, {}};
    }
    kept.recipe = origin->recipe_;
    return kept;
  }

 private:
  using Weak = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;
  using Hooks = std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>>;

  // What a tensor held when it was looked at. The reference is a weak one, so that no other memory has its address.
  struct Contents {
    int64_t version = 0;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};

    Contents() = default;

    explicit Contents(const Tensor& tensor) {
      if (tensor.defined()) {
        version = tensor._version();
        storage = tensor.storage().getWeakStorageImpl();
      }
    }

    bool are_those_of(const Tensor& tensor) const {
      return tensor._version() == version &&
          tensor.storage().unsafeGetStorageImpl() == storage._unsafe_get_target();
    }
  };

  struct Ingredient {
    bool is_defined;
    Weak weak;
    Contents contents;
  };

  // The innermost hooks on saved tensors. What is made inside of a region that is recomputed is known to be made there
  // again; what comes from outside may come as another tensor.
  static Hooks hooks() {
    return at::SavedTensorDefaultHooks::get_hooks();
  }

  static PyObject* identity(const Hooks& hooks) {
    return hooks ? hooks->first.ptr(&hooks->first.pyinterpreter()) : nullptr;
  }

  // Whether the hooks are those under which the tensor was made. Under others it is of no use any more.
  bool is_under_its_hooks() {
    const bool are_others = identity(hooks()) != identity(hooks_);
    if (!hooks_) {
      return !are_others;
    }
    variable_list dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (are_others) {
      dropped.swap(held_);
    }
    return !held_.empty();
  }

  bool still_makes(const Tensor& tensor) const {
    return contents_.are_those_of(tensor) && tensor.storage_offset() == offset_ &&
        tensor.sizes() == IntArrayRef(sizes_) && tensor.strides() == IntArrayRef(strides_);
  }

  bool add_unchanged(variable_list& found) const {
    for (const Ingredient& ingredient : ingredients_) {
      Tensor tensor;
      if (ingredient.is_defined) {
        auto locked = ingredient.weak.lock();
        if (!locked) {
          return false;
        }
        tensor = Tensor(std::move(locked));
        if (!ingredient.contents.are_those_of(tensor)) {
          return false;
        }
      }
      found.push_back(std::move(tensor));
    }
    return true;
  }

  Recipe recipe_;
  // The node that made the tensor keeps them alive for as long as is needed, unless hooks take away what nodes save.
  std::vector<Ingredient> ingredients_;
  variable_list held_;
  std::mutex mutex_;
  Hooks hooks_;
  Contents contents_;
  int64_t offset_ = 0;
  std::vector<int64_t> sizes_, strides_;
};

// Gives a tensor that was computed again the history that it had, where operations on it are recorded.
inline Tensor with_history(Tensor tensor, const torch::autograd::Edge& edge) {
  if (at::GradMode::is_enabled() && edge.is_valid()) {
    tensor = tensor.variable_data();
    torch::autograd::impl::set_gradient_edge(tensor, edge);
  }
  return tensor;
}

// The history of an input of the node whose backward pass is running; none where a compiler runs it, which records nothing.
inline torch::autograd::Edge edge_of_input(size_t number) {
  const auto node = torch::autograd::get_current_node();
  return node ? node->next_edge(number) : torch::autograd::Edge();
}

// What was saved for the sake of an input, as it was: computed again, and with its history, unless it is what is saved.
inline Tensor as_it_was(const Recipe& recipe, const variable_list& tensors, size_t input) {
  return recipe.is_empty() ? tensors[0] : with_history(recipe(tensors), edge_of_input(input));
}

// Lets an activation that has to compute its output again know that it was computed just now: its node is about to run.
void hand_over(const torch::autograd::Node* activation, const Tensor& output);

// What a pair has computed, from what its node has saved.
Tensor computed_again(const torch::autograd::Node* node);

// Whether the tensor is what a pair has computed, unchanged, and the pair's node has saved enough.
bool can_be_computed_again(const Tensor& tensor);

// Whether all that has computed the tensor, from the last pairs on, has no parameter that trains: what comes next will
// hardly have any.
bool comes_from_frozen_pairs(const Tensor& tensor);

// Whether the node is an activation that saves a mask.
bool saves_mask(const torch::autograd::Node& node);

} // namespace convbn_fx
