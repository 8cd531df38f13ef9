"""CUDA devices where there are none: torch's calls run on the CPU, and what a GPU would not forgive is found.

Tensors say that they are on `cuda:N`. Found are tensors of two devices in one operation, work of two streams that is not in
order, memory that is freed while a stream uses it, page-locked memory that is read before it is filled or filled before it was
read, and waits of the host where there must be none. Not emulated: time, kernels' own limits of shapes and types, how much
memory there is.
"""

from tests.emulated_cuda.machine import Machine
from tests.emulated_cuda.order import Hazard
from tests.emulated_cuda.runtime import emulated_cuda

__all__ = ["Hazard", "Machine", "emulated_cuda"]
