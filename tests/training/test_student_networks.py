import pytest

from odcheap.layers.cheap_conv import DW
from odcheap.methods.alone import Alone
from odcheap.methods.ffl import FeatureFusion
from odcheap.methods.od import OnlineDistillation
from odcheap.methods.students import Students
from odcheap.training.student_networks import StudentBuilder, check_networks
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import build_part

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
