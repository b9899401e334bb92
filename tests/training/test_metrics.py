import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from odcheap.training.metrics import MemberScores, TermMeans


@pytest.mark.parametrize("classes", [6, 10])
def test_scores_equal_torchmetrics(classes):
    torch.manual_seed(0)
    scores = MemberScores(members=3, classes=classes)
    theirs = {
        "top1": [MulticlassAccuracy(classes, average="micro") for _ in range(3)],
        "top5": [MulticlassAccuracy(classes, average="micro", top_k=5) for _ in range(3)],
        "recall": [MulticlassAccuracy(classes, average="none") for _ in range(3)],
    }
    for size in (40, 17, 1):
        logits, target = torch.randn(3, size, classes), torch.randint(classes, (size,))
        scores.update(logits, target)
        for metrics in theirs.values():
            for k, metric in enumerate(metrics):
                metric.update(logits[k], target)
    found = scores.compute()
    for name, metrics in theirs.items():
        expected = torch.stack([metric.compute() for metric in metrics])
        torch.testing.assert_close(found[name].float(), expected, msg=name)


def test_terms_are_means_over_images():
    terms = TermMeans()
    assert terms.summed_state()["images"] == 0
    terms.update({"loss": torch.tensor(2.0), "ce": torch.tensor(1.0)}, images=3)
    terms.update({"loss": torch.tensor(6.0), "ce": torch.tensor(5.0)}, images=1)
    assert terms.compute() == {"ce": 2.0, "loss": 3.0}
