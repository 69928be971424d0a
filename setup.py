"""The optional compiled steps of the torch backend; everything else is in pyproject.toml.

One small library for each instruction set, from one source, with a header that is generated from
divergences.py, and one with the GEMMs for AMX. Without a C++ compiler, or where it does not know an
instruction set, the installation succeeds and torch does the same work.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path(__file__).parent / "dudi_kernels"
NATIVE = "dudi_kernels.backends.native"
COMMON = ["-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
LEVELS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-ffp-contract=fast"]
    LEVELS["avx512"] = [
        *LEVELS["avx2"],
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]
    amx = ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
    LEVELS["amx"] = [*LEVELS["avx512"], *amx, "-Wno-uninitialized"]  # GCC 12's own headers


def module_of(path, name):
    """A module by its file: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


generate = module_of(KERNELS / "backends/native/generate.py", "dudi_generate")


class Build(build_ext):
    def run(self):
        divergences = module_of(KERNELS / "divergences.py", "dudi_divergences")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "divergences.h").write_text(generate.header(divergences), encoding="utf-8")
        (folder / "fingerprint.h").write_text(generate.stamp(), encoding="utf-8")
        self.parallel = None  # the libraries share an object's name
        for extension in self.extensions:
            extension.include_dirs.append(str(folder))
        super().run()


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            f"{NATIVE}._{source}_{level}",
            [f"dudi_kernels/backends/native/{source}.cpp"],
            extra_compile_args=[*COMMON, *flags],
            depends=[os.path.relpath(source) for source in generate.SOURCES],
            optional=True,
        )
        for level, flags in LEVELS.items()
        for source in ("gemm" if level == "amx" else "rows",)
    ],
)
