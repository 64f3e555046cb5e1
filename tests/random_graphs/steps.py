"""What a random graph is made of, operator by operator: each step reads a tensor and returns a new one."""

from __future__ import annotations

from math import prod

import numpy as np
from onnx import TensorProto

from .net import CHANNELS, MAX_ELEMENTS, Net

PLAIN = (
    "Relu Sigmoid LeakyRelu Tanh Abs Asinh Atan Ceil Celu Clip Cos Dropout Elu Erf Floor Gelu HardSigmoid HardSwish "
    "Identity Mish Neg Round Selu Shrink Sign Sin Softplus Softsign Swish ThresholdedRelu"
).split()
GUARDED = {
    "positive": "Log Sqrt Reciprocal Acosh".split(),
    "bounded": "Acos Asin Atanh Exp Sinh Cosh Tan".split(),
}


def activate(g: Net, x: str) -> str:
    """Any function of one element, within its domain."""
    domain = g.pick(*PLAIN, *GUARDED, *GUARDED, *GUARDED)
    op = g.pick(*GUARDED.get(domain, [domain]))
    if not g.has(op):
        return g.node("Relu", x)
    if domain == "positive":
        x = g.node("Add", g.node("Abs", x), g.constant(np.float32(1.1)))
    elif domain == "bounded":
        x = g.node("Mul", g.node("Tanh", x), g.constant(np.float32(0.9)))
    bounds = {"min": np.float32(-0.5), "max": np.float32(1.5)} if g.opset > 10 else {"min": -0.5, "max": 1.5}
    return g.node(op, x, **({"Clip": bounds, "ThresholdedRelu": {"alpha": 0.1}}.get(op, {})))


def vector(g: Net, x: str, axis: int | None = None, offset: float = 0.0) -> str:
    """A constant along one axis (the channels') that broadcasts against a tensor, with a rank of its own or the same."""
    axis = g.axis[x] if axis is None else axis
    rank = len(g.shape(x)) - axis
    shape = (g.shape(x)[axis], *[1] * (rank - 1))
    return g.random(*(1,) * g.choose(axis + 1), *shape, name=f"{g.fresh()}.v", offset=offset, scale=0.4)


def layer(g: Net, x: str, channels: int = 0, group: int = 1) -> str:
    """A Gemm, convolution or linear layer, as the layout suggests, onto new channels."""
    channels = channels or g.pick(*CHANNELS)
    shape, axis, name = g.shape(x), g.axis[x], g.fresh()
    if len(shape) == 2:
        return g.to(g.gemm(g.move(x, 1), name, shape[axis], channels, transB=g.choose(2)), 1)
    if axis == 1 and len(shape) < 6:
        kernel = g.pick(1, 3) if min(shape[2:]) > 1 else 1
        return g.conv(x, name, shape[1], channels, kernel, rank=len(shape) - 2, group=group, bias=not g.chance(3))
    y = g.linear(g.move(x, -1), name, shape[axis], channels)
    return g.move(g.node("Add", y, g.random(channels, name=f"{name}.b", scale=0.3)), axis)


def conv(g: Net, x: str) -> str:
    """Any convolution: grouped, depthwise with a multiplier, strided, dilated, padded by name; or its transpose."""
    x = g.front(x)
    _, size, *space = g.shape(x)
    kernel, stride, dilation = g.pick(1, 3, 2), g.pick(1, 2), g.pick(1, 2)
    rank, transpose = len(space), g.chance(4)
    group = size if g.chance(4) else g.divisor(size)
    channels = group * g.pick(1, 2, 3) if group > 4 else group * g.pick(3, 2, 4, 1)
    pads = [g.choose(kernel) for _ in range(2 * rank)]
    reach = dilation * (kernel - 1) + 1
    fits = min(space) + min(a + b for a, b in zip(pads[:rank], pads[rank:], strict=True)) >= reach
    window: dict[str, object] = {"strides": [stride] * rank, "dilations": [dilation] * rank, "pads": pads}
    if transpose:
        window |= {"pads": [0] * 2 * rank, "output_padding": [g.choose(stride)] * rank}
    elif not fits or g.chance(4):
        window |= {"auto_pad": g.pick("SAME_UPPER", "SAME_LOWER"), "pads": None, "dilations": [1] * rank}
    if prod(space) * channels * (2 * stride) ** rank > MAX_ELEMENTS:
        return x
    return g.conv(
        x, g.fresh(), size, channels, kernel, rank=rank, group=group, bias=g.chance(), transpose=transpose, **window
    )


