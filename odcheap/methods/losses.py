"""Losses between softened predictions: pure functions of logits."""

from torch import Tensor

from odcheap.utils.errors import OptionError

REDUCTIONS = ("batchmean", "mean")
COLDEST, HOTTEST = 1e-6, 1e6  # logits over the one, and its square times a loss, stay far from float32's end


def check_distillation(temperature: float, reduction: str = "batchmean") -> None:
    """Raises `OptionError` unless the temperature is from 1e-6 to 1e6 and the reduction is known."""
    if not COLDEST <= temperature <= HOTTEST:
        raise OptionError("method.temperature", temperature, "must be above 0: from 1e-6 to 1e6")
    if reduction not in REDUCTIONS:
        raise OptionError("method.kl_reduction", reduction, f"must be one of {', '.join(REDUCTIONS)}")


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str = "batchmean") -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), without the factor T^2; a scalar.

    Both logits are (N, K); both receive gradients. Dimensions before these are broadcast, and the result has them.
    `batchmean` sums over the K classes and averages over the N images; `mean` averages over all N x K elements, as the
    2019 code does, and is smaller by the factor K. Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural
    network", 2015, section 2. Raises `OptionError`.
    """
    check_distillation(temperature, reduction)
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    elements = teacher.exp() * (teacher - student)
    return elements.sum(-1).mean(-1) if reduction == "batchmean" else elements.mean((-2, -1))
