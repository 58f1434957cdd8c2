"""An encoder of TensorFlow's frozen graphs, without TensorFlow, for tests of their reader.

Protocol Buffers' encoding: protobuf.dev/programming-guides/encoding; the messages GraphDef,
NodeDef, AttrValue and TensorProto: tensorflow/core/framework/*.proto.
"""

from __future__ import annotations

import struct

import numpy as np


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    low, high = value & 127, value >> 7
    return bytes([low | 128]) + varint(high) if high else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a message: a number, or bytes with their length."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def constant(name: str, values: np.ndarray, content: bool = True, dtype: int = 1) -> bytes:
    """A NodeDef of op Const: its name, its op, and the attributes dtype and value.

    Equal numbers that are not bytes are written once, as TensorFlow does.
    """
    dims = b"".join(field(2, field(1, size)) for size in values.shape)
    once = not content and np.ptp(values) == 0
    numbers = field(4 if content else 5, values.flat[: 1 if once else None].astype("<f4").tobytes())
    tensor = field(1, dtype) + field(2, dims) + numbers
    value = field(5, field(1, b"value") + field(2, field(8, tensor)))
    kind = field(5, field(1, b"dtype") + field(2, field(6, dtype)))
    return field(1, name.encode()) + field(2, b"Const") + kind + value


def operation(name: str, op: str, *inputs: str) -> bytes:
    """Any other NodeDef, with a float among its attributes, as batch norm's epsilon is."""
    epsilon = field(1, b"variance_epsilon") + field(2, varint(4 * 8 + 5) + struct.pack("<f", 0.001))
    read = b"".join(field(3, source.encode()) for source in inputs)
    return field(1, name.encode()) + field(2, op.encode()) + read + field(5, epsilon)


def graph_of(found: dict[str, np.ndarray], **how: object) -> bytes:
    """A GraphDef: the constants among operations and constants that are not wanted."""
    nodes = [operation("DecodeJpeg", "DecodeJpeg", "DecodeJpeg/contents")]
    nodes += [constant("pool_3/_reshape/shape", np.zeros(2), dtype=3)]
    for name, values in found.items():
        nodes += [constant(name, values, **how), operation(f"{name}/read", "Identity", name)]
    versions = field(4, field(1, 8))  # a field that is no node
    return b"".join(field(1, node) for node in nodes) + versions
