import torch
from torch.nn import functional

from scaleot_ray.emulator import distillation
from scaleot_ray.emulator.distillation import distillation_loss


def _reference(student, teacher):
    student = functional.log_softmax(student.flatten(0, 1), dim=-1)
    teacher = functional.log_softmax(teacher.flatten(0, 1), dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def test_value_and_gradient_are_those_of_the_plain_composition(monkeypatch):
    monkeypatch.setattr(distillation, "_CHUNK", 700)  # several chunks, the last one shorter
    torch.manual_seed(0)
    student = torch.randn(3, 7, 97, requires_grad=True)
    teacher = torch.randn(3, 7, 97)
    expected = _reference(student, teacher)
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    loss = distillation_loss(student, teacher)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, atol=1e-7)


def test_equal_logits_have_no_loss_and_no_gradient():
    logits = torch.randn(2, 4, 31, requires_grad=True)
    loss = distillation_loss(logits, logits.detach() + 5)  # a constant shift is the same distribution
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.abs() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_float16_gradients_survive_only_scaled():
    # Of a mean over many rows, most gradients are below the smallest float16: stage 1 scales its loss by 1024 there.
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(512, 4096, generator=generator)
    student = (teacher + 0.1 * torch.randn(512, 4096, generator=generator)).half().requires_grad_(True)
    exact = student.detach().float().requires_grad_(True)
    (wanted,) = torch.autograd.grad(distillation_loss(exact, teacher), exact)
    errors = []
    for scale in (1.0, 1024.0):
        (found,) = torch.autograd.grad(scale * distillation_loss(student, teacher), student)
        errors.append(((found.float() / scale - wanted).norm() / wanted.norm()).item())
    assert errors[0] > 5 * errors[1]
    assert errors[1] < 0.005
