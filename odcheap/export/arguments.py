"""Writes a run's student as files for a device, and checks them.

The folder JOB_DIR/export (or --out) has these files:

  student.onnx         for ONNX Runtime and compilers; the normalization is part of the graph
  student-dense.onnx   the same function as dense convolutions, written if that is faster here
  student-int8.onnx    8-bit integers, with --int8
  student.pte          for ExecuTorch on phones, with --executorch
  student-int8.pte     the same with 8-bit integers, with --executorch
  student.safetensors  for odcheap.load_student
  student.pt2          for torch.export.load, which needs PyTorch only, with --pt2
  predict.py           classifies image files: python predict.py IMAGE_OR_FOLDER...
  preprocess.json      how an image file becomes the network's input
  labels.json          the names of the classes
  results.json         accuracy and size, for programs
  README.md            the model card: accuracy, speed, checks and checksums

Every file is run on the run's test images and compared with the trained network before the folder appears.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command; `--help` and mistyped arguments are answered without PyTorch.

    Args:
        arguments: The command-line arguments; None for those of this process.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("odcheap export", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("job_dir", type=Path, metavar="JOB_DIR", help="a run's folder")
    add("--student", type=int, metavar="K", help="student K, from 0 (default: the selected student)")
    add("--out", type=Path, metavar="DIR", help="the folder to write (default: JOB_DIR/export)")
    add("--data-dir", metavar="DIR", help="where the run's images are now (default: where they were in training)")
    add("--int8", action="store_true", help="also write 8-bit integers, calibrated on training images")
    qat = "with --int8: first fine-tune with the rounding, for EPOCHS epochs of the training images (default: 3)"
    add("--qat", type=int, nargs="?", const=3, default=0, metavar="EPOCHS", help=qat)
    add("--executorch", action="store_true", help="also write student.pte and student-int8.pte for ExecuTorch")
    openvino = "also check and time the ONNX files in OpenVINO (pip install 'odcheap[openvino]')"
    add("--openvino", action="store_true", help=openvino)
    add("--pt2", action="store_true", help="also write student.pt2; never load such a file of a stranger")
    add("--batch", type=int, metavar="N", help="a static graph for exactly N images, for a device's compiler")
    add("--opset", type=int, metavar="N", help="version of ONNX's operators (default: 18, if possible)")
    add("--overwrite", action="store_true", help="replace an older export")
    add("--seconds", type=float, default=1.0, metavar="S", help="time for each timing (default: %(default)s)")
    more = "folder with configuration files of your own, for parts that odcheap does not have; may be repeated"
    add("--config-dir", type=Path, action="append", default=[], metavar="DIR", help=more)
    return parser.parse_args(arguments)
