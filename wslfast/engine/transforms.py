"""Whether torch looks through a call: forward-mode derivatives, ``torch.func`` transforms, tracers and dispatch modes.

The tuned paths detach, write in place and work in threads of their own, so nothing can look through them: a tangent would come
out as zero, a counter would count nothing. A call that is looked through is served by plain torch operators.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels.cpu.replay import saving_is_watched
from ..kernels.stacked.company import by_itself

_PLAIN = Tensor.__torch_dispatch__


def looked_through(*tensors: object) -> bool:
    """Whether a transform, a tangent, a tracer, a dispatch mode or a tensor subclass has to see every operator of this call."""
    if torch.compiler.is_compiling():  # the operators see to it
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    given = [t for t in tensors if isinstance(t, Tensor)]  # anything else is refused where it is checked
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        return True
    return any(type(t).__torch_dispatch__ is not _PLAIN for t in given)


def graphs_of_our_own() -> AbstractContextManager[None]:
    """A block whose graphs are gone at its end: neither the caller's inference mode, in which there are none, nor hooks on saved tensors
    reach it.

    A checkpoint counts what is saved, which may be another number the next time (threads save for themselves), and would run the whole
    call again for the backward pass within it.
    """
    return by_itself() if torch.is_inference_mode_enabled() or saving_is_watched() else nullcontext()
