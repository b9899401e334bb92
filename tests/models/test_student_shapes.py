import pytest

from odcheap.models.student_shapes import name_shape, read_shapes
from odcheap.utils.errors import OptionError
from odcheap.utils.parts import list_parts, part_settings, read_part

OWN = {
    "backbone": part_settings(read_part("backbone", "resnet20"), "resnet20") | {"width": 24},
    "block_type": {"part": "Group", "groups": 2},
}


def test_an_entry_replaces_what_it_names_and_keeps_the_rest_of_the_run():
    shapes = read_shapes(["DW", "resnet32", {"backbone": {"expansion": 3}, "block_type": "Shift"}, "Group"], OWN)
    blocks = [shape["block_type"] for shape in shapes]
    assert blocks == [{"part": "DW"}, OWN["block_type"], {"part": "Shift"}, OWN["block_type"]]
    backbones = [shape["backbone"] for shape in shapes]
    plain = {"part": "resnet20", "depth": 20, "expansion": 1, "width": 24}
    other = {"part": "resnet32", "depth": 32, "expansion": 1, "width": 16}  # another part has the values of its file
    assert backbones == [plain, other, plain | {"expansion": 3}, plain]
    assert read_shapes(shapes, OWN) == shapes  # the form in which a run saves them
    assert OWN["backbone"]["expansion"] == 1


def test_no_name_is_both_a_block_type_and_a_backbone():
    assert not set(list_parts("block_type")) & set(list_parts("backbone"))


def test_a_name_has_the_options_in_which_students_differ():
    shapes = read_shapes(["DW", {"block_type": {"groups": 8}}, {"block_type": "Group", "backbone": {"width": 16}}], OWN)
    names = [name_shape(shape, shapes) for shape in shapes]
    assert names == ["DW resnet20 width=24", "Group resnet20 width=24 groups=8", "Group resnet20 width=16 groups=2"]
    assert name_shape(shapes[0]) == "DW resnet20"


@pytest.mark.parametrize(
    ("students", "line"),
    [
        ("DW", r"students=DW: must be a list of 1 to 100 entries, such as students=\[DW,Shift\]"),
        ([], r"students=\[\]: must be a list of 1 to 100 entries"),
        (["DW"] * 101, "must be a list of 1 to 100 entries"),
        (["Dw"], "students.0=Dw: must be the name of a block type .*DW.* or of a backbone .*resnet20"),
        ([3], "students.0=3: is no student"),
        ([{}], "students.0={}: is no student"),
        ([{"depth": 20}], "is no student: an entry has a block_type, a backbone or both"),
        (["DW", {"backbone": 20}], "students.1.backbone=20: must be a name, or options by name"),
        ([{"backbone": {"part": "resnet21"}}], "backbone=resnet21: unknown; must be one of"),
        ([{"backbone": {"keep": ["a"]}}], "students.0.backbone.keep=.*: is not an option of resnet20"),
        (
            [{"block_type": {"_target_": "os.system"}}],
            "students.0.block_type._target_=os.system: is not an option",
        ),
        (
            [{"backbone": {"part": "resnet18", "pretrained": "x.pth"}}],
            "students.0.backbone.pretrained=x.pth: must be set by backbone.pretrained, for all students",
        ),
    ],
)
def test_other_entries_are_refused(students, line):
    with pytest.raises(OptionError, match=line):
        read_shapes(students, OWN)
