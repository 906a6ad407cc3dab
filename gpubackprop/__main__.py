"""``python -m gpubackprop``."""

from gpubackprop.cli import main

main()
