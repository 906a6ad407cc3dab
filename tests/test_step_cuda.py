"""The captured step: one launch, nothing else, and the bits of the operations run one at a time."""

import re

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.machine.diagnosis import installed
from gpubackprop.network import Data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(installed("nvmath-python") is None, reason="a captured step needs nvmath-python"),
]
SIZES, BATCH, SAMPLES = [784, 256, 128, 10], 128, 640


@pytest.fixture(scope="module")
def digits():
    """Inputs of the size of MNIST's with a pattern to learn."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, SAMPLES)
    patterns = rng.normal(size=(10, 784))
    return (rng.normal(size=(SAMPLES, 784)) + patterns[y]).astype(np.float32), y


def device_data(model, X, y):
    backend = model.backend
    order = np.random.default_rng(1).permutation(len(X))
    return Data(backend.asarray(X), backend.asarray(y), None, backend.asarray(order))


def make(digits, device, optimizer="adam", **options):
    model = gb.MLP(SIZES, device=device, **options)
    step = model.step(BATCH, optimizer, data=device_data(model, *digits))
    return model, step, step.compile()


def bits(model):
    return model.backend.to_numpy(model.parameters.flat)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (gb.Adam(1e-3), {}),
        (gb.SGD(gb.Cosine(0.1, steps=5), momentum=0.9, clip_norm=0.5), {"dropout": 0.25}),
    ],
)
def test_eager_and_captured_steps_give_the_same_bits(digits, optimizer, options):
    one, _, eager = make(digits, "cuda", optimizer, **options)
    two, _, captured = make(digits, "cuda", optimizer, **options)
    for _ in range(3):
        eager.eagerly()
    captured(2)
    captured()
    np.testing.assert_array_equal(bits(one), bits(two))


@pytest.mark.parametrize("first", ["main", "side"])
@pytest.mark.parametrize(
    ("optimizer", "weighted", "options"),
    [
        (gb.Adam(1e-3), False, {}),
        (gb.SGD(0.1, clip_norm=0.5), True, {"dropout": 0.25}),
        (gb.SGD(0.1, momentum=0.9), True, {"dtype": "float16", "loss": "mean_squared_error"}),
    ],
)
def test_the_bits_do_not_depend_on_which_branch_is_ahead(first, optimizer, weighted, options):
    rng = np.random.default_rng(0)
    X, y, w = rng.normal(size=(90, 12)).astype("f4"), rng.integers(0, 8, 90), rng.uniform(size=90).astype("f4")
    if options.get("loss"):
        y = rng.normal(size=(90, 8)).astype("f4")
    results = []
    for way in ("in order", "branches"):
        model = gb.MLP([12, 24, 16, 8], device="cuda", **options)
        backend = model.backend
        data = Data(
            backend.asarray(X, model.dtype), backend.asarray(y), backend.asarray(w) if weighted else None,
            backend.asarray(np.random.default_rng(1).permutation(90)),
        )  # fmt: skip
        step = model.step(30, optimizer, data=data, micro_batch_size=10)
        run = step.compile()
        places = run.places(2)
        calls, sides = [*run.calls] * 2, [place.side for place in places]
        assert any(sides)
        if way == "in order":
            step.run_eagerly()
            step.run_eagerly()
        else:
            with backend._device:
                done = set()
                while len(done) < len(sides):  # the branch that is first goes on until it has to wait
                    ready = [
                        min((i for i, on in enumerate(sides) if on == side and i not in done), default=None)
                        for side in (first == "side", first == "main")
                    ]
                    task = next(i for i in ready if i is not None and places[i].wait in (None, *done))
                    function, arguments = calls[task]
                    function(*arguments)
                    done.add(task)
        results.append((bits(model), backend.to_numpy(step.names.array("loss"))))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_any_number_of_steps_is_a_few_graphs_with_the_bits_of_single_steps(digits):
    X, y = digits[0][:, :12], digits[1] % 3
    models = [gb.MLP([12, 8, 3], device="cuda") for _ in range(2)]
    runs = [m.step(16, "adam", data=device_data(m, X, y)).compile() for m in models]
    launched, graph = [], runs[0].graph

    def noted(steps):
        launched.append(steps)
        return graph(steps)

    runs[0].graph = noted
    assert runs[0].steps_per_launch == 32
    for times, expected in ((34, [32, 2]), (32, [32]), (7, [4, 2, 1])):
        launched.clear()
        runs[0](times)
        assert launched == expected
    for _ in range(34 + 32 + 7):
        runs[1]()
    np.testing.assert_array_equal(bits(models[0]), bits(models[1]))


def longest_chain(graph):
    """Return the nodes of a graph, and of its longest chain."""
    drawn = graph.debug_dot_str()
    nodes = re.findall(r'"(graph_\d+_node_\d+)"\[', drawn)
    before = {node: [] for node in nodes}
    for a, b in re.findall(r'"(graph_\d+_node_\d+)" -> "(graph_\d+_node_\d+)"', drawn):
        before[b].append(a)
    length = {}
    while len(length) < len(nodes):
        for node in nodes:
            if node not in length and all(other in length for other in before[node]):
                length[node] = 1 + max((length[other] for other in before[node]), default=0)
    return len(nodes), max(length.values())


def test_a_warm_step_is_one_graph_launch_and_nothing_else(digits):
    ledger = pytest.importorskip("ledger", reason="counts need an emulated device")
    if not ledger.available():
        pytest.skip("counts need an emulated device")
    model, step, run = make(digits, "cuda")
    run()
    model.backend.synchronize()
    with ledger.record(level=1) as record:
        run()
        record_now = record.to_dict()["host"]
    model.backend.synchronize()
    assert record_now["graph_launches"] == 1
    assert record_now["launches"] == 0
    for name in ("allocations", "frees", "synchronizations", "memsets", "queries"):
        assert record_now.get(name, 0) == 0, name
    for name in ("copies_h2d", "copies_d2h", "copies_d2d"):
        assert record_now.get(name, 0) == 0, name
    # the chain: gather, 3 products and 2 activations forward, loss, 2 passes backward, one with its product, the other after one,
    # dW_1, update; beside it the sums of the loss, dW_o, dW_2 and the schedule
    graph = run.graph(1)
    assert longest_chain(graph) == (16, 12)
    assert record.graph_nodes == 16
    assert longest_chain(run.graph(2)) == (32, 23)  # the second gather runs beside the first update
    assert len(step.operations) == 18 - 1


def test_clipping_adds_its_own_two_launches_to_the_chain(digits):
    _, _, run = make(digits, "cuda", gb.SGD(0.1, clip_norm=1.0))
    assert longest_chain(run.graph(1)) == (18, 14)


def test_a_capture_that_fails_says_why_and_can_be_repeated(digits):
    X, y = digits[0][:, :12], digits[1] % 3
    model = gb.MLP([12, 8, 3], device="cuda")
    run = model.step(16, "adam", data=device_data(model, X, y)).compile()

    def fail():
        raise KeyError("in the middle")

    calls = run.calls
    for task in range(len(calls)):
        run.calls = [*calls[:task], (fail, ()), *calls[task + 1 :]]
        with pytest.raises(KeyError, match="in the middle"):
            run()
    run.calls = calls
    before = bits(model)
    run()
    assert (bits(model) != before).any()


def test_a_warm_step_allocates_nothing_from_the_pool_either(digits):
    import cupy

    class Refuse(cupy.cuda.MemoryHook):
        name = "refuse"

        def malloc_preprocess(self, **arguments):
            raise AssertionError("a warm step asked the pool for memory")

    _, _, run = make(digits, "cuda")
    run()
    with Refuse():
        run()
        run.eagerly()


def test_losses_on_cpu_and_cuda_agree_over_50_steps(digits):
    # Adam divides by sqrt(v), so that a rounding of the gradient moves a parameter by at most lr * (relative rounding); the
    # products of fan-in k differ by k eps at most and sqrt(k) eps in practice, and over t steps the losses part by
    # about t * lr * |gradient| * sqrt(parameters) * sqrt(k) eps; with lr 1e-3, |gradient| < 3, 235,146 parameters, k = 784:
    steps, lr = 50, 1e-3
    bound = steps * lr * 3 * np.sqrt(235_146) * np.sqrt(784) * np.finfo(np.float32).eps
    losses = {}
    for device in ("cpu", "cuda"):
        model, step, run = make(digits, device, gb.Adam(lr))
        losses[device] = []
        for t in range(steps):
            if t % (SAMPLES // BATCH) == 0:
                model.optimizer_state.counters[1] = 0
            run()
            losses[device].append(float(step.names.array("loss")[0]))
    assert losses["cpu"][-1] < 0.2 * losses["cpu"][0]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=0, atol=bound)


def test_training_on_a_stream_of_the_users_own_gives_the_same_bits():
    import cupy

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(100, 6)), rng.integers(0, 3, 100)
    results = []
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            model = gb.MLP([6, 8, 3], device="cuda")
            model.fit(X, y, epochs=2, batch_size=32, progress=False)
            results.append(bits(model))
    np.testing.assert_array_equal(*results)


def test_tf32_is_used_only_where_it_is_asked_for(monkeypatch):
    # TF32 keeps 10 bits: 1 + 2^-12 is 1 there, and itself in float32. The sizes are such that tensor cores are not refused.
    if gb.get_backend("cuda")._launches.capability < (8, 0):
        pytest.skip("TF32 begins with compute capability 8.0")
    monkeypatch.setenv("CUPY_TF32", "1")  # is for CuPy's own products
    X = np.full((128, 128), 1 + 2.0**-12, np.float32)
    outputs = {}
    for precision in ("float32", "tf32"):
        model = gb.MLP([128, 128], device="cuda", matmul_precision=precision)
        model.parameters.W[0][...] = 1
        outputs[precision] = model.forward(X)
    np.testing.assert_array_equal(outputs["float32"], np.float32(128 + 128 * 2.0**-12))
    np.testing.assert_array_equal(outputs["tf32"], np.float32(128))


def test_the_rule_of_epilogues(digits):
    from gpubackprop.backends.cuda.backend import CudaBackend

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(24, 16)).astype(np.float32), rng.integers(0, 8, 24)
    gradients = {}
    for mode in ("off", "auto", "all"):
        backend = CudaBackend(0, epilogues=mode)
        model = gb.MLP([16, 32, 24, 16, 8], ["gelu_tanh", "identity", "relu"], device=backend)
        step = model.step(24, "sgd")
        step.names.array("X")[...] = backend.asarray(X)
        step.names.array("y")[...] = backend.asarray(y)
        run = step.compile()
        run()
        gradients[mode] = backend.to_numpy(model.gradients.flat)
        choices = {choice.pair.split()[0]: choice for choice in backend.epilogue_choices}
        assert (mode == "off") == (not choices)
        # dh_3 and dh_2 are part of the passes after them, the sums of the loss are a launch of their own
        assert len(step.operations) - 2 + 1 - len(run.calls) == sum(choice.fused for choice in choices.values())
        if mode == "auto":
            assert {name for name, choice in choices.items() if choice.fused} == {"bias"}
            assert "NaN" in choices["relu_bias"].reason
            assert "epilogues='all'" in choices["gelu_aux_bias"].reason
        elif mode == "all":  # each that cuBLASLt has; where it has none, the reason says so
            assert set(choices) == {"bias", "relu_bias", "gelu_aux_bias", "dgelu_bgrad"}
            assert all(choice.fused or "no algorithm" in choice.reason for choice in choices.values())
    # an element of a gradient is a sum of 24 products of sums of at most 32: 64 roundings of its own size
    slack = 64 * 2.0**-23 * np.abs(gradients["off"]).max()
    for mode in ("auto", "all"):
        np.testing.assert_allclose(gradients[mode], gradients["off"], rtol=0, atol=slack)


def test_nothing_is_timed_and_nothing_kept_on_disk(tmp_path, monkeypatch):
    import cupy

    from gpubackprop.backends.cuda.backend import CudaBackend

    gb.MLP([16, 32, 8], "gelu_tanh", device="cuda").step(24, "sgd").compile()()  # its kernels are compiled now
    monkeypatch.setenv("GPUBACKPROP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cupy.cuda, "get_elapsed_time", None)
    gb.MLP([16, 32, 8], "gelu_tanh", device=CudaBackend(0, epilogues="all")).step(24, "sgd").compile()()
    assert not list(tmp_path.glob("**/epilogues*"))