def gemm(g: Net, x: str) -> str:
    """Gemm in all its forms: either side transposed, scaled, with every kind of C or none."""
    x, name = g.move(g.flat(x), 1), g.fresh()
    (rows, size), columns = g.shape(x), g.pick(*CHANNELS)
    flags = {"transA": g.choose(2), "transB": g.choose(2), "alpha": g.pick(1.0, 0.5), "beta": g.pick(1.0, 2.0)}
    a = g.to(g.node("Transpose", x, perm=[1, 0]), 0) if flags["transA"] else x
    shape = (columns, size) if flags["transB"] else (size, columns)
    c = g.pick((columns,), (1, columns), (), (1,), (1, 1) if g.dynamic else (rows, 1), None)
    inputs = [a, g.random(*shape, name=f"{name}.w", scale=size**-0.5)]
    inputs += (
        [g.random(*c, name=f"{name}.c", scale=0.3)] if c is not None else [] if g.opset > 10 else [g.constant(0.1)]
    )
    return g.to(g.node("Gemm", *inputs, name=name, **flags), 1)


def matmul(g: Net, x: str) -> str:
    """A matrix product with its weight on the left, or one per batch of a higher rank, or a linear layer."""
    x, columns = g.tokens(x), g.pick(*CHANNELS)
    size, name = g.channels(x), g.fresh()
    if g.chance():
        weight = g.random(*(1,) * g.choose(2), columns, size, name=f"{name}.w", scale=size**-0.5)
        return g.to(g.node("MatMul", weight, g.move(x, 1), name=name), 1)
    return layer(g, x, columns)


