import pickle

from odcheap.utils.errors import Failure, OptionError


def test_an_option_error_is_one_line_and_survives_pickling():
    error = pickle.loads(pickle.dumps(OptionError("num_stu", 0, "must be 1 or more")))
    assert str(error) == "num_stu=0: must be 1 or more"
    assert isinstance(error, (Failure, ValueError))
