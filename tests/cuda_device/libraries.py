"""The native libraries of the simulated device, compiled at first use into the project's cache.

device_library()  device.cpp, alone
kernel_library()  the project's CUDA binding and kernels on the SIMT machine of tests/native/simt

As a script: `libraries.py` prints the path of kernel_library(), and `libraries.py NAME FOLDER`,
which those two start, compiles a library. Compiling loads a library into the process that asked,
and so the device; therefore no process of the tests compiles."""

import hashlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIMT = ROOT / "tests" / "native" / "simt"
CUDA = ROOT / "csrc" / "cuda"


def device_library() -> Path:
    return library("simulated_device", [HERE / "device.cpp"])


def kernel_library() -> Path:
    folders = [SIMT, SIMT / "torch", SIMT / "torch/c10/cuda", CUDA, ROOT / "csrc"]
    return library(
        "simulated_kernels", [file for folder in folders for file in sorted(folder.glob("*.[ch]*"))]
    )


def library(name: str, files: list[Path]) -> Path:
    """The library's path. The library is compiled unless one exists that was made of these files,
    by this compiler, for this torch, in this folder."""
    sys.path.insert(0, str(ROOT))
    from tinystory.run.paths import cache_dir  # which does not import torch

    torch = importlib.metadata.distribution("torch")
    place = str(torch.locate_file(""))
    versions = [sys.version, torch.version, place, os.environ.get("CXX", "c++")]
    digest = hashlib.sha256(
        "\0".join(versions).encode() + b"".join(file.read_bytes() for file in files)
    ).hexdigest()
    folder = cache_dir().absolute() / "kernels" / f"{name}-{digest[:16]}"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, name, str(folder)], check=True)
    return folder / f"{name}.so"


def main(name: str, folder: Path) -> None:
    import ninja
    from torch.utils import cpp_extension

    from tinystory.ops.build import locked

    compiler, *flags = shlex.split(os.environ.get("CXX", "c++"))  # torch takes CXX as one word
    os.environ |= {
        "CXX": compiler,
        "PATH": f"{ninja.BIN_DIR}:{os.environ.get('PATH', os.defpath)}",
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
    }
    sources, include = [HERE / "device.cpp"], []
    flags += ["-std=c++20", "-O1", "-w"]
    with locked(folder):
        if (folder / "whole").exists():
            return
        if name == "simulated_kernels":
            # as SIMT's own CMakeLists.txt compiles them
            flags += ["-march=native", "-ffp-contract=off"]
            include = [str(SIMT), str(SIMT / "torch")]
            sources = [SIMT / "simt.cpp", SIMT / "trace.cpp", SIMT / "torch/backend.cpp"]
            for kernel in sorted(CUDA.glob("*.cu")):  # which ninja would give to nvcc
                sources.append(folder / f"{kernel.stem}_cu.cpp")
                sources[-1].write_text(f'#include "{kernel}"\n')
        cpp_extension.load(
            name,
            [str(source) for source in sources],
            extra_cflags=flags,
            extra_include_paths=include,
            extra_ldflags=[f"-Wl,-rpath,{path}" for path in cpp_extension.library_paths()],
            build_directory=str(folder),
            is_python_module=False,
            with_cuda=False,
        )
        (folder / "whole").touch()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:]:
        main(sys.argv[1], Path(sys.argv[2]))
    else:
        print(kernel_library())
