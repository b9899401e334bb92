"""Measures the accuracy of a run's student, or of an export, on other images of known classes.

All images are evaluated, by the student that the run has selected. Classes are matched by their names.

  odcheap evaluate runs/photos FOLDER          images in FOLDER/<class>/ or FOLDER/test/<class>/
  odcheap evaluate runs/photos/export FOLDER   the same with ONNX Runtime
  odcheap evaluate runs/cifar10/od cifar10     the test images of a data set

The accuracy is printed with its 95 % interval, the recall of each class and the confusion matrix. Images on which the
run was trained are counted and named. The folder of the result has these files:

  evaluation.json   all figures, and the images on which the run was trained
  confusion.csv     the confusion matrix; rows are the true classes
  confusion.png     the same as a picture
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = "odcheap evaluate") -> argparse.Namespace:
    """Parses the arguments of `odcheap evaluate`; after `--help` or wrong arguments the process ends here.

    Args:
        arguments: The command-line arguments; None for those of this process.
        prog: The name of the command in its help.
    """
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_OR_EXPORT", help="a run's folder, or the folder of an export")
    add("images", metavar="FOLDER_OR_DATASET", help="a folder with a folder for each class, or cifar10, cifar100, ...")
    add("--student", type=int, metavar="K", help="student K of the run, from 0 (default: the selected student)")
    add("--model", dest="file", metavar="FILE", help="another ONNX file of the export (default: student.onnx)")
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="the folder to write (default: RUN/evaluation/<name of the images>)")
    add("--known-only", action="store_true", help="leave out folders that are no class of the student")
    more = "folder with configuration files of your own, for parts that odcheap does not have; may be repeated"
    add("--config-dir", type=Path, action="append", default=[], metavar="DIR", help=more)
    return parser.parse_args(arguments)
