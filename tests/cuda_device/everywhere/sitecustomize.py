"""Puts the simulated device into every Python process with this folder on PYTHONPATH, as a GPU is in
every process of a machine that has one. The device must have been compiled before."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import PROJECT
from runtime import install, install_project

sys.path.insert(0, str(PROJECT))
install()
install_project()
