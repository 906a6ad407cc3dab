"""PyTorch: eager with its fused optimizers, whole steps compiled, captured in a CUDA graph, and both, also K steps to a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, LONG_STEP, CannotTakePartError, Peer, Problem
from gpubackprop.bench.timing import Clock, Run, Sample, WallTimer, seconds_now

WARM_UP = 3  # runs before a capture
LONGEST_GRAPH = 128  # steps
MOST_NETWORKS = 128  # that are compiled in one process


class TorchTimer:
    """Time between two events of PyTorch's on its current stream, and on the wall."""

    def __init__(self, clock: Clock = seconds_now) -> None:
        self.clock = clock
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Run, repeats: int) -> Sample:
        """Return the seconds of ``repeats`` runs."""
        torch.cuda.synchronize()
        started = self.clock()
        self.begin.record()
        for _ in range(repeats):
            run()
        self.end.record()
        self.end.synchronize()
        wall = self.clock() - started
        return Sample(self.begin.elapsed_time(self.end) / 1e3, wall)


class TorchPeer(Peer):
    """Eager PyTorch.

    Products are in float32 unless the dtype is tf32; bfloat16 is autocast with float32 parameters.
    """

    dtypes = ("float32", "float64", "float16", "bfloat16", "tf32")
    graphed = False

    def __init__(self, problem: Problem) -> None:
        _check(problem)
        torch.set_num_threads(problem.threads)
        torch.set_float32_matmul_precision("high" if problem.dtype == "tf32" else "highest")
        self.problem, self.device = problem, torch.device(problem.device)
        self.dtype = torch.float64 if problem.dtype == "float64" else torch.float32
        self.all_X = torch.tensor(problem.X).to(self.device, self.dtype)
        self.all_y = torch.tensor(problem.y).to(self.device)
        self.X, self.y = self.all_X[: problem.batch], self.all_y[: problem.batch]
        self.value: Any = None
        self.timer = TorchTimer() if problem.on_gpu else WallTimer(lambda: None)
        self.make()
        self.train(self.X, self.y)  # compiles, and makes the state of the optimizer
        self.begin()
        self._steps: Callable[[], object] = self.steps
        if self.graphed:
            self._steps = self.captured(self.steps)

    def make(self) -> None:
        """Make the network and the optimizer."""
        modules: list[torch.nn.Module] = []
        for d_in, d_out in itertools.pairwise(self.problem.sizes):
            modules += [torch.nn.Linear(d_in, d_out), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*modules[:-1]).to(self.device, self.dtype)
        self.parameters = list(self.net.parameters())
        if self.problem.optimizer == "sgd":
            self.optimizer: Any = torch.optim.SGD(self.parameters, lr=LEARNING_RATE, fused=True)
        else:
            options = {"betas": (BETA1, BETA2), "eps": EPSILON, "capturable": self.graphed and self.problem.on_gpu}
            self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, fused=True, **options)
        self.begin()

    def state(self) -> list[Any]:
        """Return what the optimizer keeps from step to step."""
        values = (value for state in self.optimizer.state.values() for value in state.values())
        return [value for value in values if isinstance(value, torch.Tensor)]

    def begin(self) -> None:
        """Set the initial weights, and the state of the optimizer back."""
        names = (f"layers.{i}.{name}" for i in range(len(self.problem.sizes) - 1) for name in ("weight", "bias"))
        with torch.no_grad():
            for parameter, name in zip(self.parameters, names, strict=True):
                parameter.copy_(torch.tensor(self.problem.state[name]))
            for tensor in self.state():
                tensor.zero_()

    def step(self) -> None:
        """Take ``units`` steps on the mini-batch."""
        self._steps()

    def steps(self) -> None:
        """Do what a graph captures."""
        for _ in range(self.units):
            self.train(self.X, self.y)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.value)

    def train(self, X: Any, y: Any) -> None:
        """Take a step on these rows."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.mixed():
            loss = torch.nn.functional.cross_entropy(self.net(X), y)
        loss.backward()
        self.optimizer.step()
        self.value = loss.detach()

    def mixed(self) -> Any:
        """Return a context in which products are in bfloat16 if that is the dtype."""
        enabled = self.problem.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def predict(self) -> Any:
        """Return the outputs."""
        with torch.inference_mode():
            return self.net(self.X)

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows, which are on the device: much faster than a ``DataLoader``."""
        self.train_rows(self.order(shuffle=shuffle))

    def order(self, *, shuffle: bool) -> Any:
        """Return an order of the rows."""
        return (torch.randperm if shuffle else torch.arange)(len(self.all_X), device=self.device)

    def train_rows(self, order: Any) -> None:
        """Train on rows in this order, a mini-batch at a time."""
        for rows in order.split(self.problem.batch):
            self.train(self.all_X[rows], self.all_y[rows])

    def captured(self, run: Run) -> Run:
        """Return a replay of a run, after which parameters and state are as before."""
        kept = [*self.parameters, *self.state()]
        before = [tensor.detach().clone() for tensor in kept]
        replay = capture(run)
        with torch.no_grad():
            for tensor, was in zip(kept, before, strict=True):
                tensor.copy_(was)
        return replay


