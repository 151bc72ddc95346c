"""The compile matrix of GPU generations other than Hopper: a file of its own, so that it gets a process of its own."""

from __future__ import annotations

import pytest

pytest.importorskip("cupy")

from nvrtc import ARCHITECTURES
from test_compile import check_matrix


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sm_90"])
def test_compile_matrix(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_matrix(architecture, capsys)
