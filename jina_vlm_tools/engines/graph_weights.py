"""Put matrices into drawn graphs, whole or in a few bits, and write these to disk. A matrix is read, quantized and
written when its turn comes, so that memory holds one at a time."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from .graphs import DOMAIN, MICROSOFT, ROWS, Drawing


# How many numbers of a row share a scale and a zero point, by their bits. Larger blocks are faster and smaller.
BLOCKS = {8: 128, 4: 32}
INT8_PRODUCTS = 4  # ONNX Runtime's "accuracy level": inputs of a product are rounded to 8 bits, by blocks, as it runs
ROWS_AT_A_TIME = 4096
_TYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.uint8: "UINT8"}


def write_graph(drawing: Drawing, path: Path, bits: Callable[[str], int | None], suffix: str = ".data") -> None:
    """
    Write a graph of ONNX, with its weights beside it in a file.

    Args:
        bits: How many each number of a matrix has, by the matrix's name: 8, 4, or None for float32.
        suffix: What the name of this file adds to the graph's.
    """
    graph = drawing.graph.graph
    for node in [node for node in graph if node.domain == DOMAIN]:
        name = node.attributes["matrix"].as_string()
        make = _rows if node.op_type == ROWS else _product
        tape = ir.tape.Tape()
        value = make(tape, node.inputs[0], name, drawing.matrices[name], bits(name))
        for initializer in tape.initializers:
            graph.initializers.setdefault(initializer.name, initializer)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [value])
    del drawing.graph.opset_imports[DOMAIN]
    drawing.graph.opset_imports[MICROSOFT] = 1
    ir.save(drawing.graph, path, external_data=f"{path.name}{suffix}")


def _product(tape: ir.tape.Tape, states: ir.Value, name: str, matrix: torch.Tensor, bits: int | None) -> ir.Value:
    rows, columns = matrix.shape
    if bits is None:
        weight = _later(tape, f"{name}.weight", (columns, rows), torch.float32, lambda: matrix.float().T.contiguous())
        return tape.op("MatMul", [states, weight])
    size = BLOCKS[bits]
    blocks = -(-columns // size)
    parts = lru_cache(1)(lambda: quantize_blocks(matrix, bits))
    shapes = {
        "quantized": ((rows, blocks, size * bits // 8), torch.uint8),
        "scales": ((rows, blocks), torch.float32),
        "zero_points": ((rows, -(-blocks * bits // 8)), torch.uint8),
    }
    weights = [
        _later(tape, f"{name}.{part}", shape, dtype, lambda index=index: parts()[index])
        for index, (part, (shape, dtype)) in enumerate(shapes.items())
    ]
    settings = {"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": INT8_PRODUCTS}
    return tape.op("MatMulNBits", [states, *weights], settings, domain=MICROSOFT, version=1)


def _rows(tape: ir.tape.Tape, ids: ir.Value, name: str, matrix: torch.Tensor, bits: int | None) -> ir.Value:
    """Whole rows keep the checkpoint's type: they are exact, and half as large."""
    if bits is None:
        rows = _later(tape, f"{name}.weight", tuple(matrix.shape), matrix.dtype, lambda: matrix.contiguous())
        return tape.op("Cast", [tape.op("Gather", [rows, ids])], {"to": ir.DataType.FLOAT})
    parts = lru_cache(1)(lambda: quantize_rows(matrix))
    quantized = _later(tape, f"{name}.quantized", tuple(matrix.shape), torch.uint8, lambda: parts()[0])
    scales = _later(tape, f"{name}.scales", (len(matrix), 2), torch.float32, lambda: parts()[1])
    scale, least = tape.op_multi_out(
        "Split", [tape.op("Gather", [scales, ids])], {"axis": -1, "num_outputs": 2}, num_outputs=2
    )
    numbers = tape.op("Cast", [tape.op("Gather", [quantized, ids])], {"to": ir.DataType.FLOAT})
    return tape.op("Add", [tape.op("Mul", [numbers, scale]), least])


def _later(tape: ir.tape.Tape, name: str, shape: tuple, dtype: torch.dtype, make: Callable[[], torch.Tensor]):
    """A tensor that is made each time it is asked for."""
    kind = ir.DataType[_TYPES[dtype]]
    return tape.initializer(ir.LazyTensor(lambda: TorchTensor(make()), kind, ir.Shape(shape), name=name), name)


def quantize_blocks(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Round a matrix [rows, columns] to whole numbers of 0 to 2 ** bits - 1, with a scale and a zero point for each block
    of a row, as ONNX Runtime's `MatMulNBits` takes them. Numbers of 4 bits lie two in a byte, the first one lower.

    Returns:
        Numbers uint8 [rows, blocks, bytes of a block], scales float32 [rows, blocks], zero points uint8 [rows, bytes].
    """
    parts = [_quantize_blocks(part, bits) for part in matrix.split(ROWS_AT_A_TIME)]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _quantize_blocks(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = BLOCKS[bits]
    blocks = torch.nn.functional.pad(matrix.float(), (0, -matrix.shape[1] % size)).unflatten(1, (-1, size))
    least, most, levels = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0), 2**bits - 1
    scales = (most - least) / levels
    scales[scales == 0] = 1
    zero_points = (-least / scales).round()
    numbers = (blocks / scales[..., None] + zero_points[..., None]).round().clamp(0, levels).byte()
    zero_points = zero_points.byte()
    if bits == 8:
        return numbers, scales, zero_points
    zero_points = torch.nn.functional.pad(zero_points, (0, zero_points.shape[1] % 2))
    return _two_in_a_byte(numbers), scales, _two_in_a_byte(zero_points)


def _two_in_a_byte(numbers: torch.Tensor) -> torch.Tensor:
    return numbers[..., 0::2] | numbers[..., 1::2] << 4


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to 256 levels: numbers uint8 [rows, width]; of each row, the distance of two levels and the
    lowest, float32 [rows, 2]."""
    numbers, scales = [], []
    for part in matrix.split(ROWS_AT_A_TIME):
        part = part.float()
        least = part.amin(1, keepdim=True)
        step = (part.amax(1, keepdim=True) - least) / 255
        step[step == 0] = 1
        numbers.append(((part - least) / step).round().byte())
        scales.append(torch.cat([step, least], dim=1))
    return torch.cat(numbers), torch.cat(scales)
