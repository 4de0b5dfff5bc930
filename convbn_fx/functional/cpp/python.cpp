// What Python calls at every pair, without the boxes of `torch.ops` and of Python's own `autograd.Function`: each takes
// about as long as a small convolution.
//
// Where there are no headers of Python's, nothing is here. Then the operator is called through `torch.ops`.

#if __has_include(<Python.h>)

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

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

Numbers numbers(PyObject* object) {
  TORCH_CHECK_TYPE(PyTuple_Check(object), "expected a tuple, got ", Py_TYPE(object)->tp_name);
  Numbers values;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i) {
    values.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(object, i)));
  }
  return values;
}

void check_conversions() {
  if (PyErr_Occurred()) {
    throw python_error();
  }
}

// The operator. Takes its arguments in the order of its schema.
PyObject* conv_batch_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 14, "conv_batch_norm: expected 14 arguments, got ", count);
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
  const Tensor &input = tensor(args[0]), &weight = tensor(args[1]), &mean = tensor(args[5]), &var = tensor(args[6]);
  const OptionalTensor bias = optional_tensor(args[2]), gamma = optional_tensor(args[3]), beta = optional_tensor(args[4]);
  const double eps = PyFloat_AsDouble(args[7]);
  const Numbers stride = numbers(args[8]), padding = numbers(args[9]), dilation = numbers(args[10]);
  const bool transposed = PyObject_IsTrue(args[11]) == 1;
  const Numbers output_padding = numbers(args[12]);
  const int64_t groups = PyLong_AsLongLong(args[13]);
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
  TORCH_CHECK_TYPE(count == 4, "activation: expected 4 arguments, got ", count);
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

// A tensor without memory that stands for a convolution's output. Takes what waits (an object with a method `gradients`),
// the convolution's input, weight and bias, and the shape and dtype of its output.
PyObject* stand_in(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "stand_in: expected 6 arguments, got ", count);
  const Tensor &input = tensor(args[1]), &weight = tensor(args[2]), bias = optional_tensor(args[3]).value_or(Tensor());
  const Numbers shape = numbers(args[4]);
  TORCH_CHECK_TYPE(THPDtype_Check(args[5]), "expected a dtype, got ", Py_TYPE(args[5])->tp_name);
  const auto dtype = reinterpret_cast<THPDtype*>(args[5])->scalar_type;
  check_conversions();
  const auto device = input.device();
  Tensor output = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, device)),
      c10::DispatchKeySet(c10::computeDispatchKey(dtype, c10::kStrided, device)),
      c10::scalarTypeToTypeMeta(dtype));
  output.storage().unsafeGetStorageImpl()->set_throw_on_mutable_data_ptr();
  output.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  output.unsafeGetTensorImpl()->set_python_dispatch(true);
  if (torch::autograd::compute_requires_grad(input, weight, bias)) {
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
