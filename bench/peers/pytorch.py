"""PyTorch: eager, compiled, captured in a CUDA graph, and both; with its fused optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from gpubackprop.bench.peers import BETA1, BETA2, EPSILON, LEARNING_RATE, CannotTakePartError, Peer, Problem
from gpubackprop.bench.timing import Clock, Run, Sample, WallTimer, seconds_now

WARM_UP = 3  # steps before a capture
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
    compiler: str | None = None
    graphed = False

    def __init__(self, problem: Problem) -> None:
        _check(problem)
        torch.set_num_threads(problem.threads)
        torch.set_float32_matmul_precision("high" if problem.dtype == "tf32" else "highest")
        self.problem, self.device = problem, torch.device(problem.device)
        dtype = torch.float64 if problem.dtype == "float64" else torch.float32
        self.net = _network(problem).to(self.device, dtype)
        self.optimizer = self._optimizer()
        self.all_X = torch.tensor(problem.X).to(self.device, dtype)
        self.all_y = torch.tensor(problem.y).to(self.device)
        self.X, self.y = self.all_X[: problem.batch], self.all_y[: problem.batch]
        self.value = torch.zeros((), device=self.device, dtype=dtype)
        self.timer = TorchTimer() if problem.on_gpu else WallTimer(lambda: None)
        self.loss_of: Callable[..., Any] = self._loss_of
        if self.compiler is not None:
            # recompilations of the same code for all networks: beyond 8, the default, nothing more is compiled
            torch._dynamo.config.recompile_limit = MOST_NETWORKS
            self.loss_of = torch.compile(self._loss_of, backend=self.compiler)
        self._run: Callable[[], object] = lambda: self.train(self.X, self.y)
        if self.graphed:
            self._run = self._captured()
        elif self.compiler is not None:
            self._run()
        _load(self.net, problem)  # the steps above have changed the parameters
        for state in self.optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor):
                    tensor.zero_()

    def step(self) -> None:
        """Take a step on the mini-batch."""
        self._run()

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self.value)

    def train(self, X: Any, y: Any) -> None:
        """Take a step on these rows."""
        self.optimizer.zero_grad(set_to_none=not self.graphed)
        loss = self.loss_of(X, y)
        loss.backward()
        self.optimizer.step()
        if self.graphed:
            self.value.copy_(loss.detach())
        else:
            self.value = loss.detach()

    def predict(self) -> Any:
        """Return the outputs."""
        with torch.inference_mode():
            return self.net(self.X)

    def epoch(self, *, shuffle: bool) -> None:
        """Train on all rows, which are on the device: much faster than a ``DataLoader``."""
        if self.graphed:
            raise CannotTakePartError("its graph knows one mini-batch")
        n, batch = len(self.all_X), self.problem.batch
        order = torch.randperm(n, device=self.device) if shuffle else torch.arange(n, device=self.device)
        for rows in order.split(batch):
            self.train(self.all_X[rows], self.all_y[rows])

    def _loss_of(self, X: Any, y: Any) -> Any:
        mixed = self.problem.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
            return torch.nn.functional.cross_entropy(self.net(X), y)

    def _optimizer(self) -> Any:
        parameters = self.net.parameters()
        if self.problem.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=LEARNING_RATE, fused=True)
        options = {"betas": (BETA1, BETA2), "eps": EPSILON, "capturable": self.graphed}
        return torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True, **options)

    def _captured(self) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        replay: Callable[[], object] = self._graph.replay
        return replay


class CompiledTorchPeer(TorchPeer):
    """PyTorch with forward and backward compiled."""

    compiler = "inductor"


class GraphedTorchPeer(TorchPeer):
    """PyTorch with the step captured in a CUDA graph."""

    devices, graphed = ("cuda",), True


class CompiledGraphedTorchPeer(CompiledTorchPeer):
    """PyTorch with the compiled step captured in a CUDA graph."""

    devices, graphed = ("cuda",), True


def _check(problem: Problem) -> None:
    if not problem.on_gpu:
        return
    if torch.version.cuda is None:
        raise CannotTakePartError(f"PyTorch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise CannotTakePartError(f"PyTorch {torch.__version__} finds no GPU")
    if problem.dtype == "float16":
        raise CannotTakePartError("needs a GradScaler, which a graph cannot hold")


def _network(problem: Problem) -> Any:
    modules: list[torch.nn.Module] = []
    for d_in, d_out in itertools.pairwise(problem.sizes):
        modules += [torch.nn.Linear(d_in, d_out), torch.nn.ReLU()]
    net = torch.nn.Sequential(*modules[:-1])
    _load(net, problem)
    return net


def _load(net: Any, problem: Problem) -> None:
    with torch.no_grad():
        for i, layer in enumerate(m for m in net if isinstance(m, torch.nn.Linear)):
            layer.weight.copy_(torch.tensor(problem.state[f"layers.{i}.weight"]))
            layer.bias.copy_(torch.tensor(problem.state[f"layers.{i}.bias"]))