class CompiledTorchPeer(TorchPeer):
    """PyTorch with the whole step compiled as one graph of operations: forward, backward and update of all parameters."""

    def make(self) -> None:
        """Make the parameters, and compile the step."""
        shapes = [
            shape for d_in, d_out in itertools.pairwise(self.problem.sizes) for shape in ((d_out, d_in), (d_out,))
        ]
        options = {"device": self.device, "dtype": self.dtype}
        self.parameters = [torch.zeros(shape, **options) for shape in shapes]
        self.moments = [[torch.zeros(shape, **options) for shape in shapes] for _ in range(2)]
        self.t = torch.zeros((), **options)
        self.begin()
        # recompilations of the same code for all networks: beyond 8, the default, nothing more is compiled
        torch._dynamo.config.recompile_limit = MOST_NETWORKS
        mode = "max-autotune-no-cudagraphs" if self.problem.on_gpu else None
        self.compiled = torch.compile(self.whole_step, mode=mode, fullgraph=True, dynamic=False)
        self.compiled_outputs = torch.compile(self.outputs, mode=mode, fullgraph=True, dynamic=False)

    def state(self) -> list[Any]:
        """Return what the optimizer keeps from step to step."""
        return [*self.moments[0], *self.moments[1], self.t]

    def train(self, X: Any, y: Any) -> None:
        """Take a step on these rows."""
        with torch.no_grad():
            self.value = self.compiled(self.parameters, self.moments, self.t, X, y)

    def outputs(self, parameters: list[Any], X: Any) -> Any:
        """Return o."""
        h, last = X, len(parameters) - 2
        for i in range(0, last, 2):
            h = torch.nn.functional.linear(h, parameters[i], parameters[i + 1]).relu()
        return torch.nn.functional.linear(h, parameters[last], parameters[last + 1])

    def whole_step(self, parameters: list[Any], moments: list[list[Any]], t: Any, X: Any, y: Any) -> Any:
        """Update the parameters and return the loss before."""

        def loss_of(parameters: list[Any]) -> Any:
            with self.mixed():
                return torch.nn.functional.cross_entropy(self.outputs(parameters, X), y)

        gradients, loss = torch.func.grad_and_value(loss_of)(parameters)
        if self.problem.optimizer == "sgd":
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(LEARNING_RATE * g)
            return loss
        t.add_(1)
        c1, c2 = LEARNING_RATE / (1 - BETA1**t), (1 - BETA2**t).rsqrt()
        for p, g, m, v in zip(parameters, gradients, *moments, strict=True):
            m.lerp_(g, 1 - BETA1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            p.sub_(c1 * m / (v.sqrt() * c2 + EPSILON))
        return loss

    def predict(self) -> Any:
        """Return the outputs."""
        with torch.no_grad():
            return self.compiled_outputs(self.parameters, self.X)


class Graphed(TorchPeer):
    """Captures steps, epochs and predictions in CUDA graphs."""

    devices, graphed = ("cuda",), True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._prediction: Callable[[], object] | None = None
        self._rows: Any = None

    def predict(self) -> Any:
        """Return the outputs, in the memory of the graph."""
        if self._prediction is None:
            self._prediction = self.captured(self._predict)
        self._prediction()
        return self._outputs

    def _predict(self) -> None:
        self._outputs = super().predict()

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows, as many mini-batches to a graph as it may hold."""
        order = self.order(shuffle=shuffle)
        if self._rows is None:
            batches = len(order) // self.problem.batch
            length = next(k for k in range(min(batches, LONGEST_GRAPH), 0, -1) if batches % k == 0)
            self._rows = order[: length * self.problem.batch].clone()
            self._epoch = self.captured(lambda: self.train_rows(self._rows))
        for rows in order.split(len(self._rows)):
            self._rows.copy_(rows)
            self._epoch()


class GraphedTorchPeer(Graphed):
    """PyTorch captured in CUDA graphs."""


class CompiledGraphedTorchPeer(Graphed, CompiledTorchPeer):
    """PyTorch with the compiled step captured in CUDA graphs."""


class CompiledGraphedTorchLoopPeer(CompiledGraphedTorchPeer):
    """K compiled steps in a graph."""

    def __init__(self, problem: Problem) -> None:
        self.units = problem.steps_per_call
        if self.units == 1:
            raise CannotTakePartError(LONG_STEP)
        super().__init__(problem)


def capture(run: Run) -> Run:
    """Return the replay of a CUDA graph of a run, which has run before on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Run = graph.replay
    return replay


def _check(problem: Problem) -> None:
    if not problem.on_gpu:
        return
    if torch.version.cuda is None:
        raise CannotTakePartError(f"PyTorch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise CannotTakePartError(f"PyTorch {torch.__version__} finds no GPU")
    if problem.dtype == "float16":
        raise CannotTakePartError("needs a GradScaler, which a graph cannot hold")
