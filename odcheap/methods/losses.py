"""The distillation loss as a function of logits; `methods.okddip` has one that takes probabilities."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from odcheap.utils.arguments import check_arguments

# In this range neither logits / T nor T^2 times a loss overflow in float32.
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
KlReduction = Literal["batchmean", "mean"]


@check_arguments("method")
def soft_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Temperature,
    reduction: KlReduction = "batchmean",
) -> Tensor:
    """Returns KL(softmax(teacher / T) || softmax(student / T)), without the factor T^2.

    Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2. Gradients flow to
    both tensors; detach the teacher's logits if they should not learn from this loss.

    Args:
        student_logits: (..., N, K) for N images and K classes.
        teacher_logits: (..., N, K); the dimensions before N are broadcast against those of `student_logits`.
        temperature: T, from 1e-6 to 1e6.
        reduction: "batchmean" sums over the classes and averages over the images; "mean" averages over all N x K
            elements, as the method's 2019 reference code does, and gives a value that is smaller by the factor K.

    Returns:
        One value for each element of the broadcast dimensions before N; a scalar if there are none.

    Raises:
        OptionError: The temperature is out of range, or the reduction is unknown.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(soft_kl(student, teacher, temperature=1.0).item(), 4)
        1.5232
        >>> round(soft_kl(student, teacher, temperature=1.0, reduction="mean").item(), 4)
        0.7616
    """
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    elements = teacher.exp() * (teacher - student)
    return elements.sum(-1).mean(-1) if reduction == "batchmean" else elements.mean((-2, -1))
