"""How values travel between the two processes: changeable things by their numbers one way, JSON and raw bytes the other."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {str(each).removeprefix("torch."): each for each in vars(torch).values() if isinstance(each, torch.dtype)}


class Pickler(pickle.Pickler):
    """Keeps what can be changed in place apart, in `leaves`, so that both sides know it by its number."""

    def __init__(self, file: io.BytesIO, leaves: list):
        super().__init__(file)
        self._leaves, self._numbers = leaves, {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor | np.ndarray | torch.Generator):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._leaves)
            self._leaves.append(value)
        return self._numbers[id(value)]


class Unpickler(pickle.Unpickler):
    """Reads what `Pickler` wrote, with the other side's leaves."""

    def __init__(self, file: io.BytesIO, leaves: list):
        super().__init__(file)
        self.persistent_load = lambda number: leaves[number]


def pack(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return "tensor", leaf.detach().clone(), leaf.requires_grad, isinstance(leaf, torch.nn.Parameter)
    return ("generator", leaf.get_state()) if isinstance(leaf, torch.Generator) else ("array", leaf)


def unpack(kind: str, value: Any, requires_grad: bool = False, is_parameter: bool = False) -> Any:
    if kind == "generator":
        return torch.Generator().set_state(value)
    if kind == "tensor":
        return torch.nn.Parameter(value, requires_grad) if is_parameter else value.requires_grad_(requires_grad)
    return value


def state_of(leaf: Any) -> Any:
    """A copy of what can change in a leaf."""
    if isinstance(leaf, torch.Generator):
        return leaf.get_state()
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf.copy()


def restore(leaf: Any, state: Any) -> None:
    if isinstance(leaf, torch.Generator):
        leaf.set_state(state)
    elif isinstance(leaf, Tensor):
        if leaf.dtype != state.dtype:
            raise TypeError
        if leaf.shape == state.shape:
            leaf.detach().copy_(state)
        else:
            leaf.data = state
    else:
        leaf[...] = state


def refill(container: list | dict, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(items)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    found: list[Tensor] = []
    replace(value, lambda each: found.append(each) or each)
    return found


def replace(value: Any, change: Callable) -> Any:
    """The same value with `change(tensor)` for every tensor in it, in order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([replace(each, change) for each in value])
    return {key: replace(each, change) for key, each in value.items()} if isinstance(value, dict) else value


def encode(value: Any, buffers: list[bytes]) -> Any:
    """JSON for a value; what is no number, text, tensor, array, list, tuple or dict becomes the name of its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and str(value.dtype).removeprefix("torch.") in DTYPES and value.layout == torch.strided:
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1))  # dense, on the CPU
        buffers.append(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        dtype = str(value.dtype).removeprefix("torch.")
        return {"is": "tensor", "dtype": dtype, "shape": list(value.shape), "at": len(buffers) - 1, "grad": value.requires_grad}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        buffers.append(np.ascontiguousarray(value).tobytes())
        scalar = isinstance(value, np.generic)
        return {"is": "array", "dtype": value.dtype.str, "shape": list(value.shape), "at": len(buffers) - 1, "scalar": scalar}
    if isinstance(value, list | tuple):
        return {"is": "list" if isinstance(value, list) else "tuple", "items": [encode(each, buffers) for each in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"is": "dict", "items": {key: encode(each, buffers) for key, each in value.items()}}
    return {"is": "other", "type": type(value).__name__}


def decode(value: Any, buffers: list[bytearray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = value["is"]
    if kind == "tensor":
        dtype, shape, buffer = DTYPES[value["dtype"]], value["shape"], buffers[value["at"]]
        flat = torch.frombuffer(bytearray(buffer), dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        return flat.reshape(shape).requires_grad_(bool(value["grad"]) and dtype.is_floating_point)
    if kind == "array":
        array = np.frombuffer(bytearray(buffers[value["at"]]), dtype=np.dtype(value["dtype"])).reshape(value["shape"])
        return array[()] if value["scalar"] else array
    if kind == "dict":
        return {str(key): decode(each, buffers) for key, each in value["items"].items()}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(decode(each, buffers) for each in value["items"])
    return type(str(value["type"]), (), {})()  # an object of no use, whose type has the right name
