"""A network as a table: layers, shapes, parameters, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from gpubackprop.network import Network
from gpubackprop.training.tables import html_table, text_table


@dataclass(frozen=True)
class LayerSummary:
    """One layer."""

    name: str
    activation: str
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """How many numbers W and b hold."""
        return (self.inputs + 1) * self.outputs


@dataclass(frozen=True)
class Summary:
    """A network as a table; ``print`` shows it.

    Attributes
    ----------
    title : str
    layers : tuple of LayerSummary
    nbytes : int
        Of the parameters.
    """

    title: str
    layers: tuple[LayerSummary, ...]
    nbytes: int

    @classmethod
    def of(cls, network: Network, title: str) -> Summary:
        """Return the summary of a network."""
        a, sizes = network.architecture, network.layer_sizes
        names = [*map(str, range(1, len(sizes) - 1)), "o"]
        activations = [*(activation.name for activation in a.activations), "identity"]
        layers = zip(names, activations, sizes[:-1], sizes[1:], strict=True)
        return cls(
            title,
            tuple(LayerSummary(*layer) for layer in layers),
            network.parameters.count * network.parameters.flat.dtype.itemsize,
        )

    @property
    def parameters(self) -> int:
        """How many numbers all W and b hold."""
        return sum(layer.parameters for layer in self.layers)

    def _rows(self) -> list[list[str]]:
        rows = [
            [e.name, e.activation, f"(n, {e.outputs})", f"({e.inputs}, {e.outputs})", f"({e.outputs},)", f"{e.parameters:,}"]
            for e in self.layers
        ]  # fmt: skip
        return [["layer", "activation", "output", "W", "b", "parameters"], *rows, self._total()]

    def _total(self) -> list[str]:
        return ["total", "", "", "", f"{self.nbytes:,} bytes", f"{self.parameters:,}"]

    def __str__(self) -> str:
        return f"{self.title}\n\n{text_table(self._rows(), right=frozenset([5]))}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._rows(), self.title)
