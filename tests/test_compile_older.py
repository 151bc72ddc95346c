"""The compile matrix of GPU generations before Hopper: a file of its own, so that it gets a process of its own."""

from __future__ import annotations

import pytest

pytest.importorskip("cupy")

from nvrtc import ARCHITECTURES
from test_compile import check_matrix

GENERATIONS = ("sm_75", "sm_80")


@pytest.mark.parametrize("architecture", GENERATIONS)
def test_compile_matrix(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert architecture in ARCHITECTURES
    check_matrix(architecture, capsys)
