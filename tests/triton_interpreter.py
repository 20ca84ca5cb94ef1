"""Triton's interpreter, made to run here: kernels on CPU tensors where there is no CUDA device."""

import os

import numpy as np
import torch


def use_interpreter_without_cuda() -> None:
    """Has to come before the first import of a kernel."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language as tl  # noqa: PLC0415  reads the environment
    from triton.runtime import interpreter  # noqa: PLC0415

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor, scope):
        # Its scalars are arrays of one element, which numpy 2.4 does not take for an int: no range() of a kernel works.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_with_index

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_of_floats(builder, a, b, d, input_precision, max_num_imprecise_acc):
        # It multiplies bfloat16 as the unsigned integers that it keeps them in.
        return create_dot(builder, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(data.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_floats

    def reduce_slices(reduction, inputs):
        # It calls a kernel's own combination for one element after the other.
        inputs, axis = reduction.unravel(inputs, reduction.axis)
        whole = [value.handle.data for value in inputs]
        results = [data.take(0, axis) for data in whole]
        for index in range(1, whole[0].shape[axis]):
            left = [reduction.to_tensor(data, value.dtype) for data, value in zip(results, inputs, strict=True)]
            right = [
                reduction.to_tensor(data.take(index, axis), value.dtype)
                for data, value in zip(whole, inputs, strict=True)
            ]
            combined = reduction.combine_fn.fn(*left, *right)
            results = [value.handle.data for value in (combined if isinstance(combined, tuple) else (combined,))]
        if reduction.keep_dims:
            results = [np.expand_dims(data, axis) for data in results]
        return [reduction.to_tensor(data, value.dtype) for data, value in zip(results, inputs, strict=True)]

    generic_reduce = interpreter.ReduceOps.generic_reduce

    def reduce_along_axis(reduction, inputs):
        return (generic_reduce if reduction.axis is None else reduce_slices)(reduction, inputs)

    interpreter.ReduceOps.generic_reduce = reduce_along_axis
