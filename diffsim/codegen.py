"""C++ or CUDA of the step: its operations, written out number by number.

The functions of a substep have no loops and no branches, and environments never meet. They run once here with symbols
for numbers, behind torch's operations. What is known of a robot folds away: an axis (0, 0, 1) leaves no
multiplication by 0 or 1, and what two formulas share is computed once. What is left is one long list of operations, on
as many environments side by side as a vector register holds, or on one in each thread of a GPU.

A compiler's time grows faster than the length of a function, so the list is cut into parts. A value that a later part
needs has a place in the array `s`, which another takes when it is no longer needed.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsim.builder import build_model
from diffsim.dynamics import backward, forward
from diffsim.model import Model

PART, PARTS_PER_FILE = 600, 8  # operations of a part
COMPARISONS = {">": "<", "<": ">", ">=": "<=", "<=": ">="}  # and with their sides swapped
FUNCTIONS = {"exp": math.exp, "log1p": math.log1p, "sin": math.sin, "cos": math.cos, "sqrt": math.sqrt}
LIKE = {"zeros_like": 0.0, "ones_like": 1.0}  # a tensor whose shape alone counts


class Expressions:
    """Numbers and what is done with them. A number that is known is a float; any other an int, its place in `ops`.

    An entry of `ops` is an operator and what it is applied to. Each stands there once.
    """

    def __init__(self):
        self.ops: list[tuple] = []
        self.known: dict[tuple, int] = {}

    def add(self, *op) -> int:
        if op not in self.known:
            self.known[op] = len(self.ops)
            self.ops.append(op)
        return self.known[op]

    def inputs(self, rows: int) -> np.ndarray:
        """(rows, 1)"""
        first = len(self.ops)
        return np.array([[self.add("input", str(first + i))] for i in range(rows)], object).reshape(rows, 1)

    def negated(self, a):
        """x if a is -x, else None."""
        return self.ops[a][1] if isinstance(a, int) and self.ops[a][0] == "neg" else None

    def commute(self, sign, a, b) -> int:
        return self.add(sign, *sorted((a, b), key=lambda x: (isinstance(x, float), x)))

    def plus(self, a, b):
        if isinstance(a, float) and isinstance(b, float):
            return a + b
        if is_number(a, 0) or is_number(b, 0):
            return b if is_number(a, 0) else a
        if (x := self.negated(b)) is not None:
            return self.minus(a, x)
        if (x := self.negated(a)) is not None:
            return self.minus(b, x)
        return self.commute("+", a, b)

    def minus(self, a, b):
        if isinstance(b, float):
            return self.plus(a, -b)
        if is_number(a, 0):
            return self.neg(b)
        if (x := self.negated(b)) is not None:
            return self.plus(a, x)
        return self.add("-", a, b)

    def neg(self, a):
        if isinstance(a, float):
            return -a
        if (x := self.negated(a)) is not None:
            return x
        return self.add("neg", a)

    def times(self, a, b):
        a, b = (float(x) if isinstance(x, bool) else x for x in (a, b))
        if isinstance(a, float) and isinstance(b, float):
            return a * b
        for x, y in ((a, b), (b, a)):
            if isinstance(x, float):
                if x in (0, 1, -1):
                    return 0.0 if x == 0 else y if x == 1 else self.neg(y)
            elif self.ops[x][0] in COMPARISONS:  # true is 1
                return self.where(x, y, 0.0)
            elif (z := self.negated(x)) is not None:
                return self.neg(self.times(z, y))
        return self.commute("*", a, b)

    def over(self, a, b):
        if isinstance(b, float):
            return self.times(a, 1 / b)
        return 0.0 if is_number(a, 0) else self.add("/", a, b)

    def call(self, name, a):
        return FUNCTIONS[name](a) if isinstance(a, float) else self.add(name, a)

    def compare(self, sign, a, b):
        """An operation, for `where` alone, or True or False."""
        if isinstance(a, float):
            a, b, sign = b, a, COMPARISONS[sign]
        if isinstance(a, float):
            return {">": a > b, ">=": a >= b, "<": a < b, "<=": a <= b}[sign]
        if is_number(b, math.inf) or is_number(b, -math.inf):
            return (b < 0) == sign.startswith(">")
        return self.add(sign, a, b)

    def where(self, condition, a, b):
        if isinstance(condition, bool):
            return a if condition else b
        if self.ops[condition][0] == "and":
            first, second = self.ops[condition][1:]
            return self.where(first, self.where(second, a, b), b)
        return a if type(a) is type(b) and a == b else self.add("?", condition, a, b)

    def both(self, a, b):
        for x, y in ((a, b), (b, a)):
            if isinstance(x, bool):
                return y if x else False
        return self.add("and", a, b)

    def relu(self, x):
        return self.where(self.compare("<=", x, 0.0), 0.0, x)  # NaN stays

    def clamp(self, x, low, high):
        if isinstance(high, float) and is_number(low, high):
            return low
        return self.where(self.compare("<=", x, low), low, self.where(self.compare(">=", x, high), high, x))

    def power(self, x, n):
        if n != int(n) or n < 1:
            raise NotImplementedError(f"no C++ for a power of {n}")
        return self.times(x, self.power(x, n - 1)) if n > 1 else x

    def decay(self, x):
        """exp(-|x|), which softplus and sigmoid share."""
        return self.call("exp", self.where(self.compare(">", x, 0.0), self.neg(x), x))

    def softplus(self, x):
        return self.plus(self.relu(x), self.call("log1p", self.decay(x)))

    def sigmoid(self, x):
        e = self.decay(x)
        return self.over(self.where(self.compare(">", x, 0.0), 1.0, e), self.plus(1.0, e))


def is_number(x, value) -> bool:
    return isinstance(x, float) and isinstance(value, (int, float)) and x == value


# --- torch's operations, with symbols ------------------------------------------------------------------------------
def one_column(shape) -> tuple:
    """Environments are one column here."""
    return (*shape[:-1], 1) if len(shape) else ()


def operations(e: Expressions) -> dict[str, Callable]:
    """What aten's operations do to arrays of symbols."""

    def each(f):
        """f of numbers as a function of arrays that broadcasts as torch does; an int among them is a constant."""

        def symbols(x):
            return x if isinstance(x, np.ndarray) and x.dtype == object else np.asarray(x, float).astype(object)

        return lambda *x: np.asarray(np.frompyfunc(f, len(x), 1)(*map(symbols, x)), object)

    plus, times, sigmoid, where = each(e.plus), each(e.times), each(e.sigmoid), each(e.where)

    def scaled(f):
        return lambda a, b, alpha=1: f(a, times(b, float(alpha)))

    def compare(sign):
        return each(lambda a, b: e.compare(sign, a, b))

    def total(x, dims=(-1,), keepdim=False):
        dims = sorted((d % x.ndim for d in dims), reverse=True)
        if x.ndim - 1 in dims:
            return None
        for d in dims:
            rows = np.split(x, x.shape[d], d)
            x = rows[0]
            for row in rows[1:]:
                x = plus(x, row)
        return x if keepdim else x.squeeze(tuple(dims))

    def product(a, b):  # of matrices
        return total(times(a[:, :, None], b[None]), [1])

    def cut(x, dim=0, start=None, end=None, step=1):
        return x[(slice(None),) * dim + (slice(start, end, step),)]

    def rows_of(index) -> tuple[int, np.ndarray]:
        """Dimension and rows of an index, which is None for every other dimension."""
        if any(rows is not None for rows in index[:-1]) or index[-1].dtype != int or index[-1].ndim != 1:
            raise NotImplementedError("no C++ for an index that is not one list of rows")
        return len(index) - 1, index[-1]

    def gather(x, index):
        dim, rows = rows_of(index)
        return x.take(rows, dim)

    def scatter(into, index, x, accumulate=False):
        if not accumulate:
            raise NotImplementedError("no C++ for an index_put that does not add")
        out, (dim, rows) = into.copy(), rows_of(index)
        for i, row in enumerate(rows):
            there = (slice(None),) * dim + (row,)
            out[there] = plus(out[there], x.take(i, dim))
        return out

    def paste(x, shape, *where_):
        out = np.full(one_column(shape), 0.0, object)
        cut(out, *where_)[...] = x
        return out

    def expand(x, shape):
        sizes = [x.shape[i - len(shape)] if n == -1 else n for i, n in enumerate(shape)]
        return np.broadcast_to(x, one_column(sizes))

    return {name: each(lambda x, name=name: e.call(name, x)) for name in ("sin", "cos", "sqrt")} | {
        "add": scaled(plus), "sub": scaled(each(e.minus)), "rsub": lambda a, b: each(e.minus)(b, a), "mul": times,
        "neg": each(e.neg), "div": each(e.over), "reciprocal": each(lambda x: e.over(1.0, x)),
        "rsqrt": each(lambda x: e.over(1.0, e.call("sqrt", x))), "pow": lambda x, n: each(lambda y: e.power(y, n))(x),
        "relu": each(e.relu), "threshold_backward": lambda g, x, _: where(compare(">")(x, 0.0), g, 0.0),
        "softplus": each(e.softplus), "softplus_backward": lambda g, x, *_: times(g, sigmoid(x)),
        "sigmoid": sigmoid, "sigmoid_backward": lambda g, y: times(g, times(y, each(e.minus)(1.0, y))),
        "gt": compare(">"), "ge": compare(">="), "le": compare("<="), "where": where,
        "logical_and": each(e.both), "clamp": each(e.clamp),
        "sum": total, "mm": product, "t": np.transpose, "cat": lambda x, dim=0: np.concatenate(x, dim),
        "detach": lambda x: x, "lift_fresh_copy": lambda x: x,
        "index": gather, "index_put": scatter, "new_zeros": lambda _, shape: np.full(one_column(shape), 0.0, object),
        "slice": cut, "slice_backward": paste, "select": lambda x, dim, i: x.take(i, dim),
        "expand": expand, "view": lambda x, shape: x.reshape(one_column(shape)),
        "scalar_tensor": lambda x: np.array(float(x), object),
    }  # fmt: skip


