// What Python calls at every pair, without the boxes of `torch.ops` and of Python's own `autograd.Function`: each takes
// about as long as a small convolution.
//
// Where there are no headers of Python's, nothing is here. Then the operator is called through `torch.ops`.

#if __has_include(<Python.h>)

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <memory>
#include <optional>

namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::variable_list;
using Numbers = c10::SmallVector<int64_t, 5>;
using OptionalTensor = std::optional<Tensor>;

const Tensor& tensor(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor, got ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

OptionalTensor optional_tensor(PyObject* object) {
  return object == Py_None ? OptionalTensor() : OptionalTensor(tensor(object));
}

// One number, or one for each dimension.
Numbers numbers(PyObject* object) {
  if (PyLong_Check(object)) {
    return {PyLong_AsLongLong(object)};
  }
  TORCH_CHECK_TYPE(PyTuple_Check(object) || PyList_Check(object), "expected numbers, got ", Py_TYPE(object)->tp_name);
  Numbers values;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
    values.push_back(PyLong_AsLongLong(PySequence_Fast_GET_ITEM(object, i)));
  }
  return values;
}

void check_conversions() {
  if (PyErr_Occurred()) {
    throw python_error();
  }
}

void check_count(Py_ssize_t count, Py_ssize_t expected) {
  TORCH_CHECK_TYPE(count == expected, "expected ", expected, " arguments, got ", count);
}

// A field of a tuple of operands: see operands.py.
PyObject* field(PyObject* operands, Py_ssize_t index, Py_ssize_t size) {
  TORCH_CHECK_TYPE(
      PyTuple_Check(operands) && PyTuple_GET_SIZE(operands) == size, "expected ", size, " operands in a tuple");
  return PyTuple_GET_ITEM(operands, index);
}

// The operator. Takes the input, a `Convolution` whose padding is in numbers, and a `BatchNorm`.
PyObject* conv_batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count(count, 3);
  static const auto operation = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("convbn_fx::conv_batch_norm", "")
                                    .typed<Tensor(
                                        const Tensor&,
                                        const Tensor&,
                                        const OptionalTensor&,
                                        const OptionalTensor&,
                                        const OptionalTensor&,
                                        const Tensor&,
                                        const Tensor&,
                                        double,
                                        IntArrayRef,
                                        IntArrayRef,
                                        IntArrayRef,
                                        bool,
                                        IntArrayRef,
                                        int64_t)>();
  const auto conv = [args](Py_ssize_t index) { return field(args[1], index, 9); };
  const auto norm = [args](Py_ssize_t index) { return field(args[2], index, 5); };
  const Tensor &input = tensor(args[0]), &weight = tensor(conv(1)), &mean = tensor(norm(0)), &var = tensor(norm(1));
  const OptionalTensor bias = optional_tensor(conv(2)), gamma = optional_tensor(norm(2)), beta = optional_tensor(norm(3));
  const double eps = PyFloat_AsDouble(norm(4));
  const auto of_dimensions = [&](Py_ssize_t index) { return weight.dim() > 2 ? numbers(conv(index)) : Numbers(); };
  const Numbers stride = of_dimensions(3), padding = of_dimensions(4), dilation = of_dimensions(5);
  const bool transposed = PyObject_IsTrue(conv(6)) == 1;
  const Numbers output_padding = of_dimensions(7);
  const int64_t groups = PyLong_AsLongLong(conv(8));
  check_conversions();
  Tensor output;
  {
    pybind11::gil_scoped_release without_lock;
    output = operation.call(
        input, weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation, transposed, output_padding, groups);
  }
  return THPVariable_Wrap(output);
  END_HANDLE_TH_ERRORS
}

// An activation. Takes its arguments in the order of its schema.
template <bool in_place>
PyObject* activation(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count(count, 4);
  using Given = std::conditional_t<in_place, Tensor&, const Tensor&>;
  using Made = std::conditional_t<in_place, Tensor&, Tensor>;
  static const auto operation = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow(in_place ? "convbn_fx::activation_" : "convbn_fx::activation", "")
                                    .typed<Made(Given, int64_t, double, double)>();
  Tensor input = tensor(args[0]);
  const int64_t kind = PyLong_AsLongLong(args[1]);
  const double a = PyFloat_AsDouble(args[2]), b = PyFloat_AsDouble(args[3]);
  check_conversions();
  Tensor output;
  {
    pybind11::gil_scoped_release without_lock;
    output = operation.call(input, kind, a, b);
  }
  return THPVariable_Wrap(output);
  END_HANDLE_TH_ERRORS
}

// The history of what stands for a convolution's output: asks what waits for the gradients of its operands.
struct DeferredConvolution : Node {
  explicit DeferredConvolution(PyObject* waiting) : waiting_(py::reinterpret_borrow<py::object>(waiting)) {}

  ~DeferredConvolution() override {
    if (!Py_IsInitialized()) {
      waiting_.release();
      return;
    }
    py::gil_scoped_acquire lock;
    waiting_ = py::object();
  }

