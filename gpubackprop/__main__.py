"""``python -m gpubackprop``."""

from gpubackprop.cli import main

try:
    main()
finally:
    # Where a KeyboardInterrupt has gone through the exec() of a text (NumPy, dataclasses and Numba have some), CPython ends
    # ``python -m`` by the signal, although it was caught later; the next exec() forgets it.
    exec("")