class Trace(TorchDispatchMode):
    """Follows symbols through torch's operations, autograd's among them, on tensors whose values do not matter."""

    def __init__(self, e: Expressions):
        super().__init__()
        self.apply, self.arrays, self.alive = operations(e), {}, []  # by the id of a tensor, which is kept alive

    def follow(self, tensor: Tensor, array: np.ndarray | None):
        """None: a sum over environments, of which only the shape may count."""
        self.arrays[id(tensor)] = array
        self.alive.append(tensor)

    def array(self, x):
        if isinstance(x, list | tuple):
            return [self.array(y) for y in x]
        if isinstance(x, Tensor) and id(x) not in self.arrays:  # a constant of the model
            integers = x.dtype in (torch.int32, torch.int64)
            self.follow(x, np.array(x.tolist(), int if integers else object))
        return self.arrays[id(x)] if isinstance(x, Tensor) else x

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function._schema.name.removeprefix("aten::")
        if not any(isinstance(x, Tensor) and id(x) in self.arrays for x in tree_leaves(args)):
            return out
        values = [self.array(x) for x in args]
        if name in LIKE:
            array = np.full(one_column(out.shape), LIKE[name], object)
        elif any(x is None for x, arg in zip(values, args) if isinstance(arg, Tensor)):
            array = None
        elif name in self.apply:
            array = self.apply[name](*values, **{k: v for k, v in (kwargs or {}).items() if k in ("alpha", "keepdim")})
        else:
            raise NotImplementedError(f"no C++ for torch's operation {name}")
        self.follow(out, array)
        return out