def normalise(g: Net, x: str) -> str:
    """Any normalisation."""
    kind = g.pick("batch", "instance", "layer", "rms", "group", "group written out", "lp", "lrn", "layer written out")
    name = g.fresh()
    if kind == "batch":
        x = x if len(g.shape(x)) == 2 and g.axis[x] == 1 else g.front(x)
        return g.batch_norm(x, name, g.channels(x))
    if kind == "lp":
        return g.node("LpNormalization", x, axis=g.pick(g.axis[x], -1), p=g.pick(2, 1))
    if kind == "lrn" and len(g.shape(x)) == 4:
        return g.node("LRN", g.front(x), size=3)
    if kind in ("layer", "rms", "layer written out"):
        x = g.move(x, -1)
        scale, shift = (
            g.random(g.channels(x), name=f"{name}.s", offset=1, scale=0.3),
            vector(g, x, -1 % len(g.shape(x))),
        )
        if kind == "rms" and g.has("RMSNormalization"):
            return g.node("RMSNormalization", x, scale, axis=-1)
        if kind == "layer" and g.has("LayerNormalization"):
            operands = [scale, g.random(g.channels(x), name=f"{name}.b")] if g.chance() else [scale]
            return g.node("LayerNormalization", x, *operands, axis=-1)
        centred = g.node("Sub", x, g.node("ReduceMean", x, axes=[-1], keepdims=1))
        square = g.pick(lambda: g.node("Pow", centred, g.constant(2.0)), lambda: g.node("Mul", centred, centred))()
        spread = g.node("Add", g.node("ReduceMean", square, axes=[-1], keepdims=1), g.constant(1e-3))
        return g.node("Add", g.node("Mul", g.node("Div", centred, g.node("Sqrt", spread)), scale), shift)
    x = g.front(x)
    n, size, *space = g.shape(x)
    groups = g.divisor(size)
    if kind == "instance":
        return g.node("InstanceNormalization", x, vector_of(g, size, 1), vector_of(g, size, 0))
    if kind == "group" and g.opset > 20:
        return g.node("GroupNormalization", x, vector_of(g, size, 1), vector_of(g, size, 0), num_groups=groups)
    y = g.reshape(x, (n, groups, size // groups * prod(space)), 1)
    y = g.node("InstanceNormalization", y, g.constant(np.ones(groups, "f")), g.constant(np.zeros(groups, "f")))
    y = g.to(g.node("Reshape", y, g.like(x)), 1)
    return g.node("Add", g.node("Mul", y, vector(g, x, offset=1.0)), vector(g, x))


def vector_of(g: Net, size: int, offset: float) -> str:
    """A vector for a normalisation."""
    return g.random(size, name=f"{g.fresh()}.v{int(offset)}", offset=offset, scale=0.3)


def affine(g: Net, x: str) -> str:
    """A constant: a scalar, a vector along channels or another axis, or a whole map; or a slope per channel."""
    shape, axis = g.shape(x), g.axis[x]
    op = g.pick("Add", "Mul", "Sub", "Max", "Min", "Div", "Pow", "PRelu", "Sum", "Mean", "Mod")
    kind = g.pick("channel", "scalar", "map", "axis")
    constant = {
        "channel": lambda: vector(g, x, offset=1.0),
        "scalar": lambda: g.constant(g.pick(np.float32(1.5), np.full(1, 1.5, np.float32))),
        "map": lambda: g.random(*shape[1:], name=f"{g.fresh()}.m", offset=1.0, scale=0.3),
        "axis": lambda: vector(g, x, g.pick(*(a for a in range(1, len(shape)))), 1.0),
    }[kind]()
    if op == "Mod":
        return g.node(op, x, g.constant(1.25), fmod=1) if g.opset > 9 else x
    if op == "Pow":
        return g.node(op, g.node("Abs", x), g.constant(g.pick(2.0, 0.5)))
    if op == "Div":
        constant = g.node("Add", g.node("Abs", constant), g.constant(0.5))
    operands = (x, constant) if op == "PRelu" or not g.chance(3) else (constant, x)
    return g.to(g.node(op, *operands), axis)


def choose_by(g: Net, x: str) -> str:
    """Comparisons, logic and Where (or a product with the truth)."""
    compare = g.pick("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "IsNaN", "IsInf")
    other = vector(g, x)
    if not g.has(compare) or (g.opset < 10 and compare == "IsInf"):
        compare = "Greater"
    truth = g.node(compare, x, *([] if compare.startswith("Is") else [other]))
    more = g.pick(None, "Not", "And", "Or", "Xor", "Equal")
    if more == "Not":
        truth = g.node("Not", truth)
    elif more:
        truth = g.node(more, truth, g.node("Less", x, g.constant(0.5)))
    axis = g.axis[x]
    if g.chance():
        number = g.node("CastLike", truth, x) if g.has("CastLike") and g.chance() else g.node("Cast", truth, to=1)
        return g.to(g.node("Mul", x, number), axis)
    return g.to(g.node("Where", truth, x, g.constant(0.0) if g.chance() else other), axis)


def bits(g: Net, x: str) -> str:
    """Integers and their bits, on the way there and back; or another float type."""
    axis = g.axis[x]
    kind = g.pick("double", "half", "And", "Or", "Xor", "Not", "Shift")
    if kind in ("double", "half"):
        to = {"double": TensorProto.DOUBLE, "half": TensorProto.FLOAT16}[kind]
        return g.to(g.node("Cast", g.node("Cast", x, to=to), to=1), axis)
    op = f"Bit{kind}" if kind == "Shift" else f"Bitwise{kind}"
    if not g.has(op):
        return x
    whole = g.node("Cast", g.node("Abs", g.node("Mul", x, g.constant(8.0))), to=TensorProto.UINT8)
    operand = [] if kind == "Not" else [g.constant(np.array(g.pick(1, 3), np.uint8))]
    whole = g.node(op, whole, *operand, **({"direction": g.pick("LEFT", "RIGHT")} if kind == "Shift" else {}))
    return g.to(g.node("Mul", g.node("Cast", whole, to=1), g.constant(np.float32(1 / 64))), axis)


ELEMENTS = (activate, affine, choose_by, bits)
LAYERS = (layer, conv, gemm, matmul)
