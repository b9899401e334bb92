import torch

from odcheap.bench.baseline import PillowImages, train_steps
from odcheap.layers.cheap_conv import DW
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.models.cifar import CifarResNet


def make_dataset(count=12):
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, PillowImages(images, torch.arange(count) % 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_images_are_windows_of_the_padded_image():
    images, dataset = make_dataset()
    x, target = dataset[4]
    assert (x.shape, target) == ((3, 8, 8), 1)
    padded = torch.nn.functional.pad(images[4], (4, 4, 4, 4)) / 255
    windows = [padded[:, r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
    expected = [(w - 0.5) / 0.25 for window in windows for w in (window, window.flip(2))]
    assert any(torch.allclose(x, e, atol=1e-6) for e in expected)


def test_each_call_takes_a_step_and_the_epochs_never_end():
    _, dataset = make_dataset()
    method = OnlineDistillation(Students(lambda: CifarResNet(8, DW(), 3), 2, seed=0))
    steps = train_steps(method, dataset, batch_size=4, lr=0.1, device=torch.device("cpu"), workers=0)
    before = [p.clone() for p in method.parameters()]
    losses = [next(steps) for _ in range(7)]
    assert all(loss > 0 for loss in losses)
    assert all(not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))
    assert method.norm.num_batches_tracked == 7