def outputs(model: Model, function: Callable, shapes: list[int], e: Expressions) -> list:
    """Symbols of what `function(model, ...)` makes of inputs with so many rows, row by row."""
    tensors = [torch.zeros(rows, 2, dtype=model.dtype, device=model.device) for rows in shapes]
    with Trace(e) as trace:
        for tensor in tensors:
            trace.follow(tensor, e.inputs(len(tensor)))
        found = [trace.array(x) for x in function(model, *tensors)]
    if any(x is None for x in found):
        raise NotImplementedError("no C++ for a sum over environments")
    return [x for array in found for x in array.flat]


# --- the text -----------------------------------------------------------------------------------------------------
def sequence_of(e: Expressions, results: list) -> list[int]:
    """The operations that the results need, in order; comparisons are written where they are used."""
    needed, todo = set(), [x for x in results if isinstance(x, int)]
    while todo:
        if (x := todo.pop()) not in needed:
            needed.add(x)
            todo += operands(e, x)
    return [x for x in sorted(needed) if e.ops[x][0] != "input"]


def operands(e: Expressions, x: int) -> list[int]:
    """The unknown numbers that an operation reads."""
    found = []
    for a in e.ops[x][1:]:
        if isinstance(a, int):
            found += operands(e, a) if e.ops[a][0] in COMPARISONS else [a]
    return found


