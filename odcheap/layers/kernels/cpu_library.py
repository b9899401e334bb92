"""Compiles the fused CPU operators, in C++, at their first use, and keeps the result for the next processes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).with_name("cpp")  # kernels.cpp, and the headers that it includes
COMPILE = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-c")
SECONDS = 300  # a compilation takes 14 seconds on a free core

# The types of the C functions' arguments, by the letters in `SIGNATURES`: pointer, long, double, int.
TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "d": ctypes.c_double, "i": ctypes.c_int}
SIGNATURES = {
    "norm_forward": "p" * 9 + "ll" + "dd" + "ii",
    "norm_backward": "p" * 10 + "ll" + "ii",
    "normalize": "p" * 6 + "ll" + "ii",
    "gradient_sums": "p" * 7 + "ll" + "i",
    "pair_forward": "p" * 12 + "l" * 7 + "dd" + "i",
    "pair_backward": "p" * 20 + "l" * 7 + "i",
}


class CompileError(Exception):
    """The library cannot be compiled or loaded on this machine; the text says why, in one line."""


@lru_cache
def load_library() -> ctypes.CDLL:
    """Loads the library of the fused CPU operators; compiles it from C++ first if this has not been done yet.

    The compiled file is kept for other processes with the same source, compiler and processor. PyTorch must have been
    imported, since the library uses the threads of PyTorch's OpenMP library.

    Raises:
        CompileError: There is no compiler, or it fails, or the result cannot be loaded.
    """
    path = library_path()
    if not path.exists():
        compile_library(find_compiler(), path)
    return open_library(path)


def open_library(path: Path) -> ctypes.CDLL:
    """Loads the compiled library of the fused CPU operators, and declares the types of its functions' arguments.

    Args:
        path: The file, a shared library.

    Raises:
        CompileError: The file cannot be loaded.
    """
    try:
        library = ctypes.CDLL(str(path))
        for name, letters in SIGNATURES.items():
            for dtype in ("float32", "bfloat16", "float64"):
                function = getattr(library, f"{name}_{dtype}")
                function.argtypes, function.restype = [TYPES[letter] for letter in letters], None
    except (OSError, AttributeError) as error:
        raise CompileError(f"{path} cannot be loaded: {error}") from error
    return library


def library_path() -> Path:
    """Returns the path of the compiled library of the fused CPU operators on this machine; it may not exist yet.

    Raises:
        CompileError: This system is not Linux, or there is no compiler.
    """
    if platform.system() != "Linux":
        raise CompileError(f"fused operators are built on Linux only, and this is {platform.system()}")
    return cache_folder() / f"cpu-{fingerprint(find_compiler())}.so"


def needs_compilation() -> bool:
    """Returns True if `load_library` would compile the library: there is a compiler, and no compiled file yet."""
    try:
        return not library_path().exists()
    except CompileError:
        return False


def find_compiler() -> str:
    """Returns the path of the C++ compiler: that of the environment variable CXX, or g++.

    Raises:
        CompileError: There is no such program.
    """
    name = os.environ.get("CXX") or "g++"
    if (found := shutil.which(name)) is None:
        raise CompileError(f"there is no C++ compiler {name} on the PATH (install g++, or name one in CXX)")
    return found


def cache_folder() -> Path:
    """Returns the folder of the compiled libraries, `odcheap` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odcheap"


def fingerprint(compiler: str) -> str:
    """Returns a hash (20 hexadecimal digits) of all that the compiled library depends on.

    This is the source, the compiler, its options and the kind of processor. The processor is in it because several
    machines may share a home directory.

    Args:
        compiler: The path of the C++ compiler.
    """
    version = run([compiler, "-dumpfullversion", "-dumpmachine"])
    flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))]
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    parts = (*sources, compiler, version, *COMPILE, platform.machine(), *flags[:1])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def compile_library(compiler: str, path: Path, options: tuple[str, ...] = ()) -> None:
    """Compiles the fused CPU operators to a shared library; it appears at `path` only when it is complete.

    Args:
        compiler: The path of the C++ compiler.
        path: The file to write.
        options: Further options of the compiler, such as those for another processor.

    Raises:
        CompileError: The compiler fails, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, linked = f"{folder}/cpu.o", f"{folder}/cpu.so"
            run([compiler, *COMPILE, *options, str(SOURCES / "kernels.cpp"), "-o", compiled])
            # Linked without an OpenMP library: PyTorch has loaded one, and a second one would start threads of its own.
            run([compiler, "-shared", compiled, "-o", linked])
            os.replace(linked, path)
    except OSError as error:
        raise CompileError(f"{path.parent} cannot be written: {error}") from error


def run(command: list[str]) -> str:
    """Runs a command, and returns its output on stdout.

    Args:
        command: The program and its arguments.

    Raises:
        CompileError: The command fails, or does not end within 300 seconds.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        raise CompileError(f"{command[0]} fails: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