  variable_list apply(variable_list&& grad_outputs) override {
    py::gil_scoped_acquire lock;
    try {
      const auto is_wanted = [this](size_t i) { return i < num_outputs() && task_should_compute_output(i); };
      variable_list gradients;
      for (const py::handle gradient :
           waiting_.attr("gradients")(grad_outputs[0], py::make_tuple(is_wanted(0), is_wanted(1), is_wanted(2)))) {
        gradients.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
      }
      gradients.resize(num_outputs());
      return gradients;
    } catch (py::error_already_set& error) {
      error.restore();
      python_error kept;
      kept.persist();
      throw std::move(kept);
    }
  }

  std::string name() const override {
    return "DeferredConvolution";
  }

 private:
  py::object waiting_;
};

// How PyTorch owns a node depends on its version.
template <typename Owner>
struct Owned;

template <typename Base>
struct Owned<std::shared_ptr<Base>> {
  template <typename Derived>
  static std::shared_ptr<Base> make(PyObject* waiting) {
    return std::shared_ptr<Base>(new Derived(waiting));
  }
};

template <typename Base>
struct Owned<c10::intrusive_ptr<Base>> {
  template <typename Derived>
  static c10::intrusive_ptr<Base> make(PyObject* waiting) {
    return c10::make_intrusive<Derived>(waiting);
  }
};

// The sizes of a convolution's output; none where it refuses its operands. As `output_shape` in geometry.py.
std::optional<Numbers> output_sizes(const Tensor& input, const Tensor& weight, PyObject* operands) {
  const auto conv = [operands](Py_ssize_t index) { return field(operands, index, 9); };
  if (input.dim() != weight.dim()) {
    return std::nullopt;
  }
  const bool transposed = PyObject_IsTrue(conv(6)) == 1;
  int64_t taken = weight.size(0), given = weight.size(1) * PyLong_AsLongLong(conv(8));
  if (!transposed) {
    std::swap(taken, given);
  }
  if (input.size(1) != taken) {
    return std::nullopt;
  }
  Numbers sizes = {input.size(0), given};
  const Numbers stride = numbers(conv(3)), padding = numbers(conv(4)), dilation = numbers(conv(5)), extra = numbers(conv(7));
  for (int64_t i = 0; i + 2 < weight.dim(); ++i) {
    const auto of = [i](const Numbers& values) { return values.size() == 1 ? values[0] : values.at(i); };
    const int64_t size = input.size(i + 2), reach = of(dilation) * (weight.size(i + 2) - 1), both = 2 * of(padding);
    sizes.push_back(
        transposed ? (size - 1) * of(stride) - both + reach + of(extra) + 1
                   : (size + both - reach - 1) / std::max<int64_t>(of(stride), 1) + 1);
    if (size + both < reach + 1 && !transposed) {
      return std::nullopt;
    }
  }
  check_conversions();
  return std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; }) ? std::optional(sizes)
                                                                                         : std::nullopt;
}

// A tensor without memory that stands for a convolution's output; None where that is better computed at once. It is what
// `_stand_in` in deferred.py makes. Takes what waits (an object with a method `gradients`), the input, and a `Convolution`
// whose padding is in numbers. Autocast is off.
PyObject* stand_in(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  check_count(count, 3);
  const Tensor &input = tensor(args[1]), &weight = tensor(field(args[2], 1, 9)),
               bias = optional_tensor(field(args[2], 2, 9)).value_or(Tensor());
  const auto dtype = input.scalar_type();
  const auto sizes = output_sizes(input, weight, args[2]);
  const bool trains = torch::autograd::compute_requires_grad(input, weight, bias);
  if (!sizes || (!trains && c10::multiply_integers(*sizes) < input.numel()) || weight.scalar_type() != dtype ||
      (bias.defined() && bias.scalar_type() != dtype)) {
    Py_RETURN_NONE;
  }
  const auto device = input.device();
  Tensor output = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, device)),
      c10::DispatchKeySet(c10::computeDispatchKey(dtype, c10::kStrided, device)),
      c10::scalarTypeToTypeMeta(dtype));
  output.storage().unsafeGetStorageImpl()->set_throw_on_mutable_data_ptr();
  output.unsafeGetTensorImpl()->set_sizes_contiguous(*sizes);
  output.unsafeGetTensorImpl()->set_python_dispatch(true);
  if (trains) {
    using Owner = decltype(torch::autograd::Edge::function);
    const Owner node = Owned<Owner>::make<DeferredConvolution>(args[0]);
    node->set_next_edges(torch::autograd::collect_next_edges(input, weight, bias));
    torch::autograd::create_gradient_edge(output, node);
  }
  return THPVariable_Wrap(output);
  END_HANDLE_TH_ERRORS
}

template <typename Function>
PyMethodDef method(const char* name, Function* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method("conv_batch_norm", conv_batch_norm),
    method("stand_in", stand_in),
    method("activation", activation<false>),
    method("activation_", activation<true>),
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "convbn_fx_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit_convbn_fx_native() {
  return PyModule_Create(&module);
}

#endif
