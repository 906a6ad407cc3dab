"""As ``products``, over batch sizes and widths: time per FLOP from very small steps to large ones."""

from functools import partial

from gpubackprop.bench.suites import products

cases = partial(products.cases, suite="scaling")
