"""pytest -p plugin: the tests of this process run on the simulated device. It is imported before
any conftest.py, and so before torch."""

import os

import pytest
from machine import machine
from runtime import install, install_project

install()


def pytest_configure() -> None:
    install_project(os.environ.get("CUDA_DEVICE_KERNELS", ""))


@pytest.fixture
def device_machine():
    """The machine, with counts from zero. A problem fails the test even if the error was caught."""
    machine.waits.clear(), machine.launches.clear()
    yield machine
    assert not machine.problems


def waits_within(function: str) -> list[tuple[str, str, int]]:
    """(kind, where, how often) of the waits inside a function of the project."""
    return [
        (kind, where, n)
        for (kind, where), n in machine.waits.items()
        if f" {function} <" in f" {where} <"
    ]
