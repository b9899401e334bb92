"""The plan of `docs/ablation.md` says nothing that cannot be run."""

import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from odcheap.methods.students import Students
from odcheap.training.optim import build_optimization
from odcheap.utils.parts import find_conf_dir

TEXT = (Path(__file__).parents[2] / "docs" / "ablation.md").read_text()


def test_every_factor_of_the_ablation_composes_and_changes_the_recipe():
    factors = re.search(r"for factor in (.*?); do", TEXT, re.DOTALL)[1].replace("\\", "").split()
    given = re.search(r"-m '(\S+)' (\S+) seed=0,1 \$factor", TEXT).groups()
    assert len(factors) == 16
    found = []
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        for factor in factors:
            cfg = compose("config", [*given, factor, "data=digits", "backbone.depth=8", "job_dir=unused"])
            backbone = instantiate(cfg.backbone)
            build = lambda b=backbone, c=cfg: b(conv=instantiate(c.block_type), num_classes=10)  # noqa: E731
            method = instantiate(cfg.method)(students=Students(build, cfg.num_stu, seed=0))
            build_optimization(method, instantiate(cfg.optimizer), instantiate(cfg.scheduler), 100)
            found.append(repr(cfg))
    assert len(set(found)) == len(factors)
