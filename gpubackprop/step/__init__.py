"""The step as data: buffers and operations on them, recorded without memory or device, then bound to both."""

from gpubackprop.step.step import Step as Step
