"""Measures how fast training, inference and start-up are on this machine.

Three training loops are compared on random images: a loop in the style of 2019 (float32), a bare loop with odcheap's
settings, and odcheap's own training with all its callbacks. They run alternately in one process. The inference of the
student and of the standard network is timed in ONNX Runtime. The results are written to bench.json, bench.md and
bench.png.

With --exports, the files of exports are timed instead: floats and 8-bit integers in ONNX Runtime, OpenVINO and
ExecuTorch, if these are installed. The results are written to exports.json and exports.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = "odcheap bench") -> argparse.Namespace:
    """Parses the arguments of `odcheap bench`; after `--help` or wrong arguments the process ends here.

    Args:
        arguments: The command-line arguments; None for those of this process.
        prog: The name of the command in its help.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="one block type, fewer rounds: about two minutes")
    add("--peers", action="store_true", help="also the training loops of torchdistill and of a Lightning template")
    exports = "only time the files of these exports, alternately in every runtime, and tabulate sizes and accuracies"
    add("--exports", type=Path, nargs="+", default=[], metavar="EXPORT_DIR", help=exports)
    add("--seconds", type=float, default=2.0, metavar="S", help="time for each timing of --exports (default: 2)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of each runtime of --exports (default: 1)")
    add("--out", type=Path, default=Path("bench"), help="folder of the results (default: %(default)s)")
    more = "folder with configuration files of your own, for parts that odcheap does not have; may be repeated"
    add("--config-dir", type=Path, action="append", default=[], metavar="DIR", help=more)
    add("overrides", nargs="*", metavar="OPTION=VALUE", help="training options, such as block_type=Shift num_stu=2")
    return parser.parse_args(arguments)
