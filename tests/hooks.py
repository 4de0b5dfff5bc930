"""Hooks of every kind; each changes what goes through."""

from torch import nn
from torch.nn.modules import module as global_hooks


def double(tensors):
    return tuple(None if tensor is None else 2 * tensor for tensor in tensors)


#: How a hook is put on a module.
HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, args, output: output.sin()),
    "forward with kwargs": lambda m: m.register_forward_hook(
        lambda m, args, kwargs, output: output * 2 + len(kwargs), with_kwargs=True
    ),
    "forward always called": lambda m: m.register_forward_hook(
        lambda m, args, output: output + 1, prepend=True, always_call=True
    ),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0].cos(),)),
    "forward pre with kwargs": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    ),
    "full backward": lambda m: m.register_full_backward_hook(lambda m, grad_in, grad_out: double(grad_in)),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, grad_out: double(grad_out)),
    "non-full backward": lambda m: m.register_backward_hook(lambda m, grad_in, grad_out: double(grad_in)),
}


def only_inside(function):
    """A global hook that lets whole models be, so that only what happens at each layer counts."""
    return lambda m, *args: function(m, *args) if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) else None


GLOBAL_HOOKS = {
    "forward": lambda: global_hooks.register_module_forward_hook(
        only_inside(lambda m, args, output: output.sin())
    ),
    "forward pre": lambda: global_hooks.register_module_forward_pre_hook(
        only_inside(lambda m, args: (args[0].cos(),))
    ),
    "full backward": lambda: global_hooks.register_module_full_backward_hook(
        only_inside(lambda m, grad_in, grad_out: double(grad_in))
    ),
    "full backward pre": lambda: global_hooks.register_module_full_backward_pre_hook(
        only_inside(lambda m, grad_out: double(grad_out))
    ),
}
