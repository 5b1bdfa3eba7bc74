"""KL divergence from the full model's next-token distribution to the emulator's."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_CHUNK = 1 << 19
"""Logits handled at once: few enough to stay in a processor's cache, where the softmaxes are cheap."""


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher ‖ student) over positions, in nats.

    Args:
        student: logits (…, vocabulary) that get a gradient.
        teacher: logits of the same shape, taken as constants.
    """
    loss = _KLDivergence.apply(student.flatten(0, -2), teacher.flatten(0, -2))
    assert isinstance(loss, torch.Tensor)
    return loss


class _KLDivergence(torch.autograd.Function):
    """The gradient, softmax(student) − softmax(teacher), comes out of the forward pass for free.

    PyTorch's own composition passes a dozen times over tensors of batch · time · vocabulary numbers.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        rows, vocabulary = student.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for start in range(0, rows, max(1, _CHUNK // vocabulary)):
            part = slice(start, start + max(1, _CHUNK // vocabulary))
            log_q = functional.log_softmax(student[part].float(), dim=-1)
            log_p = functional.log_softmax(teacher[part].float(), dim=-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[part] = log_q.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return (total / rows).float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer[0] / len(gradient)), None
