"""Builds the compiled core, csrc/ -> minillm_kernels/_core, with CMake and Ninja, against no torch.

    MINILLM_CUDA=auto|0|1     auto (default): with CUDA when nvcc is found; 0: never; 1: a missing nvcc is an error
    MINILLM_CUDA_ARCHS=80;90  default: the visible GPU's, else 80;90 with PTX
    MAX_JOBS=N                parallel compilations, default: the cores

In a checkout, `python setup.py build_ext --inplace` builds again after a change of csrc, with what is installed and
without network: it needs setuptools 77 or newer, pybind11, cmake, ninja and a C++17 compiler.

Without a C++ compiler (or when the build fails) the package installs as pure Python, and `available_backends()` says
what is missing; MINILLM_CUDA=1 makes any failure an error.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_wanted() -> str | None:
    """The path of nvcc, or None for a build without CUDA."""
    switch = os.environ.get("MINILLM_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        sys.exit(f"MINILLM_CUDA must be auto, 0 or 1, not {switch!r}")
    if switch == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None and switch == "1":
        sys.exit("MINILLM_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME, or use MINILLM_CUDA=auto")
    return nvcc


def cuda_architectures(nvcc: str) -> str:
    """CMake's list: "90" compiles for 9.0 and embeds its PTX, "80-real" only compiles."""
    archs = os.environ.get("MINILLM_CUDA_ARCHS", "")
    if not archs:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
            archs = ";".join(sorted({x.replace(".", "") for x in found}, key=int))
        except (OSError, subprocess.SubprocessError, ValueError):
            pass
    archs = archs or "80;90"
    wanted = [x.strip() for x in archs.replace(",", ";").split(";") if x.strip()]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    for arch in wanted:
        number = arch.rstrip("af")
        if known and f"compute_{number}" not in known:
            sys.exit(
                f"MINILLM_CUDA_ARCHS: this nvcc ({nvcc}) cannot target {arch}; it knows "
                + ", ".join(x.removeprefix("compute_") for x in known)
            )
    return ";".join([f"{x}-real" for x in wanted[:-1]] + wanted[-1:])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc = cuda_wanted()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "core"
        import pybind11

        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMINILLM_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures(nvcc)}"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            shutil.rmtree(build, ignore_errors=True)  # isolated builds leave paths behind that no longer exist
            output.mkdir(parents=True, exist_ok=True)
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("MINILLM_CUDA") == "1":
                raise
            print(
                f"\nminillm: the compiled core was NOT built ({error}). The package works without it, on the PyTorch "
                "reference, slowly.\nInstall a C++17 compiler (for example `apt-get install g++`), then run this "
                "installation again; `pip install -v` shows the compiler's output.\n",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        """Into the repository, for an editable installation; nothing to copy when the build was skipped."""
        if all((Path(self.build_lib) / self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(ext_modules=[Extension("minillm_kernels._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
