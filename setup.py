"""What a wheel holds besides tinystory/: the kernels' sources, the scripts and the two train files,
from where they lie in a clone. Everything else about the package is in pyproject.toml."""

from setuptools import find_packages, setup

CSRC = ["tinystory.csrc", "tinystory.csrc.cpu", "tinystory.csrc.cuda"]

setup(
    packages=[*find_packages(include=["tinystory*"]), *CSRC, "tinystory_scripts"],
    package_dir={"tinystory.csrc": "csrc", "tinystory_scripts": "scripts"},
    package_data={name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in CSRC}
    | {
        "tinystory.human": ["*.html"],
        "tinystory.data.builtin": ["*.txt"],
        "tinystory.evaluate": ["known/*.txt"],
    },
    py_modules=["train_pretrain", "train_interact"],
)
