"""A training loop in the style of 2019, the benchmark's baseline; nothing else uses it.

It runs eagerly in float32 with channels first, one student after another. Pillow augments the images one by one on the
CPU. Loss and accuracies are read after every step, so the program waits for the GPU at every step.
"""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from odcheap.methods.base import Method


class PillowImages(Dataset):
    """Images that are padded by 4, cropped, flipped, and normalized one by one, with their labels.

    Args:
        images: uint8 of shape (N, 3, H, W).
        target: Labels of shape (N,).
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
    """

    def __init__(self, images: Tensor, target: Tensor, mean: tuple[float, ...], std: tuple[float, ...]):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.target = target
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.target[index])


def train_steps(
    method: Method, images: PillowImages, batch_size: int, lr: float, device: torch.device, workers: int
) -> Iterator[float]:
    """Yields the loss of one training step after another, without an end."""
    loader = DataLoader(images, batch_size, shuffle=True, num_workers=workers, drop_last=True)
    optimizer = torch.optim.SGD(method.parameters(), lr, momentum=0.9, weight_decay=2e-4)
    while True:
        for batch, target in loader:
            batch, target = batch.to(device), target.to(device)
            optimizer.zero_grad()
            outputs = method(batch)
            loss = method.loss(outputs, target)["loss"]
            loss.backward()
            optimizer.step()
            for logits in [*outputs["student_logits"], outputs["teacher_logits"]]:
                if logits is not None:
                    (logits.argmax(1) == target).float().mean().item()
            yield loss.item()
