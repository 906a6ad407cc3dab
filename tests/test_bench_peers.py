"""The peers do what our step does: the same losses, parameters and predictions, from the same weights."""

import numpy as np
import pytest

import gpubackprop as gb
from gpubackprop.bench import peers
from gpubackprop.bench.peers import LEARNING_RATE, PEERS, CannotTakePartError, Peer, make_peer, make_peers, make_problem

pytestmark = pytest.mark.filterwarnings("default")  # those of other libraries are not ours to mend

STEPS = 16
# float32 products of at most 64 terms through three layers, over 16 steps: roundings of 6e-8 grow to some 1e-6
TOLERANCE = 2e-5


def made(name, problem):
    peer = make_peer(name, problem)
    if isinstance(peer, str):
        pytest.skip(f"{name}: {peer}")
    return peer


def ours(problem, *, epoch=False):
    model = gb.MLP(problem.sizes, device="reference")
    model.load_state_dict(problem.state)
    optimizer = gb.SGD(LEARNING_RATE) if problem.optimizer == "sgd" else gb.Adam(LEARNING_RATE)
    if epoch:
        model.fit(
            problem.X, problem.y, epochs=1, batch_size=problem.batch, optimizer=optimizer, shuffle=False, progress=False
        )
        return model, None
    step = model.step(problem.batch, optimizer)
    X, y = problem.of_batch()
    step.names.array("X")[...], step.names.array("y")[...] = X, y
    step.compile()(STEPS)
    return model, step.names.array("loss")[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_as_we_do(name, optimizer):
    problem = make_problem((20, 16, 12, 5), 8, optimizer=optimizer, samples=40)
    before = {key: array.copy() for key, array in problem.state.items()}
    peer = made(name, problem)
    for _ in range(STEPS // peer.units):
        peer.step()
    model, loss = ours(problem)
    assert peer.loss() == pytest.approx(loss, rel=TOLERANCE)
    np.testing.assert_allclose(peer.probabilities(), model.predict_proba(problem.of_batch()[0]), atol=TOLERANCE)
    for key, array in problem.state.items():
        np.testing.assert_array_equal(array, before[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_an_epoch_of_a_peer_goes_through_all_rows_in_mini_batches(name):
    problem = make_problem((20, 16, 12, 5), 8, samples=40)
    peer = made(name, problem)
    if type(peer).epoch is Peer.epoch:
        pytest.skip(f"{name} has no epoch")
    trains_an_epoch(peer, problem)


def trains_an_epoch(peer, problem):
    peer.epoch(shuffle=False)
    model, _ = ours(problem, epoch=True)
    np.testing.assert_allclose(peer.probabilities(), model.predict_proba(problem.of_batch()[0]), atol=TOLERANCE)
    peer.epoch(shuffle=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GraphedTorchPeer", "CompiledGraphedTorchPeer", "CompiledGraphedTorchLoopPeer"])
@pytest.mark.parametrize("longest", [128, 2])
def test_what_a_graph_of_torch_holds_trains_as_we_do(kind, longest, monkeypatch):
    """Without a GPU a capture is its warm-up, which trains, and a replay is the run itself."""
    pytest.importorskip("torch")
    from gpubackprop.bench.peers import pytorch

    def capture(run):
        for _ in range(pytorch.WARM_UP):
            run()
        return run

    monkeypatch.setattr(pytorch, "capture", capture)
    monkeypatch.setattr(pytorch, "LONGEST_GRAPH", longest)
    problem = make_problem((20, 16, 12, 5), 8, optimizer="adam", samples=48)
    peer = getattr(pytorch, kind)(problem)
    for _ in range(STEPS // peer.units):
        peer.step()
    model, loss = ours(problem)
    assert peer.loss() == pytest.approx(loss, rel=TOLERANCE)
    np.testing.assert_allclose(peer.probabilities(), model.predict_proba(problem.of_batch()[0]), atol=TOLERANCE)
    trains_an_epoch(getattr(pytorch, kind)(problem), problem)


def test_what_keeps_a_peer_from_running_is_named(monkeypatch):
    class Broken(Peer):
        def __init__(self, problem):
            raise RuntimeError("no luck\nin two lines")

        def step(self):
            raise NotImplementedError

        def loss(self):
            raise NotImplementedError

    class Elsewhere(Broken):
        def __init__(self, problem):
            raise CannotTakePartError("runs on a toaster only")

    monkeypatch.setattr(peers, "Broken", Broken, raising=False)
    monkeypatch.setattr(peers, "Elsewhere", Elsewhere, raising=False)
    monkeypatch.setitem(PEERS, "broken", peers.Entry("numpy", "numpy", "gpubackprop.bench.peers:Broken"))
    monkeypatch.setitem(PEERS, "elsewhere", peers.Entry("numpy", "numpy", "gpubackprop.bench.peers:Elsewhere"))
    monkeypatch.setitem(PEERS, "absent", peers.Entry("numpy", "no_such_library", "none:None"))
    monkeypatch.setitem(PEERS, "slow", peers.Entry("numpy", "numpy", "none:None", slow=True))
    found = dict(make_peers(make_problem((3, 4, 2), 5), ["numpy"], slow=False))
    assert isinstance(found.pop("numpy"), Peer)
    assert found == {
        "broken": "RuntimeError: no luck",
        "elsewhere": "runs on a toaster only",
        "absent": "not installed",
        "slow": "takes long to compile: left out of a quick run",
    }
