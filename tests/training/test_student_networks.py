from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from odcheap.layers.cheap_conv import DW
from odcheap.methods.alone import Alone
from odcheap.methods.ffl import FeatureFusion
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.runs.resume import Start
from odcheap.runs.settings import RunConfig
from odcheap.training.student_networks import StudentBuilder, build_standards, check_networks, list_builders
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import build_part, find_conf_dir

BUILDERS = [StudentBuilder(name, build_part("backbone", {"part": name}), DW) for name in ("resnet20", "vgg16")]


def build(builders):
    return Students([lambda builder=builder: builder.build_student(10) for builder in builders], len(builders), seed=0)


def test_joined_maps_must_have_equal_sizes():
    """ResNets end in maps of 8 x 8, VGG in maps of one pixel: a method that only needs logits takes both."""
    students = build(BUILDERS)
    check_networks(Alone(students), BUILDERS, (3, 32, 32))
    for method, name in ((OnlineDistillation, "od"), (FeatureFusion, "ffl")):
        line = f"method={name}: joins the students' last feature maps, .* and these have 8 x 8, 1 x 1; alone, dml"
        with pytest.raises(OptionError, match=line):
            check_networks(method(students), BUILDERS, (3, 32, 32))
    with pytest.raises(OptionError, match="backbone=vgg16: pictures of 16 x 16 are too small"):
        check_networks(Alone(students), BUILDERS, (3, 16, 16))


def test_students_with_one_backbone_share_the_standard_network():
    given = ["students=[DW,Shift,{backbone:{depth:8}}]", "backbone=resnet20", "job_dir=x"]
    with initialize_config_dir(str(find_conf_dir()), version_base="1.3"):
        config = RunConfig(compose("config", given), {"backbone": "resnet20", "block_type": "DW"}, given)
    start = Start(config, Path("x"))
    standards = build_standards(start, list_builders(start, 3), 10)
    assert [standards.index(network) for network in standards] == [0, 0, 2]