class Part:
    """The text of one part, whose operands are at places of s, or known."""

    def __init__(self, e: Expressions, place: dict[int, int], number: Callable):
        self.e, self.place, self.number = e, place, number
        self.lines, self.here = [], set()

    def name(self, a, wide=False) -> str:
        if not isinstance(a, int):
            return f"wide({self.number(a)})" if wide else self.number(a)
        if a not in self.here:
            self.here.add(a)
            self.lines.append(f"const V v{a} = s[{self.place[a]}];")
        return f"v{a}"

    def operation(self, x: int):
        sign, *args = self.e.ops[x]
        if sign == "?":
            test, *sides = self.e.ops[args[0]]
            left, right = map(self.name, sides)
            yes, no = (self.name(a, wide=True) for a in args[1:])
            text = f"{left} {test} {right} ? {yes} : {no}"
        elif sign == "neg":
            text = f"-{self.name(args[0])}"
        elif sign in FUNCTIONS:
            text = f"{sign}_({self.name(args[0])})"
        else:
            text = f"{self.name(args[0])} {sign} {self.name(args[1])}"
        self.here.add(x)
        self.lines.append(f"const V v{x} = {text};")

    def keep(self, x, place: int):
        self.lines.append(f"s[{place}] = {self.name(x, wide=True)};")


def write(e: Expressions, rows: int, results: list, number: Callable) -> tuple[list[str], int]:
    """Bodies of functions of s, which holds `rows` inputs and is left with the results behind them; its places."""
    sequence = sequence_of(e, results)
    parts = [sequence[i : i + PART] for i in range(0, len(sequence), PART)] or [[]]
    last_use = {a: i for i, part in enumerate(parts) for x in part for a in operands(e, x)}
    place = {x: int(op[1]) for x, op in enumerate(e.ops[:rows])}
    free, size, texts = [], rows + len(results), []
    for i, part in enumerate(parts):
        text = Part(e, place, number)
        for x in part:
            text.operation(x)
        free += [place.pop(x) for x in list(place) if x >= rows and last_use[x] == i]
        for x in part:  # after all loads
            if last_use.get(x, i) > i:
                place[x] = free.pop() if free else size
                size = max(size, place[x] + 1)
                text.keep(x, place[x])
        made = set(part)
        for to, x in enumerate(results, rows):
            if x in made and isinstance(x, int) or i == len(parts) - 1 and (isinstance(x, float) or x < rows):
                text.keep(x, to)
        texts.append("\n".join(text.lines))
    return texts, size


def generate(model: Model, cuda: bool = False) -> list[str]:
    """C++ files, the last one with the functions `forward` and `backward` of step.cpp; for CUDA one file. LANES is left
    to the C++ compiler's command."""
    if model.device.type != "cpu":  # autograd follows a GPU's operations in a thread of its own, out of Trace's sight
        model = build_model(model.mj_model, model.softness, "cpu", model.dtype, model.collisions)
    nq, nv, nu, double = model.nq, model.nv, model.nu, model.dtype == torch.float64
    step = (Path(__file__).parent / "step.cpp").read_text()
    common = f"typedef {'double' if double else 'float'} T;\n#define NQ {nq}\n#define NV {nv}\n#define NU {nu}\n"
    defined, functions = "", []
    shapes = {"forward": [nq, nv, nu], "backward": [nq, nv, nu, nv, nq, nv]}
    for kind, function in (("forward", forward), ("backward", backward)):
        e = Expressions()
        results = outputs(model, function, shapes[kind], e)
        texts, places = write(e, sum(shapes[kind]), results, repr if double else lambda x: f"{x!r}f")
        functions += [f"HERE void {kind}{i}(V* s) {{\n{text}\n}}\n" for i, text in enumerate(texts)]
        calls = " ".join(f"DO({kind}{i})" for i in range(len(texts)))
        defined += f"#define {kind.upper()}_PLACES {places}\n#define {kind.upper()}_PARTS(DO) {calls}\n"
    if cuda:
        return [common + defined + step + "".join(functions)]
    files = ["".join(functions[i : i + PARTS_PER_FILE]) for i in range(0, len(functions), PARTS_PER_FILE)]
    return [*(common + step + file for file in files), common + defined + step]
